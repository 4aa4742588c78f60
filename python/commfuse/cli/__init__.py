"""The command line: ``commfuse generate | demo | plan | profile | bench | tune | doctor``.

Commands import what they need when they run, so that ``commfuse --help`` is immediate.
"""

from __future__ import annotations

import sys

import typer

from commfuse.cli.bench import bench
from commfuse.cli.demo import demo
from commfuse.cli.doctor import doctor
from commfuse.cli.generate import generate
from commfuse.cli.plan import plan
from commfuse.cli.profile import profile
from commfuse.cli.tune import tune
from commfuse.errors import CommfuseError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Transformers split over several processes or devices, with fused communication.",
)
for command in (generate, demo, plan, profile, bench, tune, doctor):
    app.command()(command)


def main() -> None:
    """Runs the command line. Exit status: 2 for input that cannot be used, 1 for other failures."""
    try:
        app()
    except CommfuseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)

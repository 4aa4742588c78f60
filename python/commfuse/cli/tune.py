"""``commfuse tune``: measures where one way of doing a call on GPUs becomes faster than another."""

from __future__ import annotations

from typing import Annotated

import typer

from commfuse.cli.ranks import gpu_lab, rank_counts, run_again_as_ranks, started_ranks
from commfuse.errors import UsageError


def tune(
    device: Annotated[str, typer.Option(help="cuda: there is nothing to tune on a CPU.")] = "cuda",
    ranks: Annotated[
        str | None,
        typer.Option(help="Numbers of ranks, one after the other. (default: 2,4,8, or torchrun's)"),
    ] = None,
) -> None:
    """Measure crossovers on this machine's GPUs, in under two minutes, and keep them.

    Communicators made afterwards use them: `commfuse.explain` says where its numbers come from.
    """
    if device != "cuda":
        raise UsageError(f"--device {device}: only GPUs are tuned; use cuda")
    started = started_ranks()
    counts = rank_counts(ranks if ranks or started else "2,4,8", started)
    if min(counts) < 2:
        raise UsageError(f"--ranks {ranks}: at least 2, one rank communicates with nobody")
    if started is not None:
        from commfuse.bench.tune import run_rank

        run_rank()
        return
    with gpu_lab(device) as lab:
        for count in counts:
            if status := run_again_as_ranks(count, lab.environment(count)):
                raise typer.Exit(status)

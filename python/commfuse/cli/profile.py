"""``commfuse profile``: measures this machine and its links, as a cluster file for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commfuse.cli.ranks import gpu_lab, rank_counts, run_again_as_ranks, started_ranks
from commfuse.errors import UsageError

DEVICES = ("cpu", "cuda")


def profile(
    device: Annotated[str, typer.Option(help=f"{' or '.join(DEVICES)}.")] = "cpu",
    ranks: Annotated[
        str | None, typer.Option(help="Devices to measure together. (default: 2, or torchrun's)")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("cluster.yaml"),
) -> None:
    """Measure GEMM, memory, all-reduce and send/recv here, in about a minute.

    The file that it writes is a cluster: `commfuse plan --cluster cluster.yaml --model …`.
    """
    started = started_ranks()
    counts = rank_counts(ranks, started)
    if device not in DEVICES:
        raise UsageError(f"--device {device}: use {' or '.join(DEVICES)}")
    if len(counts) > 1 or counts[0] < 2:
        raise UsageError(f"--ranks {ranks}: one number, at least 2: links are between devices")
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {out}: its name must end in .yaml, by which plan knows it")
    if started is not None:
        from commfuse.bench.profile import run_rank

        run_rank(device, out)
        return
    with gpu_lab(device) as lab:
        environment = lab.environment(counts[0]) if lab else {"OMP_NUM_THREADS": "1"}
        if status := run_again_as_ranks(counts[0], environment):
            raise typer.Exit(status)

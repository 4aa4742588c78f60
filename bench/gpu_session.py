"""``make gpu-bench``: all that a visit to a machine with GPUs should bring home, the most important
first, within a given time.

``python -m commfuse.bench.gpu_session --out DIR --until TIME``. DIR then holds the rows of all ops
(``rows.jsonl``), the table of ``commfuse tune`` that they were measured with (``tune-GPU.json``),
medians (``summary.txt``), plots (``plots.zip``), and what the commands said (``log.txt``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from commfuse.bench import plot
from commfuse.bench.table import print_summary, read_rows
from commfuse.errors import UsageError
from commfuse.runtime.launch import own_command

# Seconds that a part may take, by op, for one number of ranks, the start of its ranks included. The
# first ones count most.
MAIN = {"matmul_all_reduce": 60, "all_reduce": 30, "all_reduce_rms_norm": 20, "verify_chain": 40}
OTHERS = {
    "matmul": 30,
    "reduce_scatter": 20,
    "all_gather": 20,
    "vocab_parallel_sample": 30,
    "vocab_parallel_argmax": 20,
}
TUNE_SECONDS = 30  # for each number of ranks
FEW_RANKS = 4  # more than these on a GPU measure mostly each other
CLOSING_SECONDS = 25  # to end a part that takes too long, and for tables and plots
GRACE_SECONDS = 10
ROWS, LOG, SUMMARY, PLOTS = "rows.jsonl", "log.txt", "summary.txt", "plots.zip"


@dataclass(frozen=True)
class Part:
    """One command of a session.

    Attributes:
        name: for people.
        command: the program and its arguments.
        seconds: after which it is stopped.
        prints_rows: its standard output is kept; else shown.
    """

    name: str
    command: Sequence[str]
    seconds: float
    prints_rows: bool = True


def parts_of(
    ranks: Sequence[int], ops: Sequence[str] | None = None, arguments: Sequence[str] = ()
) -> list[Part]:
    """The parts of a session, the most important first.

    Args:
        ranks: numbers of ranks.
        ops: what to measure; None: all that is measured on GPUs.
        arguments: more, for each ``commfuse bench``.

    Raises:
        UsageError: an op that is not measured on GPUs.

    Example:
        >>> [part.name for part in parts_of([2], ["all_reduce"])]
        ['tune', 'all_reduce, 2 ranks']
    """
    seconds = MAIN | OTHERS
    if unknown := [op for op in ops or () if op not in seconds]:
        raise UsageError(f"--ops {' '.join(unknown)}: use {', '.join(seconds)}")
    counts = ",".join(map(str, ranks))
    tune = own_command("tune", "--ranks", counts)
    cells = [
        (op, count)
        for op in seconds
        if ops is None or op in ops
        for count in (ranks if op != "matmul" else [1])
    ]
    # The sort is stable: within these classes, ops in their order, and ranks as they were given.
    cells.sort(key=lambda cell: (cell[0] not in MAIN, cell[1] > FEW_RANKS))
    return [Part("tune", tune, TUNE_SECONDS * len(ranks), prints_rows=False)] + [
        Part(
            f"{op}, {count} rank{'s' * (count > 1)}",
            own_command(
                "bench", op, "--device", "cuda", "--ranks", str(count), "--json", *arguments
            ),
            seconds[op],
        )
        for op, count in cells
    ]


def run(parts: Iterable[Part], folder: Path, until: float) -> bool:
    """Runs parts one after the other, as far as their time lasts, and says what became of each.

    A part begins only if all of its time is left, so that none is stopped for the sake of the clock
    of another. Those that come after one that is left out may be short enough.

    Args:
        folder: where everything goes; made where it is missing. What an earlier session left there
            is replaced.
        until: seconds since 1970.

    Returns:
        Whether all that have begun have ended well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, LOG, SUMMARY, PLOTS, "tune-*.json"):
        for path in folder.glob(name):
            path.unlink()
    good = True
    for part in parts:
        begin = time.time()
        if until - CLOSING_SECONDS - begin < part.seconds:
            print(f"{part.name}: left out, it may take {part.seconds} s", flush=True)
            continue
        problem = _run_part(part, folder)
        good &= problem is None
        took = f"{time.time() - begin:.0f} of {part.seconds} s"
        print(f"{part.name}: {took}{f', {problem}: see {LOG}' if problem else ''}", flush=True)
    _conclude(folder)
    return good


def _run_part(part: Part, folder: Path) -> str | None:
    """What went wrong, or None."""
    environment = {**os.environ, "COMMFUSE_CACHE": str(folder.resolve())}
    with open(folder / ROWS, "ab") as rows, open(folder / LOG, "ab") as log:
        log.write(f"== {part.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            part.command,
            stdout=rows if part.prints_rows else None,
            stderr=log,
            env=environment,
            # A shell that runs this in the background has it ignored.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)  # it then stops its ranks, and MPS
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            process.kill()
            process.wait()
    _drop_unfinished_line(folder / ROWS)
    if status is None:
        return "stopped"
    return f"failed with status {status}" if status else None


def _drop_unfinished_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _conclude(folder: Path) -> None:
    """Tables and plots of the rows that there are."""
    rows = read_rows([folder / ROWS]) if (folder / ROWS).exists() else []
    if not rows:
        print("no rows", flush=True)
        return
    with open(folder / SUMMARY, "w") as file, contextlib.redirect_stdout(file):
        print_summary(rows)
    print((folder / SUMMARY).read_text())
    with tempfile.TemporaryDirectory() as plots:
        try:
            plot.draw(rows, Path(plots))
        except UsageError as error:
            print(f"no plots: {error}", flush=True)
        else:
            shutil.make_archive(str((folder / PLOTS).with_suffix("")), "zip", plots)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m commfuse.bench.gpu_session", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument(
        "--until", type=float, required=True, help="when it must have ended: seconds since 1970"
    )
    parser.add_argument("--ranks", default="2,4,8", help="numbers of ranks (2,4,8)")
    parser.add_argument("--ops", nargs="*", help="what to measure (everything)")
    parser.add_argument("more", nargs="*", help="behind --: more arguments for commfuse bench")
    given = parser.parse_args(arguments)
    try:
        ranks = [int(count) for count in given.ranks.split(",")]
    except ValueError:
        parser.error(f"--ranks {given.ranks}: numbers, as in 2,4,8")
    try:
        parts = parts_of(ranks, given.ops or None, given.more)
    except UsageError as error:
        parser.error(str(error))
    return 0 if run(parts, given.out, given.until) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

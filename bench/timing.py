"""Times calls on several ranks at once: the slowest rank counts, and backends take turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from commfuse.runtime.communicator import Communicator

SECONDS = 1.0  # of calls, for each cell
FEWEST, MOST = 50, 20_000  # calls of a cell, where their number is not given
ROUNDS = 10  # in every round each cell has its turn: a drift of the machine hits all alike


@dataclass(frozen=True)
class Cell:
    """One thing to time.

    Attributes:
        name: backend or peer.
        calls: made in turn, each on inputs in memory of its own.
    """

    name: str
    calls: Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Times:
    """The slowest rank's times of a cell's calls, microseconds."""

    iterations: int
    p20_us: float
    p50_us: float
    p80_us: float


def gather(value: Any, comm: Communicator) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if comm.world_size == 1:
        return [value]
    values: list[Any] = [None] * comm.world_size
    dist.all_gather_object(values, value, group=comm.group)
    return values


def _time(cell: Cell, comm: Communicator, first: int, count: int) -> list[int]:
    """Nanoseconds of ``count`` calls, each begun when all ranks have come to it."""
    calls, times = cell.calls, []
    for index in range(first, first + count):
        call = calls[index % len(calls)]
        comm.barrier()
        begin = time.perf_counter_ns()
        result = call()
        times.append(time.perf_counter_ns() - begin)
        del result
    return times


def _calls_per_round(cell: Cell, comm: Communicator, iterations: int | None) -> int:
    """How many calls, agreed on by all ranks; runs each call once, which also warms it up."""
    first = _time(cell, comm, 0, max(len(cell.calls), 3))
    if iterations is None:
        slowest = max(gather(float(np.median(first)), comm))
        iterations = int(min(max(SECONDS * 1e9 / slowest, FEWEST), MOST))
    return -(-iterations // ROUNDS)


def measure(
    cells: Sequence[Cell],
    comm: Communicator,
    iterations: int | None = None,
    interleaved: bool = False,
) -> dict[str, Times]:
    """Times cells side by side; every rank calls with the same cells.

    Args:
        cells: what to time.
        comm: its barrier precedes every call.
        iterations: calls of each cell, rounded up to a multiple of the rounds; None: about a
            second's worth.
        interleaved: cells take turns call by call, with equally many calls. For cells that start
            cold in any case: a drift of the memory's speed then hits all of them alike, and small
            differences between them show.

    Returns:
        By cell name, from each call's slowest rank.

    Example:
        >>> measure([Cell("cpu", [lambda: ops.all_reduce(x, comm)])], comm)["cpu"].p50_us
        3.1
    """
    rounds, counts = ROUNDS, [_calls_per_round(cell, comm, iterations) for cell in cells]
    if interleaved:
        rounds, counts = ROUNDS * min(counts), [1] * len(cells)
    times: list[list[int]] = [[] for _ in cells]
    order = np.random.default_rng(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            # In another order each time: what a cell leaves in the caches must not always meet the
            # same successor. Every rank draws the same orders.
            for number in order.permutation(len(cells)):
                cell, taken = cells[number], times[number]
                # Cells may share their inputs: none may find what the one before has just read.
                first = len(taken) + number * len(cell.calls) // len(cells)
                taken += _time(cell, comm, first, counts[number])
    finally:
        gc.enable()
    result = {}
    for cell, taken in zip(cells, times, strict=True):
        slowest = np.max(np.array(gather(taken, comm)), axis=0) / 1e3
        result[cell.name] = Times(len(taken), *np.percentile(slowest, (20, 50, 80)).tolist())
    return result

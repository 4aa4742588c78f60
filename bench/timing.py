"""Times calls on several ranks at once: the slowest rank counts, and backends take turns.

On the CPU each call is timed by itself. On a GPU, where the time of a launch would hide that of the
kernel, many calls are captured in a CUDA graph, and its replays are timed by the GPU; or as many
are launched from Python one after the other (eager), where the launches are what is asked for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from commfuse.runtime.communicator import Communicator

SECONDS = 1.0  # of calls, for each cell, where it is not said
FEWEST, MOST = 50, 20_000  # calls of a cell, where their number is not given
ROUNDS = 10  # in every round each cell has its turn: a drift of the machine hits all alike

REPLAYS = 20  # of a cell's graph, where their number is not given
REPLAY_US = 2000  # about what a replay takes: ranks do not begin at the same time, to some 10 us
FEWEST_CAPTURED, MOST_CAPTURED = 8, 1000  # calls
# The GPU waits as long before a replay, which the host launches meanwhile: about 200 us on an H100.
LEAD_CYCLES = 350_000


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
    """The slowest rank's times of a cell's calls, microseconds.

    Attributes:
        iterations: how often was timed.
        calls: made each time; times are by call.
        samples_us: each time, in order, float64[iterations].
    """

    iterations: int
    calls: int
    p20_us: float
    p50_us: float
    p80_us: float
    samples_us: np.ndarray = field(repr=False, compare=False)

    @classmethod
    def of(cls, samples_us: np.ndarray, calls: int) -> Times:
        """The percentiles of times by call."""
        p20, p50, p80 = np.percentile(samples_us, (20, 50, 80)).tolist()
        return cls(len(samples_us), calls, p20, p50, p80, samples_us)

    def longer_us(self, other: Times) -> float:
        """By how much a call takes longer than another cell's: the median over the rounds.

        Two cells that take turns see the same machine in a round. What its speed does from round to
        round falls out of their differences, but not out of the difference of their medians.

        Raises:
            ValueError: the cells did not take turns: they have different numbers of times.

        Example:
            >>> slow = Times.of(np.array([3.0, 30.0, 12.0]), 1)
            >>> slow.longer_us(Times.of(np.array([2.0, 29.0, 10.0]), 1))
            1.0
        """
        if self.iterations != other.iterations:
            raise ValueError(f"{self.iterations} and {other.iterations} times cannot be paired")
        return float(np.median(self.samples_us - other.samples_us))


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


def _calls_per_round(cell: Cell, comm: Communicator, iterations: int | None, seconds: float) -> int:
    """How many calls, agreed on by all ranks; runs each call once, which also warms it up."""
    first = _time(cell, comm, 0, max(len(cell.calls), 3))
    if iterations is None:
        slowest = max(gather(float(np.median(first)), comm))
        iterations = int(min(max(seconds * 1e9 / slowest, FEWEST), MOST))
    return -(-iterations // ROUNDS)


def measure(
    cells: Sequence[Cell],
    comm: Communicator,
    iterations: int | None = None,
    interleaved: bool = False,
    seconds: float = SECONDS,
    eager: bool = False,
) -> dict[str, Times]:
    """Times cells side by side; every rank calls with the same cells.

    Args:
        cells: what to time. On a GPU, calls must have been made once, so that nothing is compiled
            or reserved while they are captured, and the current stream must be the one on which
            they are made, and not the default one, which cannot be captured.
        comm: its barrier precedes everything that is timed; its device says how that is done.
        iterations: on the CPU calls of each cell, rounded up to a multiple of the rounds; None:
            as many as ``seconds`` hold. On a GPU replays of each cell; None: 20.
        interleaved: on the CPU: cells take turns call by call, with equally many calls. For cells
            that start cold in any case: a drift of the memory's speed then hits all of them alike,
            and small differences between them show, by :meth:`Times.longer_us`. On a GPU replays
            always do.
        seconds: on the CPU the time that each cell's calls take, the slowest cell's where they are
            interleaved. A difference of a few per cent takes hundreds of rounds to show.
        eager: on a GPU: launched from Python, not from a graph.

    Returns:
        By cell name, from each call's slowest rank.

    Raises:
        CommunicatorError: a call failed.

    Example:
        >>> measure([Cell("cpu", [lambda: ops.all_reduce(x, comm)])], comm)["cpu"].p50_us
        3.1
    """
    gc.collect()
    gc.disable()
    try:
        if comm.device.type == "cuda":
            times, calls = _replays(cells, comm, iterations or REPLAYS, eager)
        else:
            times, calls = _turns(cells, comm, iterations, interleaved, seconds), [1] * len(cells)
    finally:
        gc.enable()
    result = {}
    for cell, taken, count in zip(cells, times, calls, strict=True):
        slowest = np.max(np.array(gather(taken, comm)), axis=0) / 1e3 / count
        result[cell.name] = Times.of(slowest, count)
    return result


def _turns(
    cells: Sequence[Cell],
    comm: Communicator,
    iterations: int | None,
    interleaved: bool,
    seconds: float,
) -> list[list[int]]:
    """Nanoseconds of every call of every cell on the CPU."""
    rounds, counts = ROUNDS, [_calls_per_round(cell, comm, iterations, seconds) for cell in cells]
    if interleaved:
        rounds, counts = ROUNDS * min(counts), [1] * len(cells)
    times: list[list[int]] = [[] for _ in cells]
    order = np.random.default_rng(0)
    for _ in range(rounds):
        # In another order each time: what a cell leaves in the caches must not always meet the
        # same successor. Every rank draws the same orders.
        for number in order.permutation(len(cells)):
            cell, taken = cells[number], times[number]
            # Cells may share their inputs: none may find what the one before has just read.
            first = len(taken) + number * len(cell.calls) // len(cells)
            taken += _time(cell, comm, first, counts[number])
    return times


class _Graph:
    """Calls of a cell, captured in a CUDA graph."""

    def __init__(self, cell: Cell, calls: int):
        self.calls = calls
        self.graph = torch.cuda.CUDAGraph()
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for index in range(calls):
                cell.calls[index % len(cell.calls)]()

    def replay(self, comm: Communicator) -> float:
        """Nanoseconds of a replay that all ranks begin together."""
        torch.cuda.synchronize()
        comm.barrier()
        torch.cuda._sleep(LEAD_CYCLES)
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e6


class _Eager:
    """As many calls of a cell, launched from Python."""

    def __init__(self, cell: Cell, calls: int):
        self.cell, self.calls = cell, calls

    def replay(self, comm: Communicator) -> float:
        """Nanoseconds on the host, from the first launch until the GPU is done."""
        calls = self.cell.calls
        torch.cuda.synchronize()
        comm.barrier()
        begin = time.perf_counter_ns()
        for index in range(self.calls):
            calls[index % len(calls)]()
        torch.cuda.synchronize()
        return time.perf_counter_ns() - begin


def _repeated(cell: Cell, comm: Communicator, eager: bool) -> _Graph | _Eager:
    """Calls that take about REPLAY_US, and among which each one comes up."""
    kind = _Eager if eager else _Graph
    trial = kind(cell, max(FEWEST_CAPTURED, len(cell.calls)))
    trial.replay(comm)  # the first replay also loads a graph
    slowest_us = max(gather(trial.replay(comm), comm)) / 1e3 / trial.calls
    wanted = min(int(REPLAY_US / slowest_us), MOST_CAPTURED)
    return kind(cell, wanted) if wanted > trial.calls else trial


def _replays(
    cells: Sequence[Cell], comm: Communicator, replays: int, eager: bool
) -> tuple[list[list[float]], list[int]]:
    """Nanoseconds of every replay of every cell, and how many calls a cell's replay makes."""
    graphs = [_repeated(cell, comm, eager) for cell in cells]
    for graph in graphs:
        graph.replay(comm)
    times: list[list[float]] = [[] for _ in cells]
    order = np.random.default_rng(0)
    for _ in range(replays):
        for number in order.permutation(len(cells)):  # the same on every rank
            times[number].append(graphs[number].replay(comm))
    comm.check()  # calls of a communicator that has failed return at once
    return times, [graph.calls for graph in graphs]

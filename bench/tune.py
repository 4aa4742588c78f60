"""``commfuse tune``: measures on these GPUs from where on another way of doing a call is faster."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.bench.provenance import gpu_provenance, provenance
from commfuse.bench.timing import Cell, measure
from commfuse.errors import BackendUnavailable
from commfuse.runtime import launch, tuning
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import Case
from commfuse.testing.gpu_cases import HIDDEN, K_TOTALS

MESSAGES = tuple(1 << exponent for exponent in range(10, 25))  # 1 KB to 16 MB
ROWS = (1, 8, 16, 32, 48, 64)
REPLAYS = 10
# The thresholds that force each way of an all-reduce, and the largest message it is tried with:
# flags among the data double what is sent, and one shot sends it to everybody.
EVERYTHING = 1 << 40
WAYS = {
    "one_shot": ((EVERYTHING, EVERYTHING), 1 << 20),
    "lines": ((0, EVERYTHING), 4 << 20),
    "bulk": ((0, 0), MESSAGES[-1]),
}
# Likewise, the rows that are fused.
FUSED = {"fused": (1, ROWS[-1]), "unfused": (1, 0)}
# Per cent of a GEMM's tiles that are claimed, tried on layers of these rows.
CLAIMED = (0, 20, 40)
CLAIMED_ROWS = (1, 16, 64)


def run_rank() -> None:
    """Measures on this rank and its peers; rank 0 writes the user's table and says what it holds.

    Raises:
        BackendUnavailable: our CUDA kernels cannot run here.
        CommfuseError: a call failed.
    """
    launch.join_job()
    device = launch.use_gpu()
    name = torch.cuda.get_device_name(device)
    try:
        with (
            torch.inference_mode(),
            torch.cuda.stream(torch.cuda.Stream()),
            Communicator(dist.group.WORLD, device=device) as comm,
        ):
            if not comm.serves_gpu:
                raise BackendUnavailable(f"nothing to tune: {comm.transport_reason}")
            messages = measure_messages(comm)
            one_shot, lines = thresholds(messages)
            comm._native.set_all_reduce_thresholds(one_shot, lines)
            claims = measure_claims(comm)
            percent = claimed_percent(claims)
            comm._native.set_claimed_percent(percent)
            fused = measure_fused(comm)
            table = tuning.Table(one_shot, lines, *fused_rows(fused), percent)
            origin = {"setting": gpu_provenance(comm)["setting"], **_origin()}
            if comm.rank == 0:
                path = tuning.save(name, {comm.world_size: table}, origin)
                _say(name, origin["setting"], messages, claims, fused, table)
                print(f"{comm.world_size} ranks: written to {path}", flush=True)
    finally:
        dist.destroy_process_group()


def _origin() -> dict[str, object]:
    found = provenance()
    return {key: found[key] for key in ("date_utc", "commfuse", "git_commit", "torch")}


def measure_messages(comm: Communicator) -> dict[str, dict[int, float]]:
    """Microseconds of an all-reduce, by way and by bytes."""
    native, times = comm._native, {way: {} for way in WAYS}
    for nbytes in MESSAGES:
        x = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device=str(comm.device))
        cells = []
        for way, (forced, most) in WAYS.items():
            if nbytes > most:
                continue

            def call(x=x, forced=forced):
                native.set_all_reduce_thresholds(*forced)
                return ops.all_reduce(x, comm, "cuda")

            call()
            cells.append(Cell(way, [call]))
        for way, time in measure(cells, comm, REPLAYS).items():
            times[way][nbytes] = time.p50_us
    return times


def _measure_layer(
    comm: Communicator, rows: int, k_total: int, ways: Mapping[str, Callable[[], None]]
) -> dict[str, float]:
    """Microseconds of a row-parallel layer with its tail, by way; each is chosen by a call."""
    dimensions = (("m", rows), ("k", k_total // comm.world_size), ("n", HIDDEN))
    case = Case("matmul_all_reduce", dimensions, ("residual", "norm"))
    adapter = adapter_of(case, torch.bfloat16, comm.world_size, str(comm.device))
    mine = adapter.inputs()[comm.rank]
    cache = torch.cuda.get_device_properties(comm.device).L2_cache_size
    copies = [
        adapter.duplicate(mine, "cuda") for _ in range(4 * cache // adapter.streamed_bytes() + 1)
    ]
    cells = []
    for way, choose in ways.items():

        def call(inputs=mine, choose=choose):
            choose()
            return adapter.call(inputs, comm, "cuda")

        call()
        cells.append(Cell(way, [functools.partial(call, inputs) for inputs in copies]))
    return {way: time.p50_us for way, time in measure(cells, comm, REPLAYS).items()}


def measure_claims(comm: Communicator) -> dict[int, dict[tuple[int, int], float]]:
    """Microseconds of row-parallel layers that are not fused, by the percentage of tiles that is
    claimed, and by K of all ranks and rows; with the thresholds that the communicator has.
    """
    native, times = comm._native, {percent: {} for percent in CLAIMED}
    native.set_fused_rows(*FUSED["unfused"])
    ways = {str(p): functools.partial(native.set_claimed_percent, p) for p in CLAIMED}
    for k_total, rows in itertools.product(K_TOTALS, CLAIMED_ROWS):
        for way, time in _measure_layer(comm, rows, k_total, ways).items():
            times[int(way)][k_total, rows] = time
    return times


def measure_fused(comm: Communicator) -> dict[str, dict[int, float]]:
    """Microseconds of a row-parallel layer, fused or not, by rows; with the thresholds and claims
    that the communicator has.
    """
    times = {way: {} for way in FUSED}
    ways = {w: functools.partial(comm._native.set_fused_rows, *span) for w, span in FUSED.items()}
    for rows in ROWS:
        for way, time in _measure_layer(comm, rows, HIDDEN, ways).items():
            times[way][rows] = time
    return times


def thresholds(times: Mapping[str, Mapping[int, float]]) -> tuple[int, int]:
    """(one_shot_bytes, lines_bytes) that lose least against the fastest way of every size.

    A loss counts by its ratio; between equal ones the smaller thresholds win.

    Args:
        times: microseconds by way and bytes; a way that is missing at a size cannot be used there.
    """
    sizes = sorted(times["bulk"])
    best = {size: min(ways[size] for ways in times.values() if size in ways) for size in sizes}

    def loss(pair: tuple[int, int]) -> float:
        total = 0.0
        for size in sizes:
            way = "one_shot" if size <= pair[0] else "lines" if size <= pair[1] else "bulk"
            if size not in times[way]:
                return float("inf")
            total += np.log(times[way][size] / best[size])
        return total

    candidates = [0, *sizes]
    pairs = [(a, b) for a, b in itertools.product(candidates, candidates) if a <= b]
    return min(pairs, key=loss)


def claimed_percent(times: Mapping[int, Mapping[tuple[int, int], float]]) -> int:
    """The percentage of tiles to claim that loses least against the fastest of every layer.

    A loss counts by its ratio; between equal ones the smallest wins.

    Args:
        times: microseconds by percentage and layer.
    """
    # The fastest of every layer is the same for all: what is left is the product of the times.
    return min(sorted(times), key=lambda percent: np.log([*times[percent].values()]).sum())


def fused_rows(times: Mapping[str, Mapping[int, float]]) -> tuple[int, int]:
    """(fewest, most) rows to fuse, so that least is lost against the faster way of every size.

    Between equal ones the narrower range wins; (1, 0): never.
    """
    rows = sorted(times["fused"])

    def loss(span: tuple[int, int]) -> float:
        total = 0.0
        for m in rows:
            way = "fused" if span[0] <= m <= span[1] else "unfused"
            total += np.log(times[way][m] / min(t[m] for t in times.values()))
        return total

    spans = [(a, b) for a, b in itertools.product(rows, rows) if a <= b]
    return min([(1, 0), *sorted(spans, key=lambda span: span[1] - span[0])], key=loss)


def _say(
    name: str,
    setting: str,
    messages: Mapping[str, Mapping[int, float]],
    claims: Mapping[int, Mapping[tuple[int, int], float]],
    fused: Mapping[str, Mapping[int, float]],
    table: tuning.Table,
) -> None:
    print(f"{name}, {setting}; median us per call, slowest rank")
    _print_lines("all_reduce, KB", messages, [f"{size >> 10}" for size in MESSAGES])
    shares = {f"{percent}% claimed": by_layer for percent, by_layer in claims.items()}
    layers = [f"{k}/{rows}" for k, rows in claims[0]]
    _print_lines("GEMM, K/rows", shares, layers)
    _print_lines("matmul_all_reduce, rows", fused, [str(rows) for rows in ROWS])
    fused_or_not = (
        f"fused from {table.fused_from_rows} to {table.fused_to_rows} rows"
        if table.fused_from_rows <= table.fused_to_rows
        else "never fused"
    )
    print(
        f"one shot to {table.one_shot_bytes >> 10} KB, flags among the data to "
        f"{table.lines_bytes >> 10} KB, {fused_or_not}, {table.claimed_percent}% of a GEMM claimed"
    )


def _print_lines(
    title: str, times: Mapping[str, Mapping[int, float]], heads: Sequence[str]
) -> None:
    print(f"{title:>24}" + "".join(f"{head:>9}" for head in heads))
    for way, by_size in times.items():
        cells = [f"{time:9.1f}" for time in by_size.values()]
        print(f"{way:>24}" + "".join(cells))
    sys.stdout.flush()

"""One runner for all ops: checks every backend's results, then times all backends side by side."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from commfuse import _extension
from commfuse.bench.peers import Peer
from commfuse.bench.provenance import gpu_provenance, last_level_cache_bytes, provenance
from commfuse.bench.selection import (
    AUTO,
    Options,
    cases,
    chosen,
    explain,
    left_out,
    peers_of,
)
from commfuse.bench.table import show_rows
from commfuse.bench.timing import SECONDS, Cell, Times, gather, measure
from commfuse.errors import BackendUnavailable, CommfuseError
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapter import Adapter, Inputs, Outputs
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import Case
from commfuse.testing.numerics import complaint, digest

# Weights (and KV caches) rotate over copies that together exceed any cache that could hold them.
ROTATED_BYTES = 64 << 20
READ_BYTES, READ_SLICE = 256 << 20, 32 << 20
# Of each cell's calls, where differences of a few per cent between cells make `exposed`.
EXPOSED_SECONDS = 4.0
_READ = "read"
_HAND_OVER, _DISPATCH = "hand over", "dispatch"
_GEMM, _UNFUSED = "gemm", "gemm+all_reduce"


def run_rank(every: Sequence[Options]) -> None:
    """Runs a benchmark on this rank; rank 0 prints the rows.

    Args:
        every: as :func:`check_options`.

    Raises:
        UsageError: a backend that was asked for cannot run here; the message says why.
        CommfuseError: a result is wrong.
    """
    options = every[0]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.world_size))
    if launch.started_by_launcher():
        launch.join_job()
    group = dist.group.WORLD if dist.is_initialized() else None
    device, stream = None, contextlib.nullcontext()
    if options.device == "cuda":
        device = launch.use_gpu()
        stream = torch.cuda.stream(torch.cuda.Stream())  # for all calls: see measure()
    try:
        with (
            torch.inference_mode(),
            stream,
            Communicator(group, device=device, link=options.link) as comm,
        ):
            for one in every:
                if cases(one) and chosen(one, comm) and comm.rank == 0:
                    for text in left_out(one, comm):
                        print(text, file=sys.stderr, flush=True)
                rows = (row for case in cases(one) for row in measure_case(case, one, comm))
                show_rows(rows, one.as_json, quiet=comm.rank != 0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Truth:
    """What the ranks of one case should get, computed once for all backends."""

    def __init__(self, adapter: Adapter, rank: int):
        self.adapter, self.rank = adapter, rank
        self.inputs = adapter.inputs()
        self.expected = [
            adapter.share(results, rank)
            for results in (adapter.composition(self.inputs), adapter.reference(self.inputs))
        ]
        if adapter.exact:
            self.integers = adapter.inputs(integers=True)
            self.exact = adapter.share(adapter.reference(self.integers), rank)[0]

    @property
    def mine(self) -> Inputs:
        return self.inputs[self.rank]


def measure_case(case: Case, options: Options, comm: Communicator) -> list[dict]:
    """The rows of one case, the same on every rank.

    Raises:
        UsageError, CommfuseError: as :func:`run_rank`.
    """
    dtype = getattr(torch, options.dtype)
    names = chosen(options, comm)
    if not names:
        return []  # asked for was what only another op of the set has
    adapter = adapter_of(case, dtype, comm.world_size, str(comm.device))
    truth = _Truth(adapter, comm.rank)
    peers = {peer.name: peer for peer in peers_of(case.op, options.device)}
    copies: dict[str, list[Inputs]] = {}  # by layout
    cells, problems = [], []
    for name in names:
        peer = peers.get(name)
        layout = _layout(name, peer, options, comm, dtype)
        prepare = _preparation(adapter, layout, peer, comm)
        key = name if peer and peer.prepare else layout
        if key not in copies:
            copies[key] = [prepare(truth.mine) for _ in range(_copies(adapter, comm))]
        run = _caller(adapter, name, peer, comm)
        outputs, refusal = _first_call(run, copies[key][0], comm)
        if refusal is not None:
            if comm.rank == 0:
                print(f"{case.op} {case}: {name} left out: {refusal}", file=sys.stderr, flush=True)
            continue
        problems += _problems(name, peer, outputs, run, prepare, truth, comm)
        cells.append(Cell(name, [lambda i=i, run=run: run(i) for i in copies[key]]))
    if problems:
        raise CommfuseError(f"{case.op} {case} {options.dtype}: " + "; ".join(problems))
    del truth
    streams = options.device == "cpu" and adapter.streamed_bytes() > 0
    if streams := streams and _extension.module is not None:
        cells.append(_read_cell())
    exposes = {_GEMM, _UNFUSED} <= {cell.name for cell in cells}
    seconds = EXPOSED_SECONDS if exposes else SECONDS
    with Communicator(None) as alone:
        if adapter.one_message and "cpu" in copies and comm.world_size == 2:
            cells += _floor_cells(adapter, copies["cpu"][0], comm, alone)
        times = measure(
            cells, comm, options.iterations, interleaved=streams, seconds=seconds,
            eager=options.launch == "eager",
        )  # fmt: skip
    read_gb_per_s = READ_SLICE / times[_READ].p50_us / 1e3 if streams else None
    return [
        _row(adapter, options, comm, times, cell.name, len(cell.calls), read_gb_per_s)
        for cell in cells
        if cell.name not in (_READ, _HAND_OVER, _DISPATCH)
    ]


def _layout(
    name: str, peer: Peer | None, options: Options, comm: Communicator, dtype: torch.dtype
) -> str:
    """The backend whose prepared inputs a cell takes; on a GPU all take the same."""
    if options.device == "cuda":
        return "cuda"
    if peer is not None:
        return peer.layout
    return explain(options, comm, dtype).backend if name == AUTO else name


def _copies(adapter: Adapter, comm: Communicator) -> int:
    """How many copies of the inputs it takes to have weights come from memory."""
    streamed = adapter.streamed_bytes()
    if comm.device.type == "cuda":
        wanted = 4 * torch.cuda.get_device_properties(comm.device).L2_cache_size
    else:
        wanted = max(ROTATED_BYTES, 2 * last_level_cache_bytes())
    return wanted // streamed + 1 if streamed else 1


def _preparation(
    adapter: Adapter, layout: str, peer: Peer | None, comm: Communicator
) -> Callable[[Inputs], Inputs]:
    if peer is not None and peer.prepare is not None:
        return lambda inputs: peer.prepare(adapter, inputs, comm)
    return lambda inputs: adapter.duplicate(inputs, layout)


def _caller(
    adapter: Adapter, name: str, peer: Peer | None, comm: Communicator
) -> Callable[[Inputs], Outputs]:
    if peer is not None:
        return lambda inputs: peer.call(inputs, comm)
    return lambda inputs: adapter.call(inputs, comm, name)


def _first_call(
    run: Callable[[Inputs], Outputs], prepared: Inputs, comm: Communicator
) -> tuple[Outputs, str | None]:
    """(outputs, None), or why a backend that serves the op does not serve this size.

    Raises:
        CommfuseError: only some ranks refuse.
    """
    outputs: Outputs = ()
    mine = None
    try:
        outputs = run(prepared)
        comm.check()
    except BackendUnavailable as error:
        mine = str(error)
    reasons = gather(mine, comm)
    if None in reasons and any(reasons):
        raise CommfuseError(f"some ranks refuse what others do: {reasons}")
    return outputs, mine


def _problems(
    name: str,
    peer: Peer | None,
    outputs: Outputs,
    run: Callable[[Inputs], Outputs],
    prepare: Callable[[Inputs], Inputs],
    truth: _Truth,
    comm: Communicator,
) -> list[str]:
    """What is wrong with a backend's results, on any rank; the same list on every rank."""
    adapter = truth.adapter
    mine: list[str | None] = []
    if peer is not None and peer.check is not None:
        mine.append(peer.check(truth.inputs, comm.rank, outputs))
    else:
        mine += [complaint(*tensors) for tensors in zip(outputs, *truth.expected, strict=True)]
        if not adapter.scattered and len(set(gather(digest(*outputs), comm))) > 1:
            mine.append("the ranks' results differ")
        if adapter.exact:
            (exact,) = run(prepare(truth.integers[comm.rank]))
            if not torch.equal(exact.double(), truth.exact):
                mine.append("sums of small integers are not exact")
    found = gather([problem for problem in mine if problem], comm)
    return [f"{name}, rank {rank}: {problem}" for rank, all in enumerate(found) for problem in all]


def _read_cell() -> Cell:
    """Reads memory and does nothing else, on all ranks at once: the most that streaming can reach.

    The buffer is of the same kind of pages as packed weights.
    """
    native = _extension.require()
    buffer = native.huge_empty(READ_BYTES).zero_()
    slices = buffer.split(READ_SLICE)
    return Cell(_READ, [lambda s=s: native.read_memory(s) for s in slices])


def _floor_cells(
    adapter: Adapter, inputs: Inputs, comm: Communicator, alone: Communicator
) -> list[Cell]:
    """What an op over shared memory cannot do without: its messages, and a call from Python.

    With more ranks than two, an op may do with fewer bytes than every message to every peer.
    """
    sent, most = adapter.message_bytes(), comm.payload_bytes
    parts = [min(most, sent - begin) for begin in range(0, sent, most)] or [0]

    def hand_over() -> None:
        for part in parts:
            comm.hand_over(part)

    empty = adapter.without_rows(inputs)
    return [
        Cell(_HAND_OVER, [hand_over]),
        Cell(_DISPATCH, [lambda: adapter.call(empty, alone, "cpu")]),
    ]


def _floor(
    times: Mapping[str, Times], name: str, streamed: int, read_gb_per_s: float | None
) -> dict[str, float | None]:
    """The fields of a row on the CPU that say what the machine needs."""
    if _HAND_OVER not in times or name not in ("cpu", AUTO):
        return {"floor_us": None, "dispatch_us": None}
    stream_us = streamed / read_gb_per_s / 1e3 if read_gb_per_s else 0.0
    return {
        "floor_us": round(stream_us + times[_HAND_OVER].p50_us, 3),
        "dispatch_us": round(times[_DISPATCH].p50_us, 3),
    }


def visible(
    times: Mapping[str, Times], name: str, gemm: str, unfused: Sequence[str]
) -> float | None:
    """How much of the communication stays visible in a fused op.

    Args:
        times: of one case.
        name: the fused op's cell.
        gemm: the GEMM alone.
        unfused: the GEMM, then an all-reduce; the fastest of these counts.

    Returns:
        (fused - gemm) / (unfused - gemm), both the medians over the rounds of what a call takes
        longer (:meth:`commfuse.bench.timing.Times.longer_us`); None where a cell is missing, or the
        all-reduce costs nothing.
    """
    if gemm not in times:
        return None
    alone = times[gemm]
    communication = [times[other].longer_us(alone) for other in unfused if other in times]
    if not communication or min(communication) <= 0:
        return None
    return times[name].longer_us(alone) / min(communication)


def _exposed(times: Mapping[str, Times], name: str, options: Options) -> dict[str, float | None]:
    """The fields of a row that say how much communication stays visible."""
    own = _GEMM, [_UNFUSED]
    if options.device == "cpu":
        return {"exposed": visible(times, name, *own) if name in ("cpu", AUTO) else None}
    if name not in (AUTO, "cuda", "triton"):
        return {"exposed": None, "exposed_own": None}
    return {
        "exposed": visible(times, name, "cublas", ["cublas+one_shot", "cublas+two_shot"]),
        "exposed_own": visible(times, name, *own),
    }


def _row(
    adapter: Adapter,
    options: Options,
    comm: Communicator,
    times: Mapping[str, Times],
    name: str,
    copies: int,
    read_gb_per_s: float | None,
) -> dict:
    """One row of results; ``bench/README.md`` says what its fields mean."""
    time, case, streamed = times[name], adapter.case, adapter.streamed_bytes()
    peers = {peer.name: peer for peer in peers_of(case.op, options.device)}
    partial = name in peers and peers[name].partial
    by_torch = [p.name for p in peers.values() if p.baseline] if options.device == "cpu" else []
    torch_time = min(
        (times[n] for n in by_torch if n in times), key=lambda t: t.p50_us, default=None
    )
    torch_time = torch_time or times.get("torch")
    streamed_gb_per_s = fraction = None
    if streamed and case["m"] == 1 and (read_gb_per_s or options.device == "cuda"):
        streamed_gb_per_s = streamed / time.p50_us / 1e3
        fraction = streamed_gb_per_s / read_gb_per_s if read_gb_per_s else None
    row = {
        "op": case.op,
        "backend": name,
        "device": options.device,
        "gpus": 0,
        "ranks": comm.world_size,
        "emulated": comm.link.name if comm.link else False,
        "dtype": options.dtype,
        "shape": case.shape,
        "bytes": adapter.message_bytes(),
        "p20_us": round(time.p20_us, 3),
        "p50_us": round(time.p50_us, 3),
        "p80_us": round(time.p80_us, 3),
        **_exposed(times, name, options),
        "times_faster_than_torch": (
            torch_time.p50_us / time.p50_us if torch_time and not partial else None
        ),
        "streamed_bytes": streamed,
        "rotated_bytes": copies * streamed,
        "streamed_gb_per_s": streamed_gb_per_s,
        "read_gb_per_s": read_gb_per_s,
        "fraction_of_read": fraction,
        "iterations": time.iterations,
        "threads_per_rank": torch.get_num_threads(),
        "transport": comm.transport,
    }
    if options.device == "cpu":
        row |= _floor(times, name, streamed, read_gb_per_s)
    else:
        baselines = [
            times[peer.name].p50_us
            for peer in peers.values()
            if peer.baseline and peer.name in times
        ]
        row |= {
            "of_baseline": time.p50_us / min(baselines) if baselines and not partial else None,
            "graph": options.launch == "graph",
            "calls_per_replay": time.calls,
            **gpu_provenance(comm),
        }
    return row | provenance()

"""One runner for all ops: checks every backend's results, then times all backends side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from commfuse import _extension, ops
from commfuse.bench.peers import PEERS, Peer, prepare_for_peer
from commfuse.bench.provenance import last_level_cache_bytes, provenance
from commfuse.bench.table import print_table
from commfuse.bench.timing import Cell, Times, gather, measure
from commfuse.errors import CommfuseError, UsageError
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link
from commfuse.testing.adapter import Adapter, Inputs, Outputs
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import MORE, QUICK, Case, cases_of
from commfuse.testing.numerics import complaint, digest

# Weights (and KV caches) rotate over copies that together exceed any cache that could hold them.
ROTATED_BYTES = 64 << 20
READ_BYTES, READ_SLICE = 256 << 20, 32 << 20
_READ = "read"


@dataclass(frozen=True)
class Options:
    """A benchmark of one op, as ``commfuse bench`` takes it.

    Attributes:
        op: its name.
        world_size: ranks.
        backends: names of backends and peers; None: all that can run here.
        dtype: name of a torch dtype.
        cases: ``quick`` or ``all``.
        iterations: calls of each cell; None: about a second's worth.
        link: an emulated link, or None.
        as_json: print JSON lines instead of a table.
    """

    op: str
    world_size: int
    backends: tuple[str, ...] | None = None
    dtype: str = "bfloat16"
    cases: str = "quick"
    iterations: int | None = None
    link: Link | None = None
    as_json: bool = False


def known_backends(op: str) -> list[str]:
    """Backends and peers of an op, ours first.

    Raises:
        UsageError: there is no such op; the message lists them.
    """
    if op not in ops.OP_NAMES:
        raise UsageError(f"unknown op {op!r}: use {', '.join(ops.OP_NAMES)} or generate")
    names = [backend.name for backend in ops.op(op).backends]
    return names + [peer.name for peer in PEERS.get(op, ())]


def check_options(options: Options) -> None:
    """Refuses, before ranks are started, what they would all refuse.

    Raises:
        UsageError: an unknown op, or a backend that the op does not have.
    """
    known = known_backends(options.op)
    for name in options.backends or ():
        if name not in known:
            raise UsageError(f"unknown backend {name!r} for {options.op}: use {', '.join(known)}")


def run_rank(options: Options) -> None:
    """Runs a benchmark on this rank; rank 0 prints the rows.

    Raises:
        UsageError: a backend that was asked for cannot run here; the message says why.
        CommfuseError: a result is wrong.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.world_size))
    if launch.started_by_launcher():
        launch.join_job()
    group = dist.group.WORLD if dist.is_initialized() else None
    try:
        with torch.inference_mode(), Communicator(group, link=options.link) as comm:
            rows = []
            for case in cases_of(options.op, (QUICK, MORE) if options.cases == "all" else (QUICK,)):
                for row in measure_case(case, options, comm):
                    rows.append(row)
                    if options.as_json and comm.rank == 0:
                        print(json.dumps(row), flush=True)
            if not options.as_json and comm.rank == 0:
                print_table(rows)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _chosen(options: Options, comm: Communicator, dtype: torch.dtype) -> list[str]:
    """The backends to run; peers that ``exposed`` needs come along with ``cpu``."""
    packed = True if adapter_packs(options.op) else None
    reasons = ops.explain(options.op, comm, dtype=dtype, packed=packed).reasons
    unavailable = {
        name: reason
        for name, reason in reasons.items()
        if reason != "chosen" and not reason.startswith("available")
    }
    peers = PEERS.get(options.op, ())
    for peer in peers:
        if peer.layout == "cpu" and "cpu" in unavailable:
            unavailable[peer.name] = unavailable["cpu"]
    if options.backends is None:
        return [name for name in known_backends(options.op) if name not in unavailable]
    for name in options.backends:
        if name in unavailable:
            raise UsageError(f"backend {name!r} cannot run {options.op} here: {unavailable[name]}")
    names = list(options.backends)
    if "cpu" in names:
        names += [peer.name for peer in peers if peer.layout == "cpu" and peer.name not in names]
    return names


def adapter_packs(op: str) -> bool:
    """Whether an op's CPU kernel takes a packed weight."""
    return adapter_of(cases_of(op)[0], torch.float32, 1).packs_weight


def measure_case(case: Case, options: Options, comm: Communicator) -> list[dict]:
    """The rows of one case, the same on every rank.

    Raises:
        UsageError, CommfuseError: as :func:`run_rank`.
    """
    dtype = getattr(torch, options.dtype)
    adapter = adapter_of(case, dtype, comm.world_size)
    inputs = adapter.inputs()
    mine = inputs[comm.rank]
    peers = {peer.name: peer for peer in PEERS.get(case.op, ())}
    prepared: dict[str, list[Inputs]] = {}  # by layout
    cells, problems = [], []
    for name in _chosen(options, comm, dtype):
        peer = peers.get(name)
        layout = peer.layout if peer else name
        if layout not in prepared:
            prepared[layout] = _copies(adapter, mine, layout)
        run = _caller(adapter, name, peer, comm)
        problems += _problems(name, peer, run, adapter, inputs, prepared[layout][0], comm)
        cells.append(Cell(name, [lambda i=i, run=run: run(i) for i in prepared[layout]]))
    if problems:
        raise CommfuseError(f"{case.op} {case} {options.dtype}: " + "; ".join(problems))
    del inputs
    streams = adapter.streamed_bytes() > 0 and _extension.module is not None
    if streams:
        cells.append(_read_cell())
    times = measure(cells, comm, options.iterations, interleaved=streams)
    read_gb_per_s = READ_SLICE / times[_READ].p50_us / 1e3 if streams else None
    return [
        _row(adapter, options, comm, times, cell.name, len(cell.calls), read_gb_per_s)
        for cell in cells
        if cell.name != _READ
    ]


def _copies(adapter: Adapter, mine: Inputs, layout: str) -> list[Inputs]:
    """Prepared inputs, as often as it takes to have weights come from memory."""
    if layout == "peer":
        duplicate = lambda: prepare_for_peer(adapter, mine)  # noqa: E731
    else:
        duplicate = lambda: adapter.duplicate(mine, layout)  # noqa: E731
    streamed = adapter.streamed_bytes()
    wanted = max(ROTATED_BYTES, 2 * last_level_cache_bytes())
    return [duplicate() for _ in range(wanted // streamed + 1 if streamed else 1)]


def _caller(
    adapter: Adapter, name: str, peer: Peer | None, comm: Communicator
) -> Callable[[Inputs], Outputs]:
    if peer is not None:
        return lambda inputs: peer.call(inputs, comm)
    return lambda inputs: adapter.call(inputs, comm, name)


def _problems(
    name: str,
    peer: Peer | None,
    run: Callable[[Inputs], Outputs],
    adapter: Adapter,
    inputs: list[Inputs],
    prepared: Inputs,
    comm: Communicator,
) -> list[str]:
    """What is wrong with a backend's results, on any rank; the same list on every rank."""
    outputs = run(prepared)
    mine: list[str | None] = []
    if peer is not None and peer.check is not None:
        mine.append(peer.check(inputs[comm.rank], outputs))
    else:
        wanted = adapter.composition(inputs), adapter.reference(inputs)
        expected = [adapter.share(results, comm.rank) for results in wanted]
        mine += [complaint(*tensors) for tensors in zip(outputs, *expected, strict=True)]
        if not adapter.scattered and len(set(gather(digest(*outputs), comm))) > 1:
            mine.append("the ranks' results differ")
        if adapter.exact:
            whole = adapter.inputs(integers=True)
            (exact,) = run(adapter.prepare(whole[comm.rank], name))
            (wanted,) = adapter.share(adapter.reference(whole), comm.rank)
            if not torch.equal(exact.double(), wanted):
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


def _exposed(times: dict[str, Times], name: str) -> float | None:
    """How much of the communication of ``gemm+all_reduce`` remains visible in the fused op."""
    if name != "cpu" or not {"gemm", "gemm+all_reduce"} <= set(times):
        return None
    gemm, unfused = times["gemm"].p50_us, times["gemm+all_reduce"].p50_us
    return (times[name].p50_us - gemm) / (unfused - gemm) if unfused > gemm else None


def _row(
    adapter: Adapter,
    options: Options,
    comm: Communicator,
    times: dict[str, Times],
    name: str,
    copies: int,
    read_gb_per_s: float | None,
) -> dict:
    """One row of results; ``bench/README.md`` says what its fields mean."""
    time, case, streamed = times[name], adapter.case, adapter.streamed_bytes()
    torch_time = times.get("torch")
    partial = name == "gemm"  # it does less than the op: no ratio
    streamed_gb_per_s = fraction = None
    if streamed and case["m"] == 1 and read_gb_per_s:
        streamed_gb_per_s = streamed / time.p50_us / 1e3
        fraction = streamed_gb_per_s / read_gb_per_s
    return {
        "op": case.op,
        "backend": name,
        "device": "cpu",
        "gpus": 0,
        "ranks": comm.world_size,
        "emulated": comm.link.name if comm.link else False,
        "dtype": options.dtype,
        "shape": case.shape,
        "bytes": adapter.message_bytes(),
        "p20_us": round(time.p20_us, 3),
        "p50_us": round(time.p50_us, 3),
        "p80_us": round(time.p80_us, 3),
        "exposed": _exposed(times, name),
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
        **provenance(),
    }

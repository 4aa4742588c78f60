"""What ``commfuse bench OP`` measures: its options, the cases, and the backends that can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from commfuse import ops
from commfuse.bench.gpu_peers import GPU_PEERS
from commfuse.bench.peers import CPU_PEERS, Peer
from commfuse.errors import UsageError
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import MORE, QUICK, Case, cases_of
from commfuse.testing.gpu_cases import gpu_cases_of

# Names that stand for several ops.
SETS = {"verify": ("verify_chain", "vocab_parallel_sample", "vocab_parallel_argmax")}
AUTO = "auto"


@dataclass(frozen=True)
class Options:
    """A benchmark of one op, as ``commfuse bench`` takes it.

    Attributes:
        op: its name.
        world_size: ranks.
        backends: names of backends and peers, or ``auto``; None: all that can run here.
        device: ``cpu`` or ``cuda``.
        dtype: name of a torch dtype.
        cases: ``quick`` or ``all``.
        only: words that a case's text must contain, as in ``batch=8 +sampled``.
        iterations: how often each cell is timed; None: see :func:`commfuse.bench.timing.measure`.
        link: an emulated link, or None.
        launch: on a GPU, ``graph`` or ``eager``.
        as_json: print JSON lines instead of a table.
    """

    op: str
    world_size: int
    backends: tuple[str, ...] | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    cases: str = "quick"
    only: tuple[str, ...] = ()
    iterations: int | None = None
    link: Link | None = None
    launch: str = "graph"
    as_json: bool = False


def ops_of(name: str) -> tuple[str, ...]:
    """The ops that a name on the command line stands for: those of a set, or itself."""
    return SETS.get(name, (name,))


def peers_of(op: str, device: str) -> tuple[Peer, ...]:
    """What an op is compared with on a device."""
    return (GPU_PEERS if device == "cuda" else CPU_PEERS).get(op, ())


def known_backends(op: str, device: str) -> list[str]:
    """Backends and peers of an op, ours first.

    Raises:
        UsageError: there is no such op; the message lists them.
    """
    if op not in ops.OP_NAMES:
        known = (*ops.OP_NAMES, *SETS, "send_recv", "pipeline", "wall")
        raise UsageError(f"unknown op {op!r}: use {', '.join(known)} or generate")
    other = "cpu" if device == "cuda" else "cuda"
    names = [backend.name for backend in ops.op(op).backends if backend.name != other]
    return names + [peer.name for peer in peers_of(op, device)]


def check_options(every: Sequence[Options]) -> None:
    """Refuses, before ranks are started, what they would all refuse.

    Args:
        every: the same options for one op, or for each of a set.

    Raises:
        UsageError: an unknown op, one that is not measured on the device, a backend that none of
            the ops has, or no case that contains the words.
    """
    names = [one.op for one in every]
    known = list(dict.fromkeys(x for one in every for x in known_backends(one.op, one.device)))
    for name in every[0].backends or ():
        if name not in (*known, AUTO):
            use = ", ".join([*known, AUTO])
            raise UsageError(f"unknown backend {name!r} for {', '.join(names)}: use {use}")
    if not [case for one in every for case in cases(one)]:
        words = " ".join(every[0].only)
        raise UsageError(f"--only: no case of {', '.join(names)} has all of the words {words!r}")


def cases(options: Options) -> list[Case]:
    """What is measured.

    Raises:
        UsageError: nothing of this op is measured on the device.
    """
    kinds = (QUICK, MORE) if options.cases == "all" else (QUICK,)
    if options.device == "cuda":
        found = gpu_cases_of(options.op, options.world_size, kinds)
    else:
        found = cases_of(options.op, kinds)
    return [case for case in found if set(options.only) <= set(str(case).split())]


def obstacles(options: Options, comm: Communicator) -> dict[str, str]:
    """Backends and peers that cannot run here, and why."""
    dtype = getattr(torch, options.dtype)
    found = {
        name: reason
        for name, reason in explain(options, comm, dtype).reasons.items()
        if reason != "chosen" and not reason.startswith("available")
    }
    for peer in peers_of(options.op, options.device):
        if reason := found.get(peer.beside) or peer.obstacle(comm, dtype):
            found[peer.name] = reason
    return found


def chosen(options: Options, comm: Communicator) -> list[str]:
    """What to run; peers that are measured beside one of our backends come along with it.

    Raises:
        UsageError: none of the op's backends that were asked for can run here.
    """
    unavailable = obstacles(options, comm)
    known = known_backends(options.op, options.device)
    if options.backends is None:
        names = [name for name in known if name not in unavailable]
        return [AUTO, *names] if options.device == "cuda" else names
    asked = [name for name in options.backends if name in (*known, AUTO)]
    names = [name for name in asked if name not in unavailable]
    if asked and not names:
        name, reason = asked[0], unavailable[asked[0]]
        raise UsageError(f"backend {name!r} cannot run {options.op} here: {reason}")
    for peer in peers_of(options.op, options.device):
        if peer.name not in (*names, *unavailable) and {peer.beside, AUTO} & set(names):
            names.append(peer.name)
    return names


def left_out(options: Options, comm: Communicator) -> list[str]:
    """What is to be said of backends that are known and cannot run here.

    Those that were asked for, or the peers on a GPU, of which a user might miss one.
    """
    peers = [peer.name for peer in peers_of(options.op, options.device)]
    missed = options.backends or (peers if options.device == "cuda" else ())
    unavailable = obstacles(options, comm)
    return [
        f"{options.op}: {name} left out: {unavailable[name]}"
        for name in missed
        if name in unavailable
    ]


def explain(options: Options, comm: Communicator, dtype: torch.dtype) -> ops.Explanation:
    packs = options.device == "cpu" and adapter_packs(options.op)
    return ops.explain(
        options.op, comm, device=options.device, dtype=dtype, packed=True if packs else None
    )


def adapter_packs(op: str) -> bool:
    """Whether an op's CPU kernel takes a packed weight."""
    return adapter_of(cases_of(op)[0], torch.float32, 1).packs_weight

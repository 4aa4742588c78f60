"""Backends as data: which implementation of an op can serve a call, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from commfuse import _extension
from commfuse.errors import BackendUnavailable
from commfuse.runtime import torch_collectives
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.transports import SHARED_MEMORY

# Registered before the extension's implementations are looked up; the extension is loaded by
# importing commfuse._extension.
LIBRARY = torch.library.Library("commfuse", "FRAGMENT")


@dataclass(frozen=True)
class Query:
    """A kind of call, and what the choice of a backend depends on: all of it but the shape.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the activations.
        packed: whether the weight is a :class:`~commfuse.ops.matmul.PackedWeight`; None for an op
            without a weight.
        shape: of the activations; for an op with a weight, the output features follow: (m, k, n).
            None where no particular call is meant.
    """

    device: str
    dtype: torch.dtype
    packed: bool | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: ``cpu``, ``cuda``, ``triton`` or ``torch``.
        run: the implementation, called with the op's own arguments.
        obstacle: why it cannot serve a query, or None if it can.
        automatic: whether ``auto`` may choose it.
        way: where the implementation chooses among algorithms by the shape: which one it takes for
            a query with a shape on a communicator, and why, in words.
    """

    name: str
    run: Callable[..., Any]
    obstacle: Callable[[Communicator | None, Query], str | None]
    automatic: bool = True
    way: Callable[[Communicator, Query], str] | None = None


@dataclass(frozen=True)
class Explanation:
    """What would run, and why. Printed, it is a short text.

    Attributes:
        op: the op's name.
        backend: the chosen backend's name, or None.
        reasons: for every backend, why it was chosen or why not.
    """

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'nothing can serve this call'}"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


@dataclass(frozen=True)
class Op:
    """An op and its backends, the preferred first."""

    name: str
    backends: tuple[Backend, ...]

    def explain(self, backend: str, comm: Communicator | None, query: Query) -> Explanation:
        """What ``backend`` ("auto" or a name) means for this query, and why."""
        reasons: dict[str, str] = {}
        chosen = None
        for candidate in self.backends:
            obstacle = candidate.obstacle(comm, query)
            if obstacle is not None:
                reasons[candidate.name] = obstacle
            elif backend not in ("auto", candidate.name):
                reasons[candidate.name] = "available; not the one asked for"
            elif backend == "auto" and not candidate.automatic:
                reasons[candidate.name] = "available; runs only when asked for by name"
            elif chosen is not None:
                reasons[candidate.name] = f"available; {chosen} comes first"
            else:
                chosen = candidate.name
                reasons[candidate.name] = "chosen"
                if candidate.way and query.shape is not None and comm.world_size > 1:
                    reasons[candidate.name] += f": {candidate.way(comm, query)}"
        return Explanation(self.name, chosen, reasons)

    def select(
        self, backend: str, comm: Communicator | None, x: torch.Tensor, packed: bool | None = None
    ) -> Callable[..., Any]:
        """The implementation that serves a call with activations ``x``.

        Raises:
            BackendUnavailable: there is none, or not the one asked for; the message lists why, and
                what is available.
        """
        cache = comm.backends if comm is not None else _LOCAL_CHOICES
        # This runs in every call of a decoding step: no Query is made where the choice is known.
        key = (self.name, backend, x.is_cpu, x.dtype, packed)
        run = cache.get(key)
        if run is None:
            query = Query(x.device.type, x.dtype, packed)
            explanation = self.explain(backend, comm, query)
            if explanation.backend is None:
                asked = "no backend can" if backend == "auto" else f"backend {backend!r} cannot"
                reasons = (f"  {name}: {why}" for name, why in explanation.reasons.items())
                raise BackendUnavailable(
                    "\n".join(
                        [f"{asked} serve {self.name} on {query.device} in {query.dtype}:", *reasons]
                    )
                )
            run = next(b.run for b in self.backends if b.name == explanation.backend)
            cache[key] = run
        return run


_LOCAL_CHOICES: dict[Any, Callable[..., Any]] = {}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that our kernels take


def cpu_kernel_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why our C++ kernels that need no communicator cannot serve a query, or None."""
    if query.device != "cpu":
        return f"runs on the CPU, not on {query.device}"
    if _extension.module is None:
        return _extension.reason
    if query.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, not {query.dtype}"
    if query.packed is False:
        return "takes weights packed by commfuse.ops.pack_weight"
    return None


def cpu_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why our C++ kernels for the CPU cannot serve a query, or None."""
    if why := cpu_kernel_obstacle(comm, query):
        return why
    if comm is not None and comm.world_size > 1 and comm.transport != SHARED_MEMORY:
        return f"needs shared memory between the ranks; their transport is {comm.transport}"
    return None


def cuda_kernel_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why our CUDA kernels that need no communicator cannot serve a query, or None."""
    if query.device != "cuda":
        return f"runs on a GPU, not on {query.device}"
    if why := _extension.why_no_cuda():
        return why
    if query.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, not {query.dtype}"
    if query.packed:
        return "takes plain weights [n, k]; this one is packed for the CPU"
    return None


def cuda_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why our CUDA kernels cannot serve a query, or None."""
    if why := cuda_kernel_obstacle(comm, query):
        return why
    if comm is None or comm.device.type != "cuda":
        return "the communicator is for the CPU; make it with Communicator(group, device='cuda')"
    if not comm.serves_gpu:
        because = f": {comm.transport_reason}" if comm.transport_reason else ""
        return f"needs GPUs that map each other's memory; transport {comm.transport}{because}"
    return None


def torch_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why torch and torch.distributed cannot serve a query, or None."""
    if query.packed and query.device != "cpu":
        return "the weight is packed for the CPU"
    if query.packed and _extension.module is None:
        return _extension.reason
    on_gpu = comm is not None and query.device == "cuda"
    symmetric = on_gpu and torch_collectives.uses_symmetric_memory(comm)
    if symmetric and query.dtype not in (torch.bfloat16, torch.float32):
        return f"torch's symmetric-memory ops take bfloat16 and float32, not {query.dtype}"
    return None


def torch_on_host_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """As :func:`torch_obstacle`, of what looks at numbers on the host."""
    if query.device != "cpu":
        return f"looks at every row's numbers on the host: for the CPU, not for {query.device}"
    return torch_obstacle(comm, query)


def define(schema: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Defines ``torch.ops.commfuse.NAME`` with its schema and its shape-only implementation."""
    name, _, overload = schema.partition("(")[0].partition(".")
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    full_name = f"commfuse::{name}.{overload}" if overload else f"commfuse::{name}"
    torch.library.register_fake(full_name, fake, lib=LIBRARY)
    return getattr(getattr(torch.ops.commfuse, name), overload or "default")

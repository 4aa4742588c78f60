"""What ops are compared with besides their own backends; on GPUs: ``gpu_peers.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench import sampling_peers
from commfuse.ops.matmul import reference as matmul_reference
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapter import EPS, Adapter, Inputs, Outputs
from commfuse.testing.numerics import complaint


def _no_obstacle(comm: Communicator, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """An alternative to an op, or a part of it.

    Attributes:
        name: as in rows of results.
        call: (prepared inputs, communicator) -> outputs.
        layout: the backend whose prepared inputs it takes.
        beside: our backend that it is always measured with; None: it is measured on request.
        prepare: (adapter, this rank's inputs, communicator) -> inputs, instead of a layout's.
        check: why outputs are wrong, or None: (all ranks' unprepared inputs, this rank, outputs).
            None where they are the op's own outputs, and are checked as these.
        obstacle: (communicator, dtype) -> why it cannot run, or None.
        partial: whether it does less than the op, so that a ratio of times means nothing.
        baseline: whether it is what a user of PyTorch would run; the best of them counts.
    """

    name: str
    call: Callable[[Inputs, Communicator], Outputs]
    layout: str = "cpu"
    beside: str | None = None
    prepare: Callable[[Adapter, Inputs, Communicator], Inputs] | None = None
    check: Callable[[list[Inputs], int, Outputs], str | None] | None = None
    obstacle: Callable[[Communicator, torch.dtype], str | None] = _no_obstacle
    partial: bool = False
    baseline: bool = False


def _gemm(inputs: Inputs, comm: Communicator) -> Outputs:
    return (ops.matmul(inputs["x"], inputs["w"], backend="cpu"),)


def check_gemm(inputs: list[Inputs], rank: int, outputs: Outputs) -> str | None:
    """Why outputs are not this rank's x wᵀ, or None."""
    x, w = inputs[rank]["x"], inputs[rank]["w"]
    return complaint(outputs[0], F.linear(x, w), matmul_reference(x, w))


def gemm_then_all_reduce(inputs: Inputs, comm: Communicator, backend: str) -> Outputs:
    """Our GEMM, then our all-reduce with what it can take of the tail."""
    x, w, residual = inputs["x"], inputs["w"], inputs["residual"]
    partial = ops.matmul(x, w, backend=backend)
    if inputs["norm_weight"] is not None:
        weight = inputs["norm_weight"]
        return ops.all_reduce_rms_norm(partial, residual, weight, EPS, comm, backend)
    total = ops.all_reduce(partial, comm, backend)
    return (total if residual is None else total.add_(residual),)


def _gemm_then_all_reduce(inputs: Inputs, comm: Communicator) -> Outputs:
    return gemm_then_all_reduce(inputs, comm, "cpu")


def _dense_cache(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    """Attention on a dense cache that holds the context."""
    case, length = adapter.case, len(inputs["qkv"])
    begin = case["context"]
    q, k, v = (x.transpose(0, 1) for x in adapter.heads(inputs))
    cos, sin = (inputs[name].to(adapter.dtype) for name in ("cos", "sin"))
    first, second = k.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    mask = torch.ones(case["m"], length, dtype=torch.bool).tril(begin)
    return {
        "heads": tuple(x[:, begin:].contiguous() for x in (q, k, v)),
        "caches": (rotated[None].clone(), v[None].clone(memory_format=torch.contiguous_format)),
        "new": (begin, length),
        "new_cos": cos[begin:],
        "new_sin": sin[begin:],
        "mask": mask if case["m"] > 1 else None,
    }


def _torch_attention(inputs: Inputs, comm: Communicator) -> Outputs:
    """Rotation, appending and attention as a PyTorch user writes them."""
    q, k, v = inputs["heads"]
    cos, sin, begin, end = inputs["new_cos"], inputs["new_sin"], *inputs["new"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    keys, values = inputs["caches"]
    keys[0, :, begin:end] = rotate(k)
    values[0, :, begin:end] = v
    out = F.scaled_dot_product_attention(
        rotate(q)[None],
        keys[:, :, :end],
        values[:, :, :end],
        attn_mask=inputs["mask"],
        enable_gqa=True,
    )
    return (out[0].transpose(0, 1).flatten(1),)


def _drawn_by_torch(call: Callable[[Inputs, Communicator], Outputs]) -> Peer:
    # Our own `torch` backend draws the very tokens of the others, in float64, and is no measure.
    return Peer(
        "gather+torch",
        call,
        beside="cpu",
        prepare=sampling_peers.prepare,
        check=sampling_peers.check,
        baseline=True,
    )


CPU_PEERS: dict[str, tuple[Peer, ...]] = {
    "matmul_all_reduce": (
        Peer("gemm", _gemm, beside="cpu", check=check_gemm, partial=True),
        Peer("gemm+all_reduce", _gemm_then_all_reduce, beside="cpu"),
    ),
    "attention": (Peer("torch", _torch_attention, prepare=_dense_cache),),
    "vocab_parallel_sample": (_drawn_by_torch(sampling_peers.sample),),
    "verify_chain": (_drawn_by_torch(sampling_peers.verify),),
}

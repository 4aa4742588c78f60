"""What ops are compared with besides their own backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.ops.matmul import reference as matmul_reference
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapter import Adapter, Inputs, Outputs
from commfuse.testing.adapters import EPS
from commfuse.testing.numerics import complaint


@dataclass(frozen=True)
class Peer:
    """An alternative to an op, or a part of it.

    Attributes:
        name: as in rows of results.
        layout: the backend whose prepared inputs it takes.
        call: (prepared inputs, communicator) -> outputs.
        check: why outputs are wrong, or None: (this rank's unprepared inputs, outputs). None where
            they are the op's own outputs, and are checked as these.
    """

    name: str
    layout: str
    call: Callable[[Inputs, Communicator], Outputs]
    check: Callable[[Inputs, Outputs], str | None] | None = None


def _gemm(inputs: Inputs, comm: Communicator) -> Outputs:
    return (ops.matmul(inputs["x"], inputs["w"], backend="cpu"),)


def _check_gemm(inputs: Inputs, outputs: Outputs) -> str | None:
    x, w = inputs["x"], inputs["w"]
    return complaint(outputs[0], F.linear(x, w), matmul_reference(x, w))


def _gemm_then_all_reduce(inputs: Inputs, comm: Communicator) -> Outputs:
    """Our GEMM, then our all-reduce with what it can take of the tail."""
    x, w, residual = inputs["x"], inputs["w"], inputs["residual"]
    partial = ops.matmul(x, w, backend="cpu")
    if inputs["norm_weight"] is not None:
        return ops.all_reduce_rms_norm(partial, residual, inputs["norm_weight"], EPS, comm, "cpu")
    total = ops.all_reduce(partial, comm, "cpu")
    return (total if residual is None else total.add_(residual),)


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


PEERS: dict[str, tuple[Peer, ...]] = {
    "matmul_all_reduce": (
        Peer("gemm", "cpu", _gemm, _check_gemm),
        Peer("gemm+all_reduce", "cpu", _gemm_then_all_reduce),
    ),
    "attention": (Peer("torch", "peer", _torch_attention),),
}


def prepare_for_peer(adapter: Adapter, inputs: Inputs) -> Inputs:
    """The inputs of ``layout="peer"``: attention on a dense cache that holds the context."""
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

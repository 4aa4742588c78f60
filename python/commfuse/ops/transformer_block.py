"""A whole transformer block in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from commfuse.ops._registry import Backend, Op, cpu_obstacle, define, torch_obstacle
from commfuse.ops.attention import attention
from commfuse.ops.matmul import PackedWeight, Weight, matmul
from commfuse.ops.matmul_all_reduce import matmul_all_reduce
from commfuse.runtime.communicator import Communicator


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one forward pass stand.

    Attributes:
        sequences: int64 [tokens], the cache's sequence of each.
        positions: int64 [tokens].
        rotary: cos and sin, float32 [positions, head_dim / 2].
    """

    sequences: torch.Tensor
    positions: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BlockWeights:
    """What one rank holds of a block.

    Attributes:
        qkv: [(heads + 2 kv_heads) * head_dim, hidden]: Q, K and V put together.
        output: [hidden, heads * head_dim].
        gate_up: gate and up as :func:`~commfuse.ops.pack_gate_up` makes them.
        down: [hidden, features of this rank].
        middle_norm, next_norm: [hidden], RMSNorm between the halves and behind the block.
        heads: (query heads of this rank, global index of the first, query heads per KV head).
        eps: of every RMSNorm.
        qkv_bias, output_bias, gate_up_bias, down_bias: or None; output and down whole.
        q_norm, k_norm: [head_dim] (Qwen3) or None.
    """

    qkv: Weight
    output: Weight
    gate_up: PackedWeight
    down: Weight
    middle_norm: torch.Tensor
    next_norm: torch.Tensor
    heads: tuple[int, int, int]
    eps: float
    qkv_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


def _fake(x, residual, *_):
    return torch.empty_like(x), torch.empty_like(residual)


_transformer_block = define(
    "transformer_block(Tensor x, Tensor residual, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor cos, Tensor sin, Tensor sequences, Tensor positions, Tensor qkv, Tensor? qkv_bias,"
    " Tensor output, Tensor? output_bias, Tensor middle_norm, Tensor gate_up,"
    " Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor next_norm, Tensor? q_norm,"
    " Tensor? k_norm, Tensor? read_next, int heads, int head_offset, int group, int features,"
    " float eps, int communicator) -> (Tensor, Tensor)",
    _fake,
)


def _cpu(x, residual, w, caches, placement, comm, read_next):
    return _transformer_block(
        x, residual, *caches, *placement.rotary, placement.sequences, placement.positions,
        w.qkv.data, w.qkv_bias, w.output.data, w.output_bias, w.middle_norm,
        w.gate_up.data, w.gate_up_bias, w.down.data, w.down_bias, w.next_norm,
        w.q_norm, w.k_norm, None if read_next is None else read_next.data,
        *w.heads, w.gate_up.out_features, w.eps, comm.handle,
    )  # fmt: skip


def _torch(x, residual, w, caches, placement, comm, read_next):
    heads = attention(
        matmul(x, w.qkv, w.qkv_bias), caches, placement.rotary, placement.sequences,
        placement.positions, w.heads, (w.q_norm, w.k_norm), w.eps,
    )  # fmt: skip
    x, residual = matmul_all_reduce(
        heads, w.output, comm, bias=w.output_bias, residual=residual,
        norm_weight=w.middle_norm, eps=w.eps, backend="torch",
    )  # fmt: skip
    return matmul_all_reduce(
        matmul(x, w.gate_up, w.gate_up_bias), w.down, comm, bias=w.down_bias, residual=residual,
        norm_weight=w.next_norm, eps=w.eps, backend="torch",
    )  # fmt: skip


OP = Op(
    "transformer_block",
    (Backend("cpu", _cpu, cpu_obstacle), Backend("torch", _torch, torch_obstacle)),
)


def transformer_block(
    x: torch.Tensor,
    residual: torch.Tensor,
    weights: BlockWeights,
    caches: tuple[torch.Tensor, torch.Tensor],
    placement: Placement,
    comm: Communicator,
    *,
    read_next: PackedWeight | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and gated MLP of one layer, their two all-reduces and the norms behind these.

    The same as :func:`matmul`, :func:`attention`, :func:`matmul_all_reduce`, :func:`matmul` and
    :func:`matmul_all_reduce` in a row, bit for bit, without returning to Python in between: at one
    token that would take as long as reading the weights of the smaller layers.

    Args:
        x: [tokens, hidden], normalised.
        residual: [tokens, hidden], equal on all ranks.
        weights: of this rank.
        caches: K and V of this layer; written.
        placement: of the tokens.
        comm: every rank must call.
        read_next: a weight that is needed behind this block; while a rank waits for the others, it
            fetches the beginning of what comes next into its cache. Changes no result.
        backend: ``"auto"``, ``"cpu"`` or ``"torch"`` (the five ops, with torch.distributed).

    Returns:
        (RMSNorm(residual') · next_norm, residual'), [tokens, hidden] each.

    Raises:
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> x, residual = transformer_block(x, residual, weights, caches, placement, comm)
    """
    run = OP.select(backend, comm, x, isinstance(weights.qkv, PackedWeight))
    return run(x, residual, weights, caches, placement, comm, read_next)

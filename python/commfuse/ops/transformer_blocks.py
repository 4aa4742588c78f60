"""A stack of transformer blocks in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from commfuse.errors import UsageError
from commfuse.ops._hierarchical import hierarchical_obstacle
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.ops.attention import attention
from commfuse.ops.matmul import PackedWeight, Weight, gated_features, gated_matmul, matmul
from commfuse.ops.matmul_all_reduce import matmul_all_reduce
from commfuse.ops.recv import recv
from commfuse.ops.recv_matmul import recv_matmul
from commfuse.ops.send import send
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one forward pass stand.

    Attributes:
        sequences: int64 [tokens], the cache's sequence of each.
        positions: int64 [tokens].
        rotary: cos and sin, float32 [positions, head_dim / 2].
        span: of a decoding step, a number that no position reaches; None: a prefill. See
            :func:`~commfuse.ops.attention`.
    """

    sequences: torch.Tensor
    positions: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    span: int | None = None


@dataclass(frozen=True)
class BlockWeights:
    """What one rank holds of a block.

    Attributes:
        qkv: [(heads + 2 kv_heads) * head_dim, hidden]: Q, K and V put together.
        output: [hidden, heads * head_dim].
        gate_up: gate and up as :func:`~commfuse.ops.pack_gate_up` makes them; on a GPU one behind
            the other, [2 features of this rank, hidden].
        down: [hidden, features of this rank].
        middle_norm, next_norm: [hidden], RMSNorm between the halves and behind the block.
        heads: (query heads of this rank, global index of the first, query heads per KV head).
        eps: of every RMSNorm.
        qkv_bias, output_bias, gate_up_bias, down_bias: or None; output and down whole.
        q_norm, k_norm: [head_dim] (Qwen3) or None.
    """

    qkv: Weight
    output: Weight
    gate_up: Weight
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


def _fake(
    x, residual, k_caches, v_caches, cos, sin, sequences, positions, qkv, qkv_bias, output,
    output_bias, middle_norm, gate_up, gate_up_bias, down, down_bias, next_norm, q_norm, k_norm,
    read_next, heads, head_offset, group, features, eps, communicator, first_norm=None, source=None,
    target=None,
):  # fmt: skip
    rows = len(sequences) if target is None else 0
    like = middle_norm[0].new_empty(rows, len(middle_norm[0]))
    return like, torch.empty_like(like)


_transformer_blocks = define(
    "transformer_blocks(Tensor? x, Tensor? residual, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches,"
    " Tensor cos, Tensor sin, Tensor sequences, Tensor positions, Tensor[] qkv,"
    " Tensor?[] qkv_bias, Tensor[] output, Tensor?[] output_bias, Tensor[] middle_norm,"
    " Tensor[] gate_up, Tensor?[] gate_up_bias, Tensor[] down, Tensor?[] down_bias,"
    " Tensor[] next_norm, Tensor?[] q_norm, Tensor?[] k_norm, Tensor? read_next, int heads,"
    " int head_offset, int group, int features, float eps, int communicator,"
    " Tensor? first_norm=None, int? source=None, int? target=None) -> (Tensor, Tensor)",
    _fake,
)


def _cpu(x, residual, blocks, caches, placement, comm, read_next, first_norm, source, target):
    first, sending = blocks[0], None
    if source is not None and source.backend == "torch":
        rows = len(placement.sequences)
        x, residual = recv(rows, source, norm_weight=first_norm, eps=first.eps)
        first_norm = source = None
    if target is not None and target.backend == "torch":
        sending, target = target, None
    x, residual = _transformer_blocks(
        x, residual, [k for k, _ in caches], [v for _, v in caches],
        *placement.rotary, placement.sequences, placement.positions,
        [w.qkv.data for w in blocks], [w.qkv_bias for w in blocks],
        [w.output.data for w in blocks], [w.output_bias for w in blocks],
        [w.middle_norm for w in blocks],
        [w.gate_up.data for w in blocks], [w.gate_up_bias for w in blocks],
        [w.down.data for w in blocks], [w.down_bias for w in blocks],
        [w.next_norm for w in blocks], [w.q_norm for w in blocks], [w.k_norm for w in blocks],
        None if read_next is None else read_next.data,
        *first.heads, first.gate_up.out_features, first.eps, comm.handle, first_norm,
        None if source is None else source.handle, None if target is None else target.handle,
    )  # fmt: skip
    if sending is not None:
        send(residual, sending)
        return x[:0], residual[:0]
    return x, residual


def _in_turn(backend: str, gemm: str):
    """The five ops of each block; ``gemm`` is the backend of GEMMs without a sum."""

    def run(x, residual, blocks, caches, placement, comm, read_next, first_norm, source, target):
        for number, (w, cache) in enumerate(zip(blocks, caches, strict=True)):
            if number == 0 and source is not None:
                qkv, residual = recv_matmul(
                    len(placement.sequences), source, w.qkv, bias=w.qkv_bias,
                    norm_weight=first_norm, eps=w.eps,
                )  # fmt: skip
            else:
                qkv = matmul(x, w.qkv, w.qkv_bias, backend=gemm)
            heads = attention(
                qkv, cache, placement.rotary, placement.sequences, placement.positions, w.heads,
                (w.q_norm, w.k_norm), w.eps, span=placement.span,
            )  # fmt: skip
            x, residual = matmul_all_reduce(
                heads, w.output, comm, bias=w.output_bias, residual=residual,
                norm_weight=w.middle_norm, eps=w.eps, backend=backend,
            )  # fmt: skip
            x, residual = matmul_all_reduce(
                gated_matmul(x, w.gate_up, w.gate_up_bias, backend=gemm), w.down, comm,
                bias=w.down_bias, residual=residual, norm_weight=w.next_norm, eps=w.eps,
                backend=backend,
            )  # fmt: skip
        if target is not None:
            send(residual, target)
            return residual[:0], residual[:0]
        return x, residual

    return run


OP = Op(
    "transformer_blocks",
    (
        Backend("cpu", _cpu, cpu_obstacle),
        Backend("hierarchical", _in_turn("hierarchical", "auto"), hierarchical_obstacle),
        Backend("cuda", _in_turn("cuda", "cuda"), cuda_obstacle),
        Backend("torch", _in_turn("torch", "torch"), torch_obstacle),
    ),
)


def transformer_blocks(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    blocks: Sequence[BlockWeights],
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    placement: Placement,
    comm: Communicator,
    *,
    read_next: PackedWeight | None = None,
    first_norm: torch.Tensor | None = None,
    source: Channel | None = None,
    target: Channel | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and gated MLP of consecutive layers, with their all-reduces and RMSNorms.

    The same as :func:`matmul`, :func:`attention`, :func:`matmul_all_reduce`, :func:`matmul` and
    :func:`matmul_all_reduce` for each block in turn, bit for bit. On the CPU without returning to
    Python in between: at one token that would take as long as reading the weights of the smaller
    layers. On a GPU a CUDA graph does the same (docs/modules.md).

    Between pipeline stages it begins with :func:`recv_matmul` and ends with :func:`matmul_send`, or
    on several ranks with :func:`send`; only the residual travels.

    Args:
        x: [tokens, hidden], normalised; None with ``source``.
        residual: [tokens, hidden], equal on all ranks; None with ``source``.
        blocks: what this rank holds of each, at least one; all with the same heads, features and
            eps.
        caches: K and V of each block; written.
        placement: of the tokens.
        comm: every rank must call.
        read_next: a weight that is needed behind the blocks; while a rank waits for the others, it
            fetches the beginning of what comes next into its cache. Changes no result.
        first_norm: [hidden], RMSNorm in front of the first block, with ``source``.
        source: a channel that brings the residual from the stage before.
        target: a channel that takes the residual to the next stage.
        backend: ``"auto"``, ``"cpu"``, or ``"cuda"``, ``"hierarchical"`` or ``"torch"``: the five
            ops, with this backend, in turn.

    Returns:
        (RMSNorm(residual') · next_norm of the last block, residual'), [tokens, hidden] each; with
        ``target``, [0, hidden] each.

    Raises:
        UsageError: neither x and residual nor source and first_norm, or both; no blocks, a number
            of caches that is not theirs, or blocks of unequal sizes.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> x, residual = transformer_blocks(x, residual, [weights], [(k, v)], placement, comm)
    """
    if (x is None or residual is None) != (source is not None and first_norm is not None):
        raise UsageError("transformer_blocks: give x and residual, or source and first_norm")
    if len(caches) != len(blocks) or not blocks:
        raise UsageError(f"transformer_blocks: {len(blocks)} blocks and {len(caches)} caches")
    first = blocks[0]
    sizes = (first.heads, gated_features(first.gate_up), first.eps)
    for number, w in enumerate(blocks):
        own = (w.heads, gated_features(w.gate_up), w.eps)
        if own != sizes:
            raise UsageError(
                "transformer_blocks: (heads, features, eps) of block 0 and block "
                f"{number} differ: {sizes} and {own}; call it once for each run of equal blocks"
            )
    like = source.no_rows if x is None else x
    run = OP.select(backend, comm, like, isinstance(first.qkv, PackedWeight))
    return run(x, residual, blocks, caches, placement, comm, read_next, first_norm, source, target)

"""Attention over the heads of a rank, and its KV cache."""

from __future__ import annotations

import torch
from torch import nn

from commfuse import ops
from commfuse.nn.linear import ColumnParallelLinear, RowParallelLinear
from commfuse.nn.sharding import HeadShard
from commfuse.ops import Placement
from commfuse.runtime.communicator import Communicator


class KVCache:
    """Keys and values of the KV heads of a rank, for all layers and sequences.

    A position's entry is written by the token at that position and read by later ones. Nothing
    records how far a sequence has come: whoever places the next token says so. Taking tokens back
    is therefore to continue at an earlier position; nothing is copied or cleared.

    Args:
        layers, sequences, kv_heads, max_length, head_dim: sizes; max_length is rounded up to 16.
        dtype: of the model's activations.

    Attributes:
        layers: one (K, V) pair a layer, [sequences, kv_heads, max_length, head_dim] each.
    """

    def __init__(
        self,
        layers: int,
        sequences: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
    ):
        self.max_length = -(-max_length // 16) * 16
        shape = (sequences, kv_heads, self.max_length, head_dim)
        self.layers = [
            (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
            for _ in range(layers)
        ]


class ParallelAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., "GQA", 2023) over the query heads of a rank.

    Args:
        qkv: [(heads + 2 kv_heads) of this rank * head_dim, hidden]: Q, K and V put together.
        output: [hidden, heads of this rank * head_dim].
        shard: which heads these are.
        comm: the ranks that hold the others.
        qkv_bias, output_bias: their biases (the output's whole), or None.
        norms: RMSNorm weights [head_dim] of Q and K heads (Qwen3), or None.
        eps: of every RMSNorm here.
    """

    def __init__(
        self,
        qkv: torch.Tensor,
        output: torch.Tensor,
        shard: HeadShard,
        comm: Communicator,
        *,
        qkv_bias: torch.Tensor | None = None,
        output_bias: torch.Tensor | None = None,
        norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        eps: float = 1e-6,
    ):
        super().__init__()
        self.qkv = ColumnParallelLinear(qkv, qkv_bias)
        self.output = RowParallelLinear(output, comm, output_bias)
        self.heads = (len(shard.query), shard.query.begin, shard.group)
        self.norms = norms
        self.eps = eps

    def forward(
        self,
        x: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        placement: Placement,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One half-block: (RMSNorm(residual'), residual') with residual' = residual + attention.

        Args:
            x: [tokens, hidden], normalised.
            cache: K and V of this layer; written.
            placement: of the tokens.
            residual: [tokens, hidden].
            norm_weight: [hidden], of the norm that follows.
        """
        heads = ops.attention(
            self.qkv(x),
            cache,
            placement.rotary,
            placement.sequences,
            placement.positions,
            self.heads,
            self.norms,
            self.eps,
        )
        return self.output(heads, residual, norm_weight, self.eps)

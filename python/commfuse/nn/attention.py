"""Attention over the heads of a rank, and its KV cache."""

from __future__ import annotations

import math

import torch
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn.linear import MergedColumnParallelLinear, RowParallelLinear
from commfuse.nn.norm import RMSNorm
from commfuse.nn.sharded import ShardedGroup, require_children
from commfuse.nn.sharding import HeadShard, Span, shard_heads
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
        device: where it lies.

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
        device: torch.device | str = "cpu",
    ):
        self.max_length = -(-max_length // 16) * 16
        shape = (sequences, kv_heads, self.max_length, head_dim)
        self.layers = [
            tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            for _ in range(layers)
        ]


class ParallelAttention(ShardedGroup):
    """Grouped-query attention (Ainslie et al., "GQA", 2023) over the query heads of a rank.

    Its state dict has the keys of the unsharded module: ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj``, and ``q_norm`` and ``k_norm`` where there are any.

    Args:
        qkv: [(heads + 2 kv_heads) of this rank * head_dim, hidden]: Q, K and V put together.
        output: [hidden, heads of this rank * head_dim].
        shard: which heads these are.
        norms: of the Q and K heads, [head_dim] each (Qwen3), or None.
        eps: of every RMSNorm here.
    """

    def __init__(
        self,
        qkv: MergedColumnParallelLinear,
        output: RowParallelLinear,
        shard: HeadShard,
        *,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        eps: float = 1e-6,
    ):
        members = {"": qkv, "o_proj.": output}
        super().__init__(members | dict(zip(("q_norm.", "k_norm."), norms or (), strict=False)))
        self.qkv = qkv
        self.output = output
        self.q_norm, self.k_norm = norms or (None, None)
        self.shard = shard
        self.heads = (len(shard.query), shard.query.begin, shard.group)
        self.eps = eps

    @classmethod
    def from_attention(
        cls, attention: nn.Module, comm: Communicator, *, eps: float = 1e-6
    ) -> ParallelAttention:
        """This rank's heads of a module that every rank has whole, or on torch's meta device.

        Query heads are split as evenly as possible, and a rank takes the KV heads that these read:
        any number of ranks from 1 to the number of query heads works.

        Args:
            attention: with linear layers ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, an
                integer ``head_dim`` and, if it has them, RMSNorms ``q_norm`` and ``k_norm`` of
                single heads: what the Llama family has in the transformers library. Causal, with
                rotary embeddings of the whole head and scores over sqrt(head_dim).
            comm: the ranks.
            eps: of every RMSNorm in the block.

        Raises:
            UsageError: more ranks than query heads; features that are not whole heads; a
                ``head_dim`` that is no multiple of 16; parameters besides these, a sliding window
                or another scaling of the scores.

        Example:
            >>> attention = ParallelAttention.from_attention(layer.self_attn, comm, eps=1e-5)
        """
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        require_children(attention, names, optional=("q_norm", "k_norm"))
        q, k, v, o = (getattr(attention, name) for name in names)
        dim = _head_dim(attention)
        sizes = (q.out_features, k.out_features, v.out_features, o.in_features)
        heads, kv_heads = q.out_features // dim, k.out_features // dim
        whole = (heads * dim, kv_heads * dim, kv_heads * dim, heads * dim)
        if sizes != whole or not kv_heads or heads % kv_heads:
            raise UsageError(f"features of q, k, v and o are {sizes}, which are not heads of {dim}")
        shard = shard_heads(heads, kv_heads, comm.world_size, comm.rank)
        query, kv = (Span(s.begin * dim, s.end * dim) for s in (shard.query, shard.kv))
        norms = None
        if getattr(attention, "q_norm", None) is not None:
            norms = tuple(RMSNorm.from_norm(getattr(attention, n)) for n in ("q_norm", "k_norm"))
            if any(norm.slices["weight"].shape != (dim,) for norm in norms):
                raise UsageError(f"q_norm and k_norm must be norms of single heads, [{dim}]")
        layers = {"q_proj": q, "k_proj": k, "v_proj": v}
        rows = {"q_proj": query, "k_proj": kv, "v_proj": kv}
        return cls(
            MergedColumnParallelLinear.from_linears(layers, comm, rows),
            RowParallelLinear.from_linear(o, comm, query),
            shard,
            norms=norms,
            eps=eps,
        )

    @property
    def norm_weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights [head_dim] of the norms of Q and K heads, or None."""
        return tuple(norm and norm.weight for norm in (self.q_norm, self.k_norm))

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
        self.require_loaded()
        heads = ops.attention(
            self.qkv(x),
            cache,
            placement.rotary,
            placement.sequences,
            placement.positions,
            self.heads,
            self.norm_weights,
            self.eps,
            span=placement.span,
        )
        return self.output(heads, residual, norm_weight, self.eps)


def _head_dim(attention: nn.Module) -> int:
    """Of a module whose attention is the one that is computed here."""
    dim = getattr(attention, "head_dim", None)
    if not isinstance(dim, int) or dim % 16:
        raise UsageError(
            f"{type(attention).__name__}.head_dim is {dim!r}; the kernels take multiples of 16"
        )
    if getattr(attention, "sliding_window", None) is not None:
        raise UsageError("attention over a sliding window is not supported; set it to None")
    if not math.isclose(getattr(attention, "scaling", dim**-0.5), dim**-0.5):
        raise UsageError(
            f"scores are scaled by {attention.scaling:.3g} here; supported is head_dim ** -0.5, "
            f"{dim**-0.5:.3g}"
        )
    return dim

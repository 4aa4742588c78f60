"""Tensor-parallel modules: what a transformer block over several ranks is made of.

Every module takes the shard of its rank, cut as :mod:`commfuse.nn.sharding` says, and packs it for
the CPU kernels where these are available.
"""

from commfuse.nn.attention import KVCache, ParallelAttention
from commfuse.nn.block import ParallelBlock, ParallelMLP
from commfuse.nn.linear import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from commfuse.nn.sharding import HeadShard, Span, shard_heads, shard_vocabulary, split

__all__ = [
    "ColumnParallelLinear",
    "GatedColumnParallelLinear",
    "HeadShard",
    "KVCache",
    "ParallelAttention",
    "ParallelBlock",
    "ParallelMLP",
    "RowParallelLinear",
    "Span",
    "VocabParallelEmbedding",
    "shard_heads",
    "shard_vocabulary",
    "split",
]

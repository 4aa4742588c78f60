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
    VocabParallelHead,
)
from commfuse.nn.sharded import ShardedModule
from commfuse.nn.sharding import HeadShard, Slice, Span, shard_heads, shard_vocabulary, split

__all__ = [
    "ColumnParallelLinear",
    "GatedColumnParallelLinear",
    "HeadShard",
    "KVCache",
    "ParallelAttention",
    "ParallelBlock",
    "ParallelMLP",
    "RowParallelLinear",
    "ShardedModule",
    "Slice",
    "Span",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "shard_heads",
    "shard_vocabulary",
    "split",
]

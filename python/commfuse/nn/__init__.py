"""Tensor-parallel modules: what a transformer block over several ranks is made of.

Every module takes the shard of its rank, cut as :mod:`commfuse.nn.sharding` says, and packs it for
the CPU kernels where these are available.
"""

from commfuse.nn.attention import KVCache, ParallelAttention
from commfuse.nn.block import ParallelBlock, ParallelMLP
from commfuse.nn.linear import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from commfuse.nn.norm import RMSNorm
from commfuse.nn.sharded import ShardedGroup, ShardedModule, gather_state_dict
from commfuse.nn.sharding import HeadShard, Slice, Span, shard_heads, shard_vocabulary, split
from commfuse.nn.vocabulary import VocabParallelEmbedding, VocabParallelHead

__all__ = [
    "ColumnParallelLinear",
    "GatedColumnParallelLinear",
    "HeadShard",
    "KVCache",
    "MergedColumnParallelLinear",
    "ParallelAttention",
    "ParallelBlock",
    "ParallelMLP",
    "RMSNorm",
    "RowParallelLinear",
    "ShardedGroup",
    "ShardedModule",
    "Slice",
    "Span",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "gather_state_dict",
    "shard_heads",
    "shard_vocabulary",
    "split",
]

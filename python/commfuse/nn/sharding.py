"""Which part of a layer a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from commfuse.errors import UsageError

# Vocabularies are cut at multiples of this, so that the cut does not move with the world size.
VOCABULARY_BLOCK = 128


@dataclass(frozen=True)
class Span:
    """Indices ``begin`` to ``end - 1``."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def scaled(self, factor: int) -> slice:
        """The rows of these indices where each has ``factor`` rows."""
        return slice(self.begin * factor, self.end * factor)


@dataclass(frozen=True)
class Slice:
    """Which part of an unsharded parameter a rank holds.

    Attributes:
        shape: of the unsharded parameter.
        rows: of its first dimension.
        columns: of its second one; None: all, or there is none.

    Example:
        >>> Slice((8, 4), slice(0, 3)).of(torch.zeros(8, 4)).shape
        torch.Size([3, 4])
    """

    shape: tuple[int, ...]
    rows: slice
    columns: slice | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        rows = self.rows.stop - self.rows.start
        if self.columns is None:
            return (rows, *self.shape[1:])
        return (rows, self.columns.stop - self.columns.start)

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """The part as a view of the unsharded parameter."""
        return full[self.rows] if self.columns is None else full[self.rows, self.columns]


@dataclass(frozen=True)
class HeadShard:
    """The attention heads of a rank.

    Attributes:
        query: query heads.
        kv: the KV heads that these read; neighbouring ranks may hold the same one.
        group: query heads per KV head in the whole model.
    """

    query: Span
    kv: Span
    group: int


def split(count: int, world_size: int, rank: int) -> Span:
    """``count`` things over the ranks, contiguous and as even as possible, the first get more.

    Example:
        >>> [len(split(9, 2, r)) for r in range(2)]
        [5, 4]
    """
    each, more = divmod(count, world_size)
    begin = rank * each + min(rank, more)
    return Span(begin, begin + each + (rank < more))


def shard_heads(heads: int, kv_heads: int, world_size: int, rank: int) -> HeadShard:
    """The heads of a rank, for any world size from 1 to the number of query heads.

    Raises:
        UsageError: there are fewer query heads than ranks; the message says what would work.

    Example:
        >>> shard_heads(9, 3, 2, 0).kv
        Span(begin=0, end=2)
    """
    if world_size > heads:
        raise UsageError(
            f"tensor parallelism over {world_size} ranks is impossible for a model with {heads} "
            f"attention heads: every rank needs one at least; use 1 to {heads}"
        )
    query, group = split(heads, world_size, rank), heads // kv_heads
    return HeadShard(query, Span(query.begin // group, (query.end - 1) // group + 1), group)


def shard_vocabulary(size: int, world_size: int, rank: int) -> Span:
    """The vocabulary entries of a rank, cut at multiples of 128; the last ranks may get none.

    Example:
        >>> shard_vocabulary(49152, 2, 1)
        Span(begin=24576, end=49152)
    """
    blocks = split(-(-size // VOCABULARY_BLOCK), world_size, rank)
    return Span(
        min(blocks.begin * VOCABULARY_BLOCK, size), min(blocks.end * VOCABULARY_BLOCK, size)
    )

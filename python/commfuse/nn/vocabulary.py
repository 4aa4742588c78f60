"""Embedding and head, cut by vocabulary entries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn.linear import ShardedLinear, flat_rows, slices_of
from commfuse.nn.sharding import Slice, shard_vocabulary
from commfuse.ops import PackedWeight
from commfuse.runtime.communicator import Communicator


class VocabParallelEmbedding(ShardedLinear):
    """The embedding of a vocabulary that is cut over the ranks.

    Args:
        weight: [entries of this rank, hidden].
        vocab_begin: global id of the first entry.
        comm: the ranks that hold the others.
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        vocab_begin: int,
        comm: Communicator,
        *,
        slices: Mapping[str, Slice] | None = None,
    ):
        super().__init__(weight, None, slices or {})
        self.vocab_begin = vocab_begin
        self.comm = comm

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, comm: Communicator) -> VocabParallelEmbedding:
        """This rank's part of an embedding that every rank has whole, or on torch's meta device.

        Args:
            embedding: weight [entries, hidden].
            comm: the ranks; they are given contiguous entries, cut at multiples of 128.

        Raises:
            UsageError: not a ``torch.nn.Embedding`` but a subclass or something else, or one that
                rescales its weights (``max_norm``).

        Example:
            >>> embedding = VocabParallelEmbedding.from_embedding(nn.Embedding(32000, 512), comm)
        """
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise UsageError(
                "torch.nn.Embedding without max_norm is needed here, not "
                f"{type(embedding).__name__}"
            )
        shard = shard_vocabulary(embedding.num_embeddings, comm.world_size, comm.rank)
        slices = {"weight": Slice(tuple(embedding.weight.shape), shard.scaled(1))}
        layer = cls(None, shard.begin, comm, slices=slices)
        layer.load_from(embedding)
        return layer

    def forward(
        self,
        tokens: torch.Tensor,
        norm_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As :func:`commfuse.ops.vocab_parallel_embedding`; tokens [...] without a norm."""
        self.require_loaded()
        if norm_weight is None:
            rows = ops.vocab_parallel_embedding(
                tokens.flatten(), self.weight, self.vocab_begin, self.comm, backend=backend
            )
            return rows.unflatten(0, tokens.shape)
        return ops.vocab_parallel_embedding(
            tokens,
            self.weight,
            self.vocab_begin,
            self.comm,
            norm_weight=norm_weight,
            eps=eps,
            backend=backend,
        )


class VocabParallelHead(ShardedLinear):
    """Logits from a vocabulary that is cut over the ranks.

    Args:
        weight: [entries of this rank, hidden], or the embedding to which the head is tied.
        vocabulary: entries of all ranks.
        comm: the ranks that hold the others.
        bias: [entries of this rank] or None.
    """

    def __init__(
        self,
        weight: torch.Tensor | VocabParallelEmbedding | None,
        vocabulary: int,
        comm: Communicator,
        bias: torch.Tensor | None = None,
        *,
        slices: Mapping[str, Slice] | None = None,
    ):
        tied = isinstance(weight, VocabParallelEmbedding)
        super().__init__(None if tied else weight, bias, slices or {})
        if tied:
            weight.require_loaded()
            self.weight, self.dtype, self.loaded = weight.weight, weight.dtype, True
        self.comm = comm
        ranks = range(comm.world_size)
        self.widths = [len(shard_vocabulary(vocabulary, comm.world_size, rank)) for rank in ranks]

    @classmethod
    def from_linear(cls, linear: nn.Linear, comm: Communicator) -> VocabParallelHead:
        """This rank's part of a head that every rank has whole, or on torch's meta device.

        Args:
            linear: weight [entries, hidden].
            comm: the ranks; they are given contiguous entries, cut at multiples of 128.

        Raises:
            UsageError: not a ``torch.nn.Linear`` but a subclass or something else.

        Example:
            >>> head = VocabParallelHead.from_linear(nn.Linear(512, 32000, bias=False), comm)
        """
        shard = shard_vocabulary(linear.out_features, comm.world_size, comm.rank)
        slices = slices_of(linear, shard.scaled(1))
        head = cls(None, linear.out_features, comm, slices=slices)
        head.load_from(linear)
        return head

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, hidden] -> [rows, entries of this rank]; no communication.

        Packed weights give float32, the sums of the GEMM; others x's dtype.
        """
        self.require_loaded()
        packed = isinstance(self.weight, PackedWeight)
        return ops.matmul(x, self.weight, self.bias, float32_out=packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden] -> [..., entries of all ranks] in x's dtype, the same on every rank."""
        self.require_loaded()
        logits = ops.matmul(flat_rows(x), self.weight, self.bias)
        if self.comm.world_size > 1:
            # The first rank has the most entries.
            padded = F.pad(logits, (0, self.widths[0] - logits.shape[1]))
            every = ops.all_gather(padded, self.comm).unflatten(
                0, (self.comm.world_size, len(logits))
            )
            parts = [every[rank, :, :width] for rank, width in enumerate(self.widths)]
            logits = torch.cat(parts, dim=1)
        return logits.unflatten(0, x.shape[:-1])

"""Embedding from vocabulary shards; one packed weight can serve it and a tied head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from commfuse.ops._hierarchical import hierarchical_obstacle
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.ops.all_reduce import all_reduce
from commfuse.ops.all_reduce_rms_norm import all_reduce_rms_norm
from commfuse.ops.matmul import PackedWeight, Weight
from commfuse.runtime.communicator import Communicator


def _fake(tokens, weight, n, k, vocab_begin):
    return weight.new_empty((tokens.shape[0], k))


_embedding_shard = define(
    "embedding_shard(Tensor tokens, Tensor weight, int n, int k, int vocab_begin) -> Tensor", _fake
)


def reference(tokens: torch.Tensor, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of the shards put together."""
    return torch.cat(list(shards)).double()[tokens]


def _local_rows(tokens: torch.Tensor, w: Weight, vocab_begin: int) -> torch.Tensor:
    """Rows of this rank's shard, zero for the others' tokens."""
    if isinstance(w, PackedWeight):
        return _embedding_shard(tokens, w.data, w.n, w.k, vocab_begin)
    if w.shape[0] == 0:
        return w.new_zeros((tokens.shape[0], w.shape[1]))
    local = tokens - vocab_begin
    mine = (local >= 0) & (local < w.shape[0])
    rows = F.embedding(torch.where(mine, local, 0), w)
    return rows.masked_fill(~mine[:, None], 0)  # not times 0: row 0 may hold inf or NaN


def _with_backend(name: str):
    def run(tokens, w, vocab_begin, comm, norm_weight, eps):
        rows = _local_rows(tokens, w, vocab_begin)
        if norm_weight is not None:
            return all_reduce_rms_norm(rows, None, norm_weight, eps, comm, name)
        return all_reduce(rows, comm, name)

    return run


OP = Op(
    "vocab_parallel_embedding",
    (
        Backend("cpu", _with_backend("cpu"), cpu_obstacle),
        Backend("cuda", _with_backend("cuda"), cuda_obstacle),
        Backend("hierarchical", _with_backend("hierarchical"), hierarchical_obstacle),
        Backend("torch", _with_backend("torch"), torch_obstacle),
    ),
)


def vocab_parallel_embedding(
    tokens: torch.Tensor,
    w: Weight,
    vocab_begin: int,
    comm: Communicator,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The embedding of tokens from a vocabulary that is cut into shards.

    Args:
        tokens: int64 [rows], global ids, equal on all ranks.
        w: this rank's shard [entries, hidden]: a :class:`~commfuse.ops.PackedWeight` or a tensor.
        vocab_begin: global id of the shard's first entry.
        comm: every rank must call.
        norm_weight: [hidden], of an RMSNorm behind the embedding.
        eps: of RMSNorm.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"hierarchical"`` or ``"torch"``.

    Returns:
        [rows, hidden], equal on all ranks, zero for ids that no rank holds; with ``norm_weight``
        the pair (normalised, embedding).

    Raises:
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> h = vocab_parallel_embedding(tokens, w, vocab_begin, comm)
    """
    packed = isinstance(w, PackedWeight)
    run = OP.select(backend, comm, w.data if packed else w, packed)
    return run(tokens, w, vocab_begin, comm, norm_weight, eps)

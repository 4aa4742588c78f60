"""The next token at temperature 0, from logits that stay on their ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from commfuse.errors import CommfuseError
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_on_host_obstacle,
)
from commfuse.ops._sampling import Sampling
from commfuse.ops._triton import draw_triton, triton_draw_obstacle
from commfuse.runtime import torch_collectives
from commfuse.runtime.communicator import Communicator


def _fake(logits, vocab_begin, communicator):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_vocab_parallel_argmax = define(
    "vocab_parallel_argmax(Tensor logits, int vocab_begin, int communicator) -> Tensor", _fake
)


def reference(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The lowest index of the largest logit of all shards put side by side."""
    logits = torch.cat([shard.double() for shard in shards], dim=1)
    largest = logits == logits.max(dim=1, keepdim=True).values
    return largest.int().argmax(dim=1)


def _native(logits, vocab_begin, comm):
    return _vocab_parallel_argmax(logits, vocab_begin, comm.handle)


def _triton(logits, vocab_begin, comm):
    rows = len(logits)
    none = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    return draw_triton(
        "vocab_parallel_argmax", logits, none.new_empty(rows, 0), none,
        Sampling.of(rows).to(logits.device), none, vocab_begin, comm, False,
        lambda row, _: f"row {row}",
    )[0][:, 0]  # fmt: skip


def torch_argmax(
    logits: torch.Tensor,
    vocab_begin: int,
    comm: Communicator,
    place: Callable[[int], str] = "row {}".format,
) -> torch.Tensor:
    """The same by torch: local winners, gathered, compared. float64 holds score and id exactly.

    ``place`` names a row in errors.
    """
    rows = logits.shape[0]
    winners = torch.full((rows, 2), -torch.inf, dtype=torch.float64, device=logits.device)
    if logits.shape[1]:
        scores = logits.max(dim=1).values
        first = (logits == scores[:, None]).int().argmax(dim=1)
        winners = torch.stack((scores.double(), (first + vocab_begin).double()), dim=1)
    gathered = torch_collectives.all_gather(comm, winners)
    scores, ids = gathered[..., 0], gathered[..., 1]
    best = scores.max(dim=0).values
    for row, score in enumerate(best.tolist()):
        if score != score or score in (float("inf"), float("-inf")):
            raise CommfuseError(f"the logits of {place(row)} are {score}: no token can be chosen")
    ids = torch.where(scores == best, ids, torch.inf)
    return ids.min(dim=0).values.long()


OP = Op(
    "vocab_parallel_argmax",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("triton", _triton, triton_draw_obstacle, automatic=False),
        Backend("torch", torch_argmax, torch_on_host_obstacle),
    ),
)


def vocab_parallel_argmax(
    logits: torch.Tensor, vocab_begin: int, comm: Communicator, backend: str = "auto"
) -> torch.Tensor:
    """The id of the largest logit over all ranks' vocabulary shards, the lowest among equals.

    16 bytes per row and rank are exchanged, instead of the logits.

    Args:
        logits: [rows, size of this rank's shard], contiguous; padding must not be in it.
        vocab_begin: global id of the shard's first entry.
        comm: every rank must call.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"`` (on the CPU).

    Returns:
        int64 [rows], equal on all ranks.

    Raises:
        CommfuseError: a row is NaN, infinite, or -inf throughout; all ranks raise it. On a GPU the
            row's token is -1, and ``comm.check()`` raises it.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> tokens = vocab_parallel_argmax(logits, comm.rank * shard, comm)
    """
    run = OP.select(backend, comm, logits)
    return run(logits, vocab_begin, comm)

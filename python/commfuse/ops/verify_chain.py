"""Verification of draft tokens at temperature 0, on vocabulary shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commfuse.ops._registry import Backend, Op, cpu_obstacle, define, torch_obstacle
from commfuse.ops.vocab_parallel_argmax import reference as argmax_reference
from commfuse.ops.vocab_parallel_argmax import torch_argmax
from commfuse.runtime.communicator import Communicator


def _fake(logits, drafts, draft_lengths, vocab_begin, communicator):
    batch, longest = drafts.shape
    return drafts.new_empty((batch, longest + 1)), drafts.new_empty(batch)


_verify_chain = define(
    "verify_chain(Tensor logits, Tensor drafts, Tensor draft_lengths, int vocab_begin,"
    " int communicator) -> (Tensor, Tensor)",
    _fake,
)


def _accept(
    winners: Sequence[int], drafts: torch.Tensor, draft_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The accepted prefix of every draft and the target's own token behind it."""
    batch, longest = drafts.shape
    tokens = torch.full((batch, longest + 1), -1, dtype=torch.int64)
    accepted = torch.zeros(batch, dtype=torch.int64)
    begin = 0
    for request, length in enumerate(draft_lengths.tolist()):
        own = winners[begin : begin + length + 1]
        draft = drafts[request, :length].tolist()
        count = next((i for i in range(length) if own[i] != draft[i]), length)
        tokens[request, : count + 1] = torch.tensor(own[: count + 1])
        accepted[request] = count
        begin += length + 1
    return tokens, accepted


def reference(
    shards: Sequence[torch.Tensor], drafts: torch.Tensor, draft_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on all ranks' logits, token by token."""
    return _accept(argmax_reference(shards).tolist(), drafts, draft_lengths)


def _cpu(logits, drafts, draft_lengths, vocab_begin, comm):
    return _verify_chain(logits, drafts, draft_lengths, vocab_begin, comm.handle)


def _torch(logits, drafts, draft_lengths, vocab_begin, comm):
    winners = torch_argmax(logits, vocab_begin, comm)
    return _accept(winners.tolist(), drafts, draft_lengths)


OP = Op(
    "verify_chain",
    (Backend("cpu", _cpu, cpu_obstacle), Backend("torch", _torch, torch_obstacle)),
)


def verify_chain(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    draft_lengths: torch.Tensor,
    vocab_begin: int,
    comm: Communicator,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts every request's longest draft prefix that greedy decoding would have produced.

    At temperature 0 speculative decoding (Leviathan et al., 2023) accepts a draft token exactly
    where it is the target's argmax: the output is that of plain decoding. One exchange of eight
    bytes per row and rank decides.

    Args:
        logits: [sum of (draft length + 1), shard], request after request; row j of a request
            predicts the token behind its j-th draft token.
        drafts: int64 [batch, longest], padded with anything.
        draft_lengths: int64 [batch], each 0 to longest.
        vocab_begin: global id of the shard's first entry.
        comm: every rank must call, with equal drafts.
        backend: ``"auto"``, ``"cpu"`` or ``"torch"``.

    Returns:
        (tokens, accepted): int64 [batch, longest + 1], the accepted drafts and the target's own
        next token behind them, -1 beyond; int64 [batch], how many drafts were accepted.

    Raises:
        CommfuseError: a row is NaN, infinite, or -inf throughout; all ranks raise it.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> tokens, accepted = verify_chain(logits, drafts, lengths, vocab_begin, comm)
    """
    run = OP.select(backend, comm, logits)
    return run(logits, drafts, draft_lengths, vocab_begin, comm)

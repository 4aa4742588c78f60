"""Verification of chains of draft tokens on vocabulary shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_on_host_obstacle,
)
from commfuse.ops._sampling import (
    Sampling,
    check_rows,
    draw_row,
    gather_columns,
    log_probabilities_of,
)
from commfuse.ops._triton import draw_triton, triton_draw_obstacle
from commfuse.ops.vocab_parallel_argmax import torch_argmax
from commfuse.runtime.communicator import Communicator


class Verified(NamedTuple):
    """The result of :func:`verify_chain`.

    Attributes:
        tokens: int64 [batch, longest + 1]: the accepted drafts and the token behind them, then -1.
        accepted: int64 [batch]: how many drafts were accepted.
        log_probabilities: float32 [batch, longest + 1]: of the tokens, under softmax(logits), then
            0; or None.
    """

    tokens: torch.Tensor
    accepted: torch.Tensor
    log_probabilities: torch.Tensor | None


def _fake(
    logits, drafts, draft_lengths, draft_probabilities, temperature, top_k, top_p, seed, position,
    log_probabilities, vocab_begin, communicator,
):  # fmt: skip
    batch, longest = drafts.shape
    logs = drafts.new_empty((batch if log_probabilities else 0, longest + 1), dtype=torch.float32)
    return drafts.new_empty((batch, longest + 1)), drafts.new_empty(batch), logs


_verify_chain = define(
    "verify_chain(Tensor logits, Tensor drafts, Tensor draft_lengths, Tensor? draft_probabilities,"
    " Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor position,"
    " bool log_probabilities, int vocab_begin, int communicator) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def _accept(
    chosen: Sequence[int],
    logs: Sequence[float],
    drafts: torch.Tensor,
    draft_lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The accepted prefix of every draft and the token behind it, from every row's token."""
    batch, longest = drafts.shape
    device = drafts.device
    tokens = torch.full((batch, longest + 1), -1, dtype=torch.int64, device=device)
    token_logs = torch.zeros((batch, longest + 1), dtype=torch.float64, device=device)
    accepted = torch.zeros(batch, dtype=torch.int64, device=device)
    begin = 0
    for request, length in enumerate(draft_lengths.tolist()):
        own = chosen[begin : begin + length + 1]
        draft = drafts[request, :length].tolist()
        count = next((i for i in range(length) if own[i] != draft[i]), length)
        tokens[request, : count + 1] = torch.tensor(own[: count + 1])
        token_logs[request, : count + 1] = torch.tensor(logs[begin : begin + count + 1])
        accepted[request] = count
        begin += length + 1
    return tokens, accepted, token_logs


def _places(draft_lengths: torch.Tensor) -> list[tuple[int, int]]:
    """(request, row within it) of every row of the logits."""
    return [(b, j) for b, length in enumerate(draft_lengths.tolist()) for j in range(length + 1)]


def _name(place: tuple[int, int]) -> str:
    return f"request {place[0]}, row {place[1]}"


def reference(
    shards: Sequence[torch.Tensor],
    drafts: torch.Tensor,
    draft_lengths: torch.Tensor,
    sampling: Sampling,
    positions: torch.Tensor,
    draft_shards: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op on all ranks' logits (and draft probabilities), token by token."""
    logits, places = torch.cat(list(shards), dim=1), _places(draft_lengths)
    q = torch.cat(list(draft_shards), dim=1) if draft_shards is not None else None
    check_rows(logits, lambda row: _name(places[row]))
    options = list(zip(*(x.tolist() for x in sampling.tensors), strict=True))
    chosen, lengths = [], draft_lengths.tolist()
    for row, (request, index) in zip(logits, places, strict=True):
        draft = None
        if q is not None and index < lengths[request]:
            # Every request before this one has one row more than drafts.
            draft = (int(drafts[request, index]), q[len(chosen) - request])
        position = int(positions[request]) + index
        chosen.append(draw_row(row, options[request], position, draft=draft))
    own = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    return _accept(chosen, log_probabilities_of(logits, own).tolist(), drafts, draft_lengths)


def _native(
    logits, drafts, draft_lengths, sampling, positions, vocab_begin, comm, draft_probabilities,
    log_probabilities,
):  # fmt: skip
    return _verify_chain(
        logits, drafts, draft_lengths, draft_probabilities, *sampling.tensors, positions,
        log_probabilities, vocab_begin, comm.handle,
    )  # fmt: skip


def _triton(
    logits, drafts, draft_lengths, sampling, positions, vocab_begin, comm, draft_probabilities,
    log_probabilities,
):  # fmt: skip
    return draw_triton(
        "verify_chain", logits, drafts, draft_lengths, sampling, positions, vocab_begin, comm,
        log_probabilities, lambda request, row: _name((request, row)),
        draft_probabilities=draft_probabilities,
    )  # fmt: skip


def _torch(
    logits, drafts, draft_lengths, sampling, positions, vocab_begin, comm, draft_probabilities,
    log_probabilities,
):  # fmt: skip
    if sampling.greedy and not log_probabilities:
        places = _places(draft_lengths)
        winners = torch_argmax(logits, vocab_begin, comm, lambda row: _name(places[row])).tolist()
        return _accept(winners, [0.0] * len(winners), drafts, draft_lengths)
    q = None if draft_probabilities is None else [gather_columns(draft_probabilities, comm)]
    shards = [gather_columns(logits, comm)]
    tokens, accepted, logs = reference(shards, drafts, draft_lengths, sampling, positions, q)
    return tokens, accepted, logs.float()


OP = Op(
    "verify_chain",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("triton", _triton, triton_draw_obstacle, automatic=False),
        Backend("torch", _torch, torch_on_host_obstacle),
    ),
)


def verify_chain(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    draft_lengths: torch.Tensor,
    sampling: Sampling,
    positions: torch.Tensor,
    vocab_begin: int,
    comm: Communicator,
    *,
    draft_probabilities: torch.Tensor | None = None,
    log_probabilities: bool = False,
    backend: str = "auto",
) -> Verified:
    """Accepts a prefix of every request's draft so that the output is distributed as the target.

    Without ``draft_probabilities`` every row draws its token from the target, and drafts are
    accepted as long as they are what was drawn: with the same logits, the tokens are those of
    :func:`vocab_parallel_sample` without speculation, one by one. With them, a draft x is accepted
    with probability min(1, p(x) / q(x)), and a refused one replaced by a draw from max(p - q, 0)
    (speculative sampling, Leviathan et al., 2023). p is the target after temperature, top-k and
    top-p.

    The exchange per row and rank is that of :func:`vocab_parallel_sample`; with
    ``draft_probabilities`` 20 bytes more. Ids outside the vocabulary are never accepted, nor are
    drafts with p = 0 or q = 0.

    On a GPU everything lies there, ``sampling`` too (:meth:`Sampling.to`), and is read when the
    kernel runs: a captured call may be replayed with other lengths. Logits may then have more rows
    than the requests need.

    Args:
        logits: [sum of (draft length + 1), shard], request after request; row j of a request
            predicts the token behind its j-th draft token.
        drafts: int64 [batch, longest], padded with anything.
        draft_lengths: int64 [batch], each 0 to longest.
        sampling: how to draw, for each request.
        positions: int64 [batch], in its sequence, of the token that a request's first row predicts.
        vocab_begin: global id of the shard's first entry, a multiple of 128 where a request draws;
            on a GPU always.
        comm: every rank must call, with equal drafts, options and positions.
        draft_probabilities: float32 [sum of draft lengths, shard], the distributions that the
            drafts were drawn from, by other noise (:func:`vocab_parallel_sample` with ``draft``).
        log_probabilities: return them.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` (without top-k, top-p and draft
            distributions) or ``"torch"`` (on the CPU).

    Raises:
        CommfuseError: a row is NaN, infinite, or -inf throughout; all ranks raise it, naming the
            request. On a GPU ``comm.check()`` raises it, and where the row decides, the tokens end
            with -1; likewise for draft lengths that do not fit.
        ValueError: shapes do not fit, or the shard is not cut at a multiple of 128; or not all
            tensors are on one device.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> sampling = Sampling.of(len(drafts), temperature=0.8, seed=7)
        >>> tokens, accepted, _ = verify_chain(
        ...     logits, drafts, draft_lengths, sampling, lengths, vocab_begin, comm
        ... )
    """
    run = OP.select(backend, comm, logits)
    tokens, accepted, logs = run(
        logits, drafts, draft_lengths, sampling, positions, vocab_begin, comm, draft_probabilities,
        log_probabilities,
    )  # fmt: skip
    return Verified(tokens, accepted, logs if log_probabilities else None)

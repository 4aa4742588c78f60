"""The next token of every request, drawn from logits that stay on their ranks."""

from __future__ import annotations

from collections.abc import Sequence

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
    DRAFT,
    TARGET,
    Sampling,
    check_rows,
    draw_row,
    gather_columns,
    log_probabilities_of,
)
from commfuse.ops._triton import draw_triton, triton_draw_obstacle
from commfuse.ops.vocab_parallel_argmax import torch_argmax
from commfuse.runtime.communicator import Communicator


def _fake(
    logits, temperature, top_k, top_p, seed, position, draft, log_probabilities, vocab_begin,
    communicator,
):  # fmt: skip
    rows = logits.shape[0]
    logs = logits.new_empty(rows if log_probabilities else 0, dtype=torch.float32)
    return logits.new_empty(rows, dtype=torch.int64), logs


_vocab_parallel_sample = define(
    "vocab_parallel_sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,"
    " Tensor seed, Tensor position, bool draft, bool log_probabilities, int vocab_begin,"
    " int communicator) -> (Tensor, Tensor)",
    _fake,
)


def reference(
    shards: Sequence[torch.Tensor],
    sampling: Sampling,
    positions: torch.Tensor,
    draft: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on all ranks' logits, row by row, with log-probabilities."""
    logits = torch.cat(list(shards), dim=1)
    check_rows(logits, lambda row: f"request {row}")
    options = list(zip(*(x.tolist() for x in sampling.tensors), strict=True))
    tokens = [
        draw_row(row, options[b], position, DRAFT if draft else TARGET)
        for b, (row, position) in enumerate(zip(logits, positions.tolist(), strict=True))
    ]
    drawn = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    return drawn, log_probabilities_of(logits, drawn)


def _native(logits, sampling, positions, vocab_begin, comm, draft, log_probabilities):
    return _vocab_parallel_sample(
        logits, *sampling.tensors, positions, draft, log_probabilities, vocab_begin, comm.handle
    )


def _triton(logits, sampling, positions, vocab_begin, comm, draft, log_probabilities):
    one = torch.zeros_like(positions)
    tokens, _, logs = draw_triton(
        "vocab_parallel_sample", logits, one.new_empty(len(one), 0), one, sampling, positions,
        vocab_begin, comm, log_probabilities, lambda request, _: f"request {request}",
        DRAFT if draft else TARGET,
    )  # fmt: skip
    return tokens[:, 0], logs[:, 0]


def _torch(logits, sampling, positions, vocab_begin, comm, draft, log_probabilities):
    if sampling.greedy and not log_probabilities:
        place = "request {}".format
        return torch_argmax(logits, vocab_begin, comm, place), logits.new_empty(0)
    tokens, logs = reference([gather_columns(logits, comm)], sampling, positions, draft)
    return tokens, logs.float()


OP = Op(
    "vocab_parallel_sample",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("triton", _triton, triton_draw_obstacle, automatic=False),
        Backend("torch", _torch, torch_on_host_obstacle),
    ),
)


def vocab_parallel_sample(
    logits: torch.Tensor,
    sampling: Sampling,
    positions: torch.Tensor,
    vocab_begin: int,
    comm: Communicator,
    *,
    draft: bool = False,
    log_probabilities: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draws one token for every request from its probabilities over all ranks' shards.

    16 bytes per row and rank are exchanged instead of the logits; with top-k or top-p, the largest
    logit and histograms besides, from which the exact threshold follows; 16 more with
    log-probabilities.

    Given the same logits, the tokens are the same for every number of ranks, in every batch. The
    ``torch`` backend gathers the logits; it draws by the same noise, in float64.

    Args:
        logits: [batch, size of this rank's shard], contiguous; padding must not be in it.
        sampling: how to draw, for each request; on the logits' device (:meth:`Sampling.to`).
        positions: int64 [batch], of the tokens in their sequences: no two draws of a request may
            have the same.
        vocab_begin: global id of the shard's first entry, a multiple of 128 where a request draws;
            on a GPU always.
        comm: every rank must call, with equal options and positions.
        draft: draw by the noise that is kept for drafts, on which that of :func:`verify_chain`
            does not depend.
        log_probabilities: return them.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` (without top-k, top-p and draft
            distributions) or ``"torch"`` (on the CPU).

    Returns:
        (tokens, log-probabilities): int64 [batch], equal on all ranks; float32 [batch], the tokens'
        natural logarithms under softmax(logits), before temperature, top-k and top-p; or None.

    Raises:
        CommfuseError: a request's logits are NaN, infinite, or -inf throughout; all ranks raise it.
            On a GPU the request's token is -1, and ``comm.check()`` raises it.
        ValueError: shapes do not fit, or the shard is not cut at a multiple of 128; or not all
            tensors are on one device.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> sampling = Sampling.of(2, temperature=0.8, top_p=0.95, seed=[1, 2])
        >>> tokens, _ = vocab_parallel_sample(logits, sampling, lengths, vocab_begin, comm)
    """
    run = OP.select(backend, comm, logits)
    tokens, logs = run(logits, sampling, positions, vocab_begin, comm, draft, log_probabilities)
    return tokens, logs if log_probabilities else None

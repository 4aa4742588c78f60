"""Drawing tokens from vocabulary shards: one launch, in which ranks exchange a candidate a row.

What is drawn is that of the other backends: per block of 128 tokens log(sum of weights) less the
logarithm of the noise (Philox4x32-10), the largest of all blocks and ranks, then a draw by weight
inside that block. A program draws all rows of a request, sends their candidates to every rank, and
takes the best of every rank's. For top-k, top-p and drafts with distributions it first learns what
``truncation`` finds.
"""

from __future__ import annotations

import torch

from commfuse.errors import UsageError

from .arguments import check_device, check_fits_slot, check_input
from .drawing import FIELDS, FIELDS_DISTRIBUTED, draw_kernel
from .truncation import BINS, STATE
from .workspace import DTYPES, OPS, Workspace, call_tag, options_code

BLOCKS = 8  # of tokens that a program looks at together
NUM_WARPS = 4

# What a row's status says of its logits; or of the draft's distribution.
STATUS = ("", "NaN", "infinite", "-inf throughout")
DRAFT_NAN = len(STATUS)
DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}  # bytes of a logit that differ


def words_of_row(truncated: bool, distributed: bool) -> int:
    """The most that a round exchanges for a row, int64 words."""
    fields = FIELDS_DISTRIBUTED if distributed else FIELDS
    return (BINS if truncated else fields).value


def draw(
    op: str,
    logits: torch.Tensor,
    drafts: torch.Tensor,
    lengths: torch.Tensor,
    sampling: tuple[torch.Tensor, ...],
    positions: torch.Tensor,
    stream: int,
    vocab_begin: int,
    log_probabilities: bool,
    workspace: Workspace,
    draft_probabilities: torch.Tensor | None = None,
    truncated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws every row's token and accepts drafts as long as they are what was drawn.

    Every rank must call with the same drafts and options. On CUDA the call returns at once; a
    failure is found later, by ``workspace.check()``.

    Args:
        op: the op's name.
        logits: [sum of (draft length + 1), shard], contiguous.
        drafts: int64 [batch, longest].
        lengths: int64 [batch], each 0 to longest.
        sampling: temperature float64, top_k int64, top_p float64 and seed int64 [batch], as of
            :class:`commfuse.ops.Sampling`.
        positions: int64 [batch].
        stream: of the noise.
        vocab_begin: global id of the shard's first entry.
        log_probabilities: find them.
        workspace: on the device of ``logits``.
        draft_probabilities: float32 [sum of draft lengths, shard], contiguous, or None.
        truncated: look at top_k and top_p; otherwise all tokens are drawn.

    Returns:
        tokens int64 and log-probabilities float32 [batch, longest + 1], accepted int64 [batch],
        and of every row an index of ``STATUS``: 0, or why it has no token; or ``DRAFT_NAN``.

    Raises:
        UsageError, BackendUnavailable, CommunicatorError: as :func:`~.all_reduce.all_reduce`; also
            BackendUnavailable where a slot cannot hold the rows.

    Example::

        tokens, logs, accepted, status = draw("verify_chain", logits, drafts, lengths, ...)
    """
    check_input(op, logits, workspace)
    check_device(draw_kernel, logits)
    temperature, top_k, top_p, seed = sampling
    q = draft_probabilities
    given = {
        "drafts": drafts, "lengths": lengths, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "seed": seed, "positions": positions, "draft_probabilities": q,
    }  # fmt: skip
    for name, tensor in given.items():
        if tensor is not None and not (tensor.device == logits.device and tensor.is_contiguous()):
            raise UsageError(f"{op}: {name} must be contiguous and on {logits.device}")
    rows, columns = logits.shape
    batch, longest = drafts.shape
    layout, digits = workspace.layout, DIGITS[logits.dtype]
    row_words = words_of_row(truncated, q is not None)
    check_fits_slot(op, f"what {rows} rows send", rows * row_words * 8, layout)
    out = drafts.new_empty((batch, longest + 1))
    logs = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    accepted, status = drafts.new_empty(batch), lengths.new_zeros(rows, dtype=torch.int32)
    row_begin = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
    state = lengths.new_zeros(rows, STATE.value)
    bins = lengths.new_zeros(2 * digits if truncated else 0, rows, BINS.value)
    code, dtype = OPS.index(op), DTYPES.index(logits.dtype)
    options = options_code(
        log_probabilities=logs if log_probabilities else None,
        draft_probabilities=q,
        truncation=top_k if truncated else None,
    )
    grid = max(1, min(batch, layout.max_blocks))
    with torch.cuda.device_of(logits):
        draw_kernel[(grid,)](
            logits, drafts, row_begin, logs if q is None else q, temperature, top_k, top_p, seed,
            positions, out, accepted, logs, status, state, bins,
            workspace.addresses, workspace.rank, columns, vocab_begin, batch, longest, stream,
            code, dtype, rows, options, call_tag(code, dtype, rows, batch, options),
            workspace.max_polls, LOGS=log_probabilities, TRUNCATED=truncated,
            DISTRIBUTED=q is not None, DIGITS=digits, BLOCKS=BLOCKS, ROW_WORDS=row_words,
            **layout.constants(), num_warps=NUM_WARPS,
        )  # fmt: skip
    if logits.device.type == "cpu":
        workspace.check()
    return out, logs, accepted, status

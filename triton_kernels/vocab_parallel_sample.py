"""Drawing tokens from vocabulary shards: one launch, in which ranks exchange a candidate a row.

What is drawn is that of the other backends: per block of 128 tokens log(sum of weights) less the
logarithm of the noise (Philox4x32-10), the largest of all blocks and ranks, then a draw by weight
inside that block. A program draws all rows of a request, sends their candidates to every rank, and
takes the best of every rank's. Served are greedy rows and rows that are drawn from the whole
target, with drafts that come without distributions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from commfuse.errors import UsageError

from .arguments import check_device, check_fits_slot, check_input
from .numerics import to_float32
from .protocol import (
    OK,
    begin,
    describe,
    finish,
    is_alive,
    own_address,
    signal,
    slot_pointer,
    wait,
)
from .workspace import DTYPES, OPS, Workspace, call_tag, options_code

TOKENS = tl.constexpr(128)  # that share one draw of noise
BLOCKS = 16  # of tokens that a program looks at together
FIELDS = tl.constexpr(4)  # of a candidate, int64: key, id, logit, log of the normaliser
NUM_WARPS = 4
WORD = tl.constexpr(0xFFFFFFFF)
NOBODY = tl.constexpr(0x7FFFFFFF)
LEAST = tl.constexpr(-3.4028234663852886e38)  # -inf never takes part

# What a row's status says.
STATUS = ("", "NaN", "infinite", "-inf throughout")


@triton.jit
def _uniforms(seed, position, stream, block):
    """Two uniform float64 in (0, 1) for each of the blocks, int64."""
    # In int64: products wrap around, and their bits are those of unsigned numbers.
    x0 = block * 0 + (position & WORD)
    x1 = block * 0 + ((position >> 32) & WORD)
    x2 = block
    x3 = block * 0 + stream
    k0 = seed & WORD
    k1 = (seed >> 32) & WORD
    for _ in tl.static_range(10):
        a = x0 * 0xD2511F53
        b = x2 * 0xCD9E8D57
        x0 = ((b >> 32) & WORD) ^ x1 ^ k0
        x1 = b & WORD
        x2 = ((a >> 32) & WORD) ^ x3 ^ k1
        x3 = a & WORD
        k0 = (k0 + 0x9E3779B9) & WORD
        k1 = (k1 + 0xBB67AE85) & WORD
    first = ((x1 << 21) | (x0 >> 11)).to(tl.float64) + 0.5
    second = ((x3 << 21) | (x2 >> 11)).to(tl.float64) + 0.5
    return first * 1.1102230246251565e-16, second * 1.1102230246251565e-16


@triton.jit(
    do_not_specialize=["rank", "vocab_begin", "batch", "longest", "stream", "op", "dtype", "rows",
                       "options", "tag", "max_polls"]
)  # fmt: skip
def draw_kernel(
    logits,  # [rows, columns]
    drafts, lengths,  # int64 [batch, longest] and [batch]
    temperature, seed, position,  # float64, int64, int64 [batch]
    tokens, accepted, logs, status,  # [batch, longest + 1], [batch], as tokens, int32 [rows]
    addresses,  # int64 [W]
    rank, columns, vocab_begin, batch, longest, stream, op, dtype, rows, options, tag, max_polls,
    LOGS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr,
    MAX_BLOCKS: tl.constexpr, GENERATIONS: tl.constexpr, WORDS: tl.constexpr,
    PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """The tokens of requests program, program + grid, ...; every rank's grid is the same."""
    program = tl.program_id(0)
    grid = tl.num_programs(0)
    token = tl.arange(0, TOKENS)
    number = tl.arange(0, BLOCKS)
    address = own_address(addresses, rank)
    if is_alive(address):
        generation = begin(address, program, GENERATIONS)
        first_block = vocab_begin // TOKENS

        request = program
        row = rows * 0  # the request's first one, int64 only where it must be
        before = rows * 0
        while request < batch:
            while before < request:
                row += tl.load(lengths + before).to(tl.int32) + 1
                before += 1
            heat = tl.load(temperature + request)
            greedy = heat == 0
            scale = (1.0 / tl.where(greedy, 1.0, heat)).to(tl.float32)
            own_seed = tl.load(seed + request)
            count = tl.load(lengths + request).to(tl.int32) + 1
            j = rows * 0
            while j < count:
                own_position = tl.load(position + request) + j
                base = logits + (row + j).to(tl.int64) * columns
                best = heat * 0 - float("inf")
                best_block = rows * 0 - 1
                unusable = rows * 0
                largest = scale * 0 - float("inf")
                normaliser = heat * 0
                start = rows * 0
                while start * TOKENS < columns:
                    block = start + number
                    column = block[:, None] * TOKENS + token[None, :]
                    x = to_float32(
                        tl.load(base + column, mask=column < columns, other=-float("inf"))
                    )
                    unusable += tl.sum(tl.sum((x != x).to(tl.int32), axis=1), axis=0)
                    x = tl.where(x == x, x, -float("inf"))
                    top = tl.max(x, axis=1)
                    shift = tl.where(top >= LEAST, top, 0.0)[:, None]
                    weights = tl.where(x >= LEAST, tl.exp((x - shift) * scale), 0.0)
                    sums = tl.sum(weights, axis=1)
                    first, _ = _uniforms(
                        own_seed, own_position, stream, first_block + block.to(tl.int64)
                    )
                    # A block beyond the end has no weight: its largest is -inf, and so its key.
                    key = top.to(tl.float64)
                    some = tl.where(sums > 0, sums, 1.0).to(tl.float64)
                    drawn = key * scale.to(tl.float64) + tl.log(some / -tl.log(first))
                    finite = (top >= LEAST) & (top <= -LEAST)
                    key = tl.where(heat != 0, tl.where(finite, drawn, key), key)
                    found = tl.max(key, axis=0)
                    where = tl.min(tl.where(key == found, block, NOBODY), axis=0)
                    better = found > best
                    best = tl.where(better, found, best)
                    best_block = tl.where(better, where, best_block)
                    if LOGS:
                        higher = tl.maximum(largest, tl.max(top, axis=0))
                        level = tl.where(higher >= LEAST, higher, 0.0)
                        here = tl.where(x >= LEAST, tl.exp(x - level), 0.0)
                        sum_here = tl.sum(tl.sum(here, axis=1).to(tl.float64), axis=0)
                        rescaled = tl.exp((largest - level).to(tl.float64))
                        normaliser = tl.where(largest >= LEAST, normaliser * rescaled, 0.0)
                        normaliser += sum_here
                        largest = higher
                    start += BLOCKS

                # The token inside the best block: all of it again.
                column = tl.maximum(best_block, 0) * TOKENS + token
                x = to_float32(tl.load(base + column, mask=column < columns, other=-float("inf")))
                top = tl.max(tl.where(x == x, x, -float("inf")), axis=0)
                shift = tl.where(top >= LEAST, top, 0.0)
                weights = tl.where(x >= LEAST, tl.exp((x - shift) * scale), 0.0).to(tl.float64)
                _, second = _uniforms(
                    own_seed, own_position, stream,
                    first_block + tl.maximum(best_block, 0).to(tl.int64),
                )  # fmt: skip
                wanted = second * tl.sum(weights, axis=0)
                reached = (tl.cumsum(weights, axis=0) > wanted) & (weights > 0)
                inside = tl.min(tl.where(reached, token, TOKENS), axis=0)
                last = tl.max(tl.where(weights > 0, token, 0), axis=0)
                inside = tl.where(inside < TOKENS, inside, last)
                same = tl.min(tl.where(x == top, token, TOKENS), axis=0)
                inside = tl.where(greedy, same, inside)
                logit = tl.sum(tl.where(token == inside, x, 0.0), axis=0)
                id = vocab_begin + best_block * TOKENS + inside
                # NaN is told by an id that no token has.
                id = tl.where(unusable > 0, -1, tl.where(best_block < 0, NOBODY, id))
                log_sum = tl.where(
                    normaliser > 0,
                    largest.to(tl.float64) + tl.log(tl.where(normaliser > 0, normaliser, 1.0)),
                    -float("inf"),
                )
                for peer in tl.static_range(W):
                    slot = slot_pointer(
                        tl.load(addresses + peer), generation, rank, tl.int64, PAYLOAD, HALF, SLOT
                    ) + (row + j) * FIELDS  # fmt: skip
                    tl.store(slot, best.to(tl.int64, bitcast=True))
                    tl.store(slot + 1, id.to(tl.int64))
                    tl.store(slot + 2, logit.to(tl.float64).to(tl.int64, bitcast=True))
                    tl.store(slot + 3, log_sum.to(tl.int64, bitcast=True))
                j += 1
            request += grid

        if program == 0:
            describe(addresses, rank, generation, op, dtype, rows, batch, options, W, PADDED)
        signal(addresses, rank, generation, tag, 0, program, W, PADDED, MAX_BLOCKS, WORDS)
        outcome = wait(
            addresses, rank, generation, tag, 0, program, max_polls, W, PADDED, MAX_BLOCKS, WORDS
        )
        if outcome == OK:
            request = program
            row = rows * 0
            before = rows * 0
            while request < batch:
                while before < request:
                    row += tl.load(lengths + before).to(tl.int32) + 1
                    before += 1
                count = tl.load(lengths + request).to(tl.int32) + 1
                out = request * (longest + 1)
                going = rows >= 0
                right = rows * 0
                j = rows * 0
                while j < count:
                    source = tl.arange(0, PADDED)
                    first_slot = slot_pointer(
                        address, generation, rank * 0, tl.int64, PAYLOAD, HALF, SLOT
                    )
                    slot = first_slot + source * (SLOT // 8) + (row + j) * FIELDS
                    valid = source < W
                    keys = tl.load(slot, mask=valid, other=0).to(tl.float64, bitcast=True)
                    keys = tl.where(valid, keys, -float("inf"))
                    ids = tl.load(slot + 1, mask=valid, other=NOBODY)
                    broken = tl.min(ids, axis=0) < 0
                    key = tl.max(keys, axis=0)
                    # The lowest id among equals.
                    id = tl.min(tl.where(keys == key, ids, NOBODY), axis=0)
                    kind = tl.where(broken, 1, tl.where(key > 1.0e300, 2, 0))
                    kind = tl.where((kind == 0) & (key < -1.0e300), 3, kind)
                    tl.store(status + row + j, kind)
                    kept = going & (kind == 0)
                    tl.store(tokens + out + j, tl.where(kept, id, -1))
                    if LOGS:
                        logit = tl.load(slot + 2, mask=valid, other=0).to(tl.float64, bitcast=True)
                        logit = tl.sum(tl.where((keys == key) & (ids == id), logit, 0.0), axis=0)
                        parts = tl.load(slot + 3, mask=valid, other=0).to(tl.float64, bitcast=True)
                        parts = tl.where(valid, parts, -float("inf"))
                        level = tl.max(parts, axis=0)
                        total = level + tl.log(tl.sum(tl.exp(parts - level), axis=0))
                        tl.store(logs + out + j, tl.where(kept, logit - total, 0.0).to(tl.float32))
                    draft = tl.load(drafts + request * longest + j, mask=j < count - 1, other=-1)
                    follows = kept & (j < count - 1) & (draft == id)
                    right += follows.to(tl.int32)
                    going = going & follows
                    j += 1
                while j <= longest:
                    tl.store(tokens + out + j, rows.to(tl.int64) * 0 - 1)
                    if LOGS:
                        tl.store(logs + out + j, 0.0)
                    j += 1
                tl.store(accepted + request, right.to(tl.int64))
                request += grid
            finish(address, generation, program, grid, MAX_BLOCKS, GENERATIONS)


def draw(
    op: str,
    logits: torch.Tensor,
    drafts: torch.Tensor,
    lengths: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    stream: int,
    vocab_begin: int,
    log_probabilities: bool,
    workspace: Workspace,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws every row's token and accepts drafts as long as they are what was drawn.

    Every rank must call with the same drafts and options. On CUDA the call returns at once; a
    failure is found later, by ``workspace.check()``.

    Args:
        op: the op's name.
        logits: [sum of (draft length + 1), shard], contiguous.
        drafts: int64 [batch, longest].
        lengths: int64 [batch], each 0 to longest.
        temperature: float64 [batch]; 0: the largest logit.
        seed, positions: int64 [batch].
        stream: of the noise.
        vocab_begin: global id of the shard's first entry.
        log_probabilities: find them.
        workspace: on the device of ``logits``.

    Returns:
        tokens int64 and log-probabilities float32 [batch, longest + 1], accepted int64 [batch],
        and of every row an index of ``STATUS``: 0, or why it has no token.

    Raises:
        UsageError, BackendUnavailable, CommunicatorError: as :func:`~.all_reduce.all_reduce`; also
            BackendUnavailable where a slot cannot hold the rows.

    Example::

        tokens, logs, accepted, status = draw("verify_chain", logits, drafts, lengths, ...)
    """
    check_input(op, logits, workspace)
    check_device(draw_kernel, logits)
    for name, tensor in (("drafts", drafts), ("lengths", lengths), ("temperature", temperature),
                         ("seed", seed), ("positions", positions)):  # fmt: skip
        if tensor.device != logits.device or not tensor.is_contiguous():
            raise UsageError(f"{op}: {name} must be contiguous and on {logits.device}")
    rows, columns = logits.shape
    batch, longest = drafts.shape
    layout = workspace.layout
    check_fits_slot(op, f"what {rows} rows send", rows * FIELDS.value * 8, layout)
    out = drafts.new_empty((batch, longest + 1))
    logs = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    accepted, status = drafts.new_empty(batch), lengths.new_zeros(rows, dtype=torch.int32)
    code, dtype = OPS.index(op), DTYPES.index(logits.dtype)
    options = options_code(log_probabilities=logs if log_probabilities else None)
    grid = max(1, min(batch, layout.max_blocks))
    with torch.cuda.device_of(logits):
        draw_kernel[(grid,)](
            logits, drafts, lengths, temperature, seed, positions, out, accepted, logs, status,
            workspace.addresses, workspace.rank, columns, vocab_begin, batch, longest, stream,
            code, dtype, rows, options, call_tag(code, dtype, rows, batch, options),
            workspace.max_polls, LOGS=log_probabilities, BLOCKS=BLOCKS, **layout.constants(),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    if logits.device.type == "cpu":
        workspace.check()
    return out, logs, accepted, status

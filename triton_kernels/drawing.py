"""The kernel that draws tokens from vocabulary shards; ``vocab_parallel_sample`` launches it."""

import triton
import triton.language as tl

from .numerics import to_float32
from .protocol import OK, begin, finish, is_alive, own_address, slot_pointer
from .truncation import (
    BOUND,
    DRAFT_LOGIT,
    DRAFT_PROBABILITY,
    LARGEST,
    LEAST,
    MASS,
    ONE,
    STATE,
    TOKENS,
    WORD,
    exchange,
    find_bounds,
    key_of,
    put,
    rows_of,
)

# Of a candidate, int64: key, id, logit, log of the normaliser; for what the target has above a
# draft's distribution key, id, logit.
FIELDS = tl.constexpr(4)
FIELDS_DISTRIBUTED = tl.constexpr(7)
ACCEPTANCE = tl.constexpr(2)  # the stream of noise
NOBODY = tl.constexpr(0x7FFFFFFF)


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


@triton.jit
def _token_in(weights, block, seed, position, stream, first_block):
    """The place of a token of the best block that is drawn by weight: float64 [TOKENS]."""
    token = tl.arange(0, TOKENS)
    _, second = _uniforms(seed, position, stream, first_block + tl.maximum(block, 0).to(tl.int64))
    wanted = second * tl.sum(weights, axis=0)
    reached = (tl.cumsum(weights, axis=0) > wanted) & (weights > 0)
    inside = tl.min(tl.where(reached, token, TOKENS), axis=0)
    last = tl.max(tl.where(weights > 0, token, 0), axis=0)
    return tl.where(inside < TOKENS, inside, last)


@triton.jit(
    do_not_specialize=["rank", "vocab_begin", "batch", "longest", "stream", "op", "dtype", "rows",
                       "options", "tag", "max_polls"]
)  # fmt: skip
def draw_kernel(
    logits,  # [rows, columns]
    drafts, row_begin,  # int64 [batch, longest] and [batch + 1]
    q,  # float32 [drafts, columns], where DISTRIBUTED
    temperature, top_k, top_p, seed, position,  # float64, int64, float64, int64, int64 [batch]
    tokens, accepted, logs, status,  # [batch, longest + 1], [batch], as tokens, int32 [rows]
    state, bins,  # int64 [rows, STATE] and [2 * DIGITS, rows, BINS], zero
    addresses,  # int64 [W]
    rank, columns, vocab_begin, batch, longest, stream, op, dtype, rows, options, tag, max_polls,
    LOGS: tl.constexpr, TRUNCATED: tl.constexpr, DISTRIBUTED: tl.constexpr, DIGITS: tl.constexpr,
    BLOCKS: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr,
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
        outcome = rows * 0 + OK
        if TRUNCATED or DISTRIBUTED:
            outcome, generation = find_bounds(
                logits, drafts, q, row_begin, temperature, top_k, top_p, state, bins, addresses,
                generation, rank, columns, vocab_begin, batch, longest, op, dtype, rows, options,
                tag, max_polls, TRUNCATED, DISTRIBUTED, DIGITS, ROW_WORDS, W, PADDED, MAX_BLOCKS,
                WORDS, PAYLOAD, HALF, SLOT,
            )  # fmt: skip
        if outcome == OK:
            request = program
            while request < batch:
                heat = tl.load(temperature + request)
                greedy = heat == 0
                scale = (1.0 / tl.where(greedy, 1.0, heat)).to(tl.float32)
                own_seed = tl.load(seed + request)
                row, end = rows_of(row_begin, request)
                first_row = row
                while row < end:
                    own_position = tl.load(position + request) + row - first_row
                    base = logits + row.to(tl.int64) * columns
                    # Every request before this one has one row more than drafts.
                    given = q + (row - request).to(tl.int64) * columns
                    drafted = row < end - 1
                    if TRUNCATED or DISTRIBUTED:
                        bound = tl.load(state + row * STATE + BOUND)
                    if DISTRIBUTED:
                        of_row = tl.load(state + row * STATE + LARGEST)
                        of_row = of_row.to(tl.float64, bitcast=True).to(tl.float32)
                        mass = tl.load(state + row * STATE + MASS).to(tl.float64)
                        per_weight = (1.0 / tl.where(mass > 0, mass, 1.0) * ONE).to(tl.float32)
                        left = heat * 0 - float("inf")  # the best key of what is left of the target
                        left_block = rows * 0 - 1
                        broken = rows * 0
                        own_columns = tl.where(drafted, columns, 0)
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
                        here = x >= LEAST
                        if TRUNCATED or DISTRIBUTED:
                            here = here & (key_of(x) >= bound)
                        weights = tl.where(here, tl.exp((x - shift) * scale), 0.0)
                        sums = tl.sum(weights, axis=1)
                        first, _ = _uniforms(
                            own_seed, own_position, stream, first_block + block.to(tl.int64)
                        )
                        # A block beyond the end has no weight: its largest is -inf, and so its key.
                        key = top.to(tl.float64)
                        some = tl.where(sums > 0, sums, 1.0).to(tl.float64)
                        drawn = key * scale.to(tl.float64) + tl.log(some / -tl.log(first))
                        drawn = tl.where(sums > 0, drawn, -float("inf"))
                        finite = (top >= LEAST) & (top <= -LEAST)
                        key = tl.where(heat != 0, tl.where(finite, drawn, key), key)
                        found = tl.max(key, axis=0)
                        where = tl.min(tl.where(key == found, block, NOBODY), axis=0)
                        better = found > best
                        best = tl.where(better, found, best)
                        best_block = tl.where(better, where, best_block)
                        if DISTRIBUTED:
                            likely = tl.load(given + column, column < own_columns, other=0.0)
                            broken += tl.sum(tl.sum((likely != likely).to(tl.int32), 1), axis=0)
                            p = tl.where(here, tl.exp((x - of_row) * scale), 0.0) * per_weight
                            sums = tl.sum(tl.where(p > likely, p - likely, 0.0), axis=1)
                            some = tl.where(sums > 0, sums, 1.0).to(tl.float64)
                            key = tl.where(sums > 0, tl.log(some / -tl.log(first)), -float("inf"))
                            found = tl.max(key, axis=0)
                            where = tl.min(tl.where(key == found, block, NOBODY), axis=0)
                            better = found > left
                            left = tl.where(better, found, left)
                            left_block = tl.where(better, where, left_block)
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
                    x = to_float32(
                        tl.load(base + column, mask=column < columns, other=-float("inf"))
                    )
                    top = tl.max(tl.where(x == x, x, -float("inf")), axis=0)
                    shift = tl.where(top >= LEAST, top, 0.0)
                    here = x >= LEAST
                    if TRUNCATED or DISTRIBUTED:
                        here = here & (key_of(x) >= bound)
                    weights = tl.where(here, tl.exp((x - shift) * scale), 0.0).to(tl.float64)
                    inside = _token_in(
                        weights, best_block, own_seed, own_position, stream, first_block
                    )
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
                    place = row * ROW_WORDS
                    field = tl.arange(0, 4)
                    message = tl.where(
                        field == 0, best.to(tl.int64, bitcast=True),
                        tl.where(
                            field == 1, id.to(tl.int64),
                            tl.where(
                                field == 2, logit.to(tl.float64).to(tl.int64, bitcast=True),
                                log_sum.to(tl.int64, bitcast=True),
                            ),
                        ),
                    )  # fmt: skip
                    put(addresses, generation, rank, place + field, message, W, PAYLOAD, HALF, SLOT)
                    if DISTRIBUTED:
                        column = tl.maximum(left_block, 0) * TOKENS + token
                        x = to_float32(
                            tl.load(base + column, mask=column < columns, other=-float("inf"))
                        )
                        likely = tl.load(given + column, column < own_columns, other=0.0)
                        here = (x >= LEAST) & (key_of(x) >= bound)
                        p = tl.where(here, tl.exp((x - of_row) * scale), 0.0) * per_weight
                        weights = tl.where(p > likely, p - likely, 0.0).to(tl.float64)
                        inside = _token_in(
                            weights, left_block, own_seed, own_position, stream, first_block
                        )
                        logit = tl.sum(tl.where(token == inside, x, 0.0), axis=0)
                        id = vocab_begin + left_block * TOKENS + inside
                        id = tl.where(broken > 0, -1, tl.where(left_block < 0, NOBODY, id))
                        message = tl.where(
                            field == 0, left.to(tl.int64, bitcast=True),
                            tl.where(
                                field == 1, id.to(tl.int64),
                                logit.to(tl.float64).to(tl.int64, bitcast=True),
                            ),
                        )  # fmt: skip
                        for peer in tl.static_range(W):
                            slot = slot_pointer(tl.load(addresses + peer), generation, rank,
                                                tl.int64, PAYLOAD, HALF, SLOT)  # fmt: skip
                            tl.store(slot + place + 4 + field, message, mask=field < 3)
                    row += 1
                request += grid
            outcome = exchange(addresses, rank, generation, tag, program, op, dtype, rows, batch,
                               options, max_polls, W, PADDED, MAX_BLOCKS, WORDS)  # fmt: skip
        if outcome == OK:
            source = tl.arange(0, PADDED)
            valid = source < W
            request = program
            while request < batch:
                heat = tl.load(temperature + request)
                row, end = rows_of(row_begin, request)
                first_row = row
                out = request * (longest + 1)
                going = rows >= 0
                right = rows * 0
                while row < end:
                    j = row - first_row
                    first_slot = slot_pointer(
                        address, generation, rank * 0, tl.int64, PAYLOAD, HALF, SLOT
                    )
                    slot = first_slot + source * (SLOT // 8) + row * ROW_WORDS
                    key, id, logit, broken = _winner(slot, valid)
                    kind = tl.where(broken, 1, tl.where(key > 1.0e300, 2, 0))
                    kind = tl.where((kind == 0) & (key < -1.0e300), 3, kind)
                    drafted = row < end - 1
                    draft = tl.load(drafts + request * longest + j, mask=drafted, other=-1)
                    if DISTRIBUTED:
                        kept = state + row * STATE
                        of_row = tl.load(kept + LARGEST).to(tl.float64, bitcast=True)
                        its_logit = tl.load(kept + DRAFT_LOGIT).to(tl.float64, bitcast=True)
                        likely = tl.load(kept + DRAFT_PROBABILITY).to(tl.float64, bitcast=True)
                        mass = tl.load(kept + MASS).to(tl.float64)
                        scale = (1.0 / tl.where(heat == 0, 1.0, heat)).to(tl.float32)
                        weight = tl.exp((its_logit - of_row) * scale.to(tl.float64))
                        target = weight * ONE / tl.where(mass > 0, mass, 1.0)
                        own_position = tl.load(position + request) + j
                        uniform, _ = _uniforms(
                            tl.load(seed + request), own_position, ACCEPTANCE,
                            own_position * 0,
                        )  # fmt: skip
                        bound = tl.load(kept + BOUND)
                        drawn = (its_logit >= LEAST) & (key_of(its_logit.to(tl.float32)) >= bound)
                        taken = drawn & (uniform * likely < target) & (likely > 0)
                        left, left_id, left_logit, broken = _winner(slot + 4, valid)
                        decides = drafted & (heat != 0)
                        kind = tl.where(decides & (kind == 0) & ~taken & broken, 4, kind)
                        # Where nothing is left, the target and the draft are the same.
                        other = decides & ~taken & (left > -float("inf"))
                        id = tl.where(other, left_id, id)
                        id = tl.where(decides & taken, draft, id)
                        logit = tl.where(other, left_logit, logit)
                        logit = tl.where(decides & taken, its_logit, logit)
                    tl.store(status + row, kind)
                    kept_token = going & (kind == 0)
                    tl.store(tokens + out + j, tl.where(kept_token, id, -1))
                    if LOGS:
                        parts = tl.load(slot + 3, mask=valid, other=0).to(tl.float64, bitcast=True)
                        parts = tl.where(valid, parts, -float("inf"))
                        level = tl.max(parts, axis=0)
                        total = level + tl.log(tl.sum(tl.exp(parts - level), axis=0))
                        log = tl.where(kept_token, logit - total, 0.0)
                        tl.store(logs + out + j, log.to(tl.float32))
                    follows = kept_token & drafted & (draft == id)
                    right += follows.to(tl.int32)
                    going = going & follows
                    row += 1
                j = row - first_row
                while j <= longest:
                    tl.store(tokens + out + j, rows.to(tl.int64) * 0 - 1)
                    if LOGS:
                        tl.store(logs + out + j, 0.0)
                    j += 1
                tl.store(accepted + request, right.to(tl.int64))
                request += grid
            finish(address, generation, program, grid, MAX_BLOCKS, GENERATIONS)


@triton.jit
def _winner(slot, valid):
    """The best of all ranks' candidates: key, id and logit, and whether a rank has seen NaN."""
    keys = tl.load(slot, mask=valid, other=0).to(tl.float64, bitcast=True)
    keys = tl.where(valid, keys, -float("inf"))
    ids = tl.load(slot + 1, mask=valid, other=NOBODY)
    logits = tl.load(slot + 2, mask=valid, other=0).to(tl.float64, bitcast=True)
    key = tl.max(keys, axis=0)
    # The lowest id among equals.
    id = tl.min(tl.where(keys == key, ids, NOBODY), axis=0)
    logit = tl.sum(tl.where((keys == key) & (ids == id), logits, 0.0), axis=0)
    return key, id, logit, tl.min(ids, axis=0) < 0

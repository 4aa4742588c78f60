"""What drawing needs to know of whole rows first: the largest logit, the bound of top-k and top-p,
the mass that is left, and a draft's place in it. Ranks exchange behind each of these steps.

Each exchange is a call of its own to the protocol: one more generation, the same for every program,
since their number follows from what is compiled. Programs need not go in step: one may begin while
a peer's still reads the last round of another. Therefore a row has the same place in the slots,
ROW_WORDS wide, in every round: words and slots of a program are then no other's, and the argument
of ``protocol`` holds for every program by itself.
"""

import triton
import triton.language as tl

from .numerics import to_float32
from .protocol import OK, describe, own_address, signal, slot_pointer, wait

TOKENS = tl.constexpr(128)  # that share one draw of noise
LEAST = tl.constexpr(-3.4028234663852886e38)  # -inf never takes part
BINS = tl.constexpr(256)
SPAN = tl.constexpr(512)  # logits that a program looks at together
WORD = tl.constexpr(0xFFFFFFFF)
ONE = tl.constexpr(1099511627776.0)  # 2^40: the largest weight, in integers

# What is kept of a row from step to step, int64 (or the bits of float64).
STATE = tl.constexpr(8)
LARGEST = tl.constexpr(0)
DRAFT_LOGIT = tl.constexpr(1)
DRAFT_PROBABILITY = tl.constexpr(2)
BOUND = tl.constexpr(3)  # the least key that is drawn
TARGET = tl.constexpr(4)  # tokens or mass that must lie at or above the bound
PREFIX = tl.constexpr(5)  # of the bound, as far as it is known
MASS = tl.constexpr(6)


@triton.jit
def key_of(x):
    """The order of float32 in that of integers, int64; -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & WORD
    return tl.where(bits >> 31 == 1, bits ^ WORD, bits | 0x80000000)


@triton.jit
def fixed(weight):
    """A weight of at most 1 as an integer, whose sums are the same in any order."""
    return (weight * ONE).to(tl.int64)


@triton.jit
def rows_of(row_begin, request):
    """The first row of a request and the one after its last, int32."""
    return tl.load(row_begin + request).to(tl.int32), tl.load(row_begin + request + 1).to(tl.int32)


@triton.jit
def exchange(addresses, rank, generation, tag, program, op, dtype, rows, batch, options, max_polls,
             W: tl.constexpr, PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr,
             WORDS: tl.constexpr):  # fmt: skip
    """Publishes what lies in the slots and waits for the peers; what ``wait`` returns."""
    if program == 0:
        describe(addresses, rank, generation, op, dtype, rows, batch, options, W, PADDED)
    signal(addresses, rank, generation, tag, 0, program, W, PADDED, MAX_BLOCKS, WORDS)
    return wait(
        addresses, rank, generation, tag, 0, program, max_polls, W, PADDED, MAX_BLOCKS, WORDS
    )


@triton.jit
def put(addresses, generation, rank, offset, values, W: tl.constexpr, PAYLOAD: tl.constexpr,
        HALF: tl.constexpr, SLOT: tl.constexpr):  # fmt: skip
    """Stores int64 values at an offset, in words, of this rank's slot on every rank."""
    for peer in tl.static_range(W):
        slot = slot_pointer(
            tl.load(addresses + peer), generation, rank, tl.int64, PAYLOAD, HALF, SLOT
        )
        tl.store(slot + offset, values)


@triton.jit
def find_bounds(
    logits, drafts, q, row_begin, temperature, top_k, top_p, state, bins, addresses,
    generation, rank, columns, vocab_begin, batch, longest, op, dtype, rows, options, tag,
    max_polls,
    TRUNCATED: tl.constexpr, DISTRIBUTED: tl.constexpr, DIGITS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    W: tl.constexpr, PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr, WORDS: tl.constexpr,
    PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Fills in the state of this program's rows.

    Returns what the last wait returned, and the generation of the next exchange.
    """
    program = tl.program_id(0)
    grid = tl.num_programs(0)
    token = tl.arange(0, SPAN)
    source = tl.arange(0, PADDED)
    bin_number = tl.arange(0, BINS)
    own = slot_pointer(own_address(addresses, rank), generation, rank * 0, tl.int64, PAYLOAD, HALF,
                       SLOT)  # fmt: skip

    # The largest logit, and the draft's logit and probability, which one rank has.
    request = program
    while request < batch:
        row, end = rows_of(row_begin, request)
        first = row
        while row < end:
            base = logits + row.to(tl.int64) * columns
            largest = tl.full([], -float("inf"), tl.float32)
            start = rows * 0
            while start < columns:
                x = to_float32(
                    tl.load(base + start + token, start + token < columns, other=-float("inf"))
                )
                largest = tl.maximum(largest, tl.max(tl.where(x == x, x, -float("inf")), axis=0))
                start += SPAN
            place = row * ROW_WORDS
            bits = largest.to(tl.float64).to(tl.int64, bitcast=True)
            put(addresses, generation, rank, place, bits, W, PAYLOAD, HALF, SLOT)
            if DISTRIBUTED:
                drafted = row < end - 1
                draft = tl.load(drafts + request * longest + row - first, drafted, other=-1)
                inside = (draft >= vocab_begin) & (draft < vocab_begin + columns)
                column = tl.where(inside, draft - vocab_begin, 0)
                logit = to_float32(tl.load(base + column, inside, other=-float("inf")))
                # Every request before this one has one row more than drafts.
                given = q + (row - request).to(tl.int64) * columns
                likely = tl.load(given + column, inside, other=0.0)
                bits = logit.to(tl.float64).to(tl.int64, bitcast=True)
                put(addresses, generation, rank, place + 1, bits, W, PAYLOAD, HALF, SLOT)
                bits = likely.to(tl.float64).to(tl.int64, bitcast=True)
                put(addresses, generation, rank, place + 2, bits, W, PAYLOAD, HALF, SLOT)
            row += 1
        request += grid
    outcome = rows * 0 + exchange(addresses, rank, generation, tag, program, op, dtype, rows, batch,
                                  options, max_polls, W, PADDED, MAX_BLOCKS, WORDS)  # fmt: skip
    if outcome == OK:
        request = program
        while request < batch:
            row, end = rows_of(row_begin, request)
            while row < end:
                slot = own + source * (SLOT // 8) + row * ROW_WORDS
                kept = state + row * STATE
                for field in tl.static_range(3 if DISTRIBUTED else 1):
                    theirs = tl.load(slot + field, source < W, other=0)
                    theirs = theirs.to(tl.float64, bitcast=True)
                    theirs = tl.where(source < W, theirs, -float("inf"))
                    most = tl.max(theirs, axis=0)
                    # A NaN of a draft's distribution is no maximum, and must not be lost.
                    most = tl.where(tl.sum((theirs != theirs).to(tl.int32), axis=0) > 0,
                                    float("nan"), most)  # fmt: skip
                    tl.store(kept + field, most.to(tl.int64, bitcast=True))
                lowest = tl.full([], 0, tl.int64)
                tl.store(kept + BOUND, lowest)
                row += 1
            request += grid
        # One thread's stores, for all threads' loads.
        tl.debug_barrier()
    generation += 1

    # Byte by byte of the bound, of top-k and then of top-p; not unrolled, which is long to compile.
    step = rows * 0
    while step < (2 * DIGITS if TRUNCATED else 0):
        by_mass = step >= DIGITS
        digit = step % DIGITS
        shift = 24 - 8 * digit
        own = slot_pointer(own_address(addresses, rank), generation, rank * 0, tl.int64, PAYLOAD,
                           HALF, SLOT)  # fmt: skip
        if outcome == OK:
            request = program
            while request < batch:
                row, end = rows_of(row_begin, request)
                heat = tl.load(temperature + request)
                scale = (1.0 / tl.where(heat == 0, 1.0, heat)).to(tl.float32)
                share, number = tl.load(top_p + request), tl.load(top_k + request)
                asked = tl.where(by_mass, share < 1, number > 0) & (heat != 0)
                while (row < end) & asked:
                    base = logits + row.to(tl.int64) * columns
                    kept = state + row * STATE
                    largest = tl.load(kept + LARGEST).to(tl.float64, bitcast=True).to(tl.float32)
                    bound = tl.load(kept + BOUND)
                    prefix = tl.where(digit == 0, 0, tl.load(kept + PREFIX))
                    histogram = bins + (step * rows + row).to(tl.int64) * BINS
                    start = rows * 0
                    while start < columns:
                        x = to_float32(tl.load(base + start + token, start + token < columns,
                                               other=-float("inf")))  # fmt: skip
                        key = key_of(x)
                        here = (x >= LEAST) & (key >= bound) & (key >> (shift + 8) == prefix)
                        mass = fixed(tl.where(here, tl.exp((x - largest) * scale), 0.0))
                        tl.atomic_add(histogram + ((key >> shift) & 255),
                                      tl.where(by_mass, mass, 1), here,
                                      sem="relaxed", scope="gpu")  # fmt: skip
                        start += SPAN
                    tl.debug_barrier()
                    counts = tl.load(histogram + bin_number, cache_modifier=".cg")
                    place = row * ROW_WORDS + bin_number
                    put(addresses, generation, rank, place, counts, W, PAYLOAD, HALF, SLOT)
                    row += 1
                request += grid
            outcome = exchange(addresses, rank, generation, tag, program, op, dtype, rows, batch,
                               options, max_polls, W, PADDED, MAX_BLOCKS, WORDS)  # fmt: skip
        if outcome == OK:
            request = program
            while request < batch:
                row, end = rows_of(row_begin, request)
                share, number = tl.load(top_p + request), tl.load(top_k + request)
                asked = tl.where(by_mass, share < 1, number > 0)
                asked = asked & (tl.load(temperature + request) != 0)
                while (row < end) & asked:
                    kept = state + row * STATE
                    counts = tl.zeros([BINS], tl.int64)
                    for peer in tl.static_range(W):
                        counts += tl.load(own + peer * (SLOT // 8) + row * ROW_WORDS + bin_number)
                    total = tl.sum(counts, axis=0)
                    above = total - tl.cumsum(counts, axis=0)  # of a bin: what lies above it
                    wanted = tl.maximum(tl.ceil(share * total.to(tl.float64)).to(tl.int64), 1)
                    wanted = tl.minimum(tl.where(by_mass, wanted, number), total)
                    target = tl.where(digit == 0, wanted, tl.load(kept + TARGET))
                    prefix = tl.where(digit == 0, 0, tl.load(kept + PREFIX))
                    bound = tl.load(kept + BOUND)
                    found = tl.max(tl.where(above + counts >= target, bin_number, 0), axis=0)
                    left = target - tl.sum(tl.where(bin_number == found, above, 0), axis=0)
                    prefix = prefix << 8 | found
                    last = tl.maximum(bound, prefix << shift)
                    # All threads have read the old state.
                    tl.debug_barrier()
                    tl.store(kept + TARGET, left)
                    tl.store(kept + PREFIX, prefix)
                    tl.store(kept + BOUND, tl.where(digit == DIGITS - 1, last, bound))
                    row += 1
                request += grid
            tl.debug_barrier()
        generation += 1
        step += 1

    if DISTRIBUTED:
        own = slot_pointer(own_address(addresses, rank), generation, rank * 0, tl.int64, PAYLOAD,
                           HALF, SLOT)  # fmt: skip
        if outcome == OK:
            request = program
            while request < batch:
                row, end = rows_of(row_begin, request)
                heat = tl.load(temperature + request)
                scale = (1.0 / tl.where(heat == 0, 1.0, heat)).to(tl.float32)
                while row < end:
                    base = logits + row.to(tl.int64) * columns
                    kept = state + row * STATE
                    largest = tl.load(kept + LARGEST).to(tl.float64, bitcast=True).to(tl.float32)
                    bound = tl.load(kept + BOUND)
                    mass = tl.full([], 0, tl.int64)
                    start = rows * 0
                    while start < columns:
                        x = to_float32(tl.load(base + start + token, start + token < columns,
                                               other=-float("inf")))  # fmt: skip
                        here = (x >= LEAST) & (key_of(x) >= bound)
                        weight = tl.where(here, tl.exp((x - largest) * scale), 0.0)
                        mass += tl.sum(fixed(weight), axis=0)
                        start += SPAN
                    put(addresses, generation, rank, row * ROW_WORDS, mass, W, PAYLOAD, HALF, SLOT)
                    row += 1
                request += grid
            outcome = exchange(addresses, rank, generation, tag, program, op, dtype, rows, batch,
                               options, max_polls, W, PADDED, MAX_BLOCKS, WORDS)  # fmt: skip
        if outcome == OK:
            request = program
            while request < batch:
                row, end = rows_of(row_begin, request)
                while row < end:
                    slot = own + source * (SLOT // 8) + row * ROW_WORDS
                    masses = tl.load(slot, source < W, other=0)
                    tl.store(state + row * STATE + MASS, tl.sum(masses, axis=0))
                    row += 1
                request += grid
            tl.debug_barrier()
        generation += 1
    return outcome, generation

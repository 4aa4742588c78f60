"""The signalling protocol of multi-rank Triton kernels: memory layout, signal, wait, failure.

The host's side (:class:`Layout`, :class:`Workspace`) is in ``workspace``. Here are the constants of
both and the ``@triton.jit`` functions, which a kernel calls in this order::

    address = own_address(...)                     this rank's workspace
    if is_alive(address):
        generation = begin(...)                    number of this call, from device memory
        ...store payload into the peers' slots...
        signal(...)                                release: publishes the payload
        if wait(...) == OK:                        acquire: every peer's payload is here
            ...read the slots...
            finish(...)                            next call's generation

Memory of one rank, in this order (all words int64, all ranks alike, zero when created)::

    abort word      0 while alive; afterwards 1 + the rank that reported the failure
    record          claimed, kind, rank, peer, generation, expected word, seen word
    descriptors     [parity][source] 8 words each: what every source called (block 0 writes them)
    generations     [block] number of calls that the block has completed
    words           [parity][phase][block][source] generation << 16 | tag
    arrivals        [block] generation in which the block last met the others of its grid
    squares         [block][row] float32 for what blocks that meet tell each other of a row
    payload         [parity][source] slots of a fixed number of bytes

Why it needs no barrier at the end of a call: a rank writes the slots of generation g + 2 (the same
half as g) only after it has seen every peer's word of generation g + 1, and a peer sends that word
only after its kernel of generation g, and with it every read of the slots of g, has ended. This
rests on three rules: calls of one workspace run one after the other (one stream); every call,
empty ones too, signals and awaits every rank; the slots have two halves, chosen by the parity of
the generation.

What bounds a wait: the number of polls, ``max_polls``, since Triton has no portable clock. A poll
is one load of all sources' words, so that the bound is a time only as far as the duration of a poll
is known (``workspace.POLLS_PER_SECOND`` is an estimate; on a machine under load the wait takes
longer, never for ever). The path that does not depend on counting is the abort word: the waiting
block reads it every ABORT_POLL_INTERVAL polls, peers set it when they fail, and the host sets it
(:meth:`Workspace.abort`) when it learns by other means that a peer is gone. After a failure every
later kernel returns at entry and stores nothing remotely: recovery is a new workspace.
"""

import triton
import triton.language as tl

# Byte offsets of the header, on both sides. Words that different parties write have lines of 128
# bytes of their own.
ABORT = tl.constexpr(0)
RECORD = tl.constexpr(128)
DESCRIPTORS = tl.constexpr(256)
DESCRIPTOR_WORDS = tl.constexpr(8)  # 64 bytes

# What ``wait`` returns, and the kind in a failure record.
OK = tl.constexpr(0)
TIMED_OUT = tl.constexpr(1)
MISMATCHED = tl.constexpr(2)
ABORTED = tl.constexpr(3)

ABORT_POLL_INTERVAL = tl.constexpr(64)

MAX_ROWS = tl.constexpr(64)  # of a call whose blocks meet

PHASES = tl.constexpr(2)  # a two-shot algorithm exchanges twice in one call; one-shot uses phase 0


@triton.jit
def _words_at(address):
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def _load_acquire(pointer, mask=None):
    # An atomic addition of zero is the load with acquire semantics that every supported Triton has,
    # compiled and interpreted.
    return tl.atomic_add(pointer, 0, mask=mask, sem="acquire", scope="sys")


@triton.jit
def own_address(addresses, rank):
    """Address of this rank's workspace."""
    return tl.load(addresses + rank)


@triton.jit
def is_alive(address):
    """Whether no failure has been reported to the workspace at ``address``."""
    return _load_acquire(_words_at(address + ABORT)) == 0


@triton.jit
def begin(address, block, GENERATIONS: tl.constexpr):
    """The generation of this call, 1 for the first one."""
    # Plain memory of this rank: only kernels of its one stream touch it. That the counter lives
    # here and not on the host lets a captured graph be replayed.
    return tl.load(_words_at(address + GENERATIONS) + block) + 1


@triton.jit
def finish(address, generation, block, grid, MAX_BLOCKS: tl.constexpr, GENERATIONS: tl.constexpr):
    """Counts this call for ``block`` and for the blocks that only a larger grid would have."""
    # Block b of this grid speaks for b, b + grid, ...: the next call may then use any grid.
    step = block + grid * tl.arange(0, MAX_BLOCKS)
    counters = _words_at(address + GENERATIONS) + step
    tl.store(counters, tl.zeros([MAX_BLOCKS], tl.int64) + generation, mask=step < MAX_BLOCKS)


@triton.jit
def slot_pointer(address, generation, source, dtype: tl.constexpr,
                 PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr):  # fmt: skip
    """Pointer to the slot of ``source`` in the workspace at ``address``, for this generation."""
    slot = address + PAYLOAD + (generation & 1) * HALF + source.to(tl.int64) * SLOT
    return tl.multiple_of(slot.to(tl.pointer_type(dtype)), 16)


@triton.jit
def describe(addresses, rank, generation, op, dtype, rows, columns, options,
             W: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Block 0, before it signals: tells every peer what this rank called."""
    peer = tl.arange(0, PADDED)
    field = tl.arange(0, DESCRIPTOR_WORDS)
    value = tl.where(field == 0, op, 0) + tl.where(field == 1, dtype, 0)
    value = value.to(tl.int64) + tl.where(field == 2, rows, 0) + tl.where(field == 3, columns, 0)
    value += tl.where(field == 4, options, 0)
    line = (generation & 1) * PADDED + rank
    table = _words_at(tl.load(addresses + peer, mask=peer < W, other=0) + DESCRIPTORS)
    pointers = table[:, None] + (line * DESCRIPTOR_WORDS + field)[None, :]
    values = tl.broadcast_to(value[None, :], [PADDED, DESCRIPTOR_WORDS])
    tl.store(pointers, values, mask=(peer < W)[:, None])


@triton.jit
def _word_offset(generation, phase, block, MAX_BLOCKS: tl.constexpr, PADDED: tl.constexpr,
                 WORDS: tl.constexpr):  # fmt: skip
    return WORDS + 8 * PADDED * (((generation & 1) * PHASES + phase) * MAX_BLOCKS + block)


@triton.jit
def signal(addresses, rank, generation, tag, phase, block, W: tl.constexpr, PADDED: tl.constexpr,
           MAX_BLOCKS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Tells every rank, this one included, that ``block`` has stored its payload."""
    # The barrier orders the stores of all threads of the block before the release below, which then
    # publishes them, and all that this rank wrote before, to whoever acquires the word.
    tl.debug_barrier()
    # One lane per peer, all at once: a loop over the peers would add up their latencies.
    peer = tl.arange(0, PADDED)
    offset = _word_offset(generation, phase, block, MAX_BLOCKS, PADDED, WORDS)
    words = _words_at(tl.load(addresses + peer, mask=peer < W, other=0) + offset) + rank
    word = tl.zeros([PADDED], tl.int64) + ((generation << 16) | tag)
    tl.atomic_xchg(words, word, mask=peer < W, sem="release", scope="sys")


@triton.jit
def wait(addresses, rank, generation, tag, phase, block, max_polls, W: tl.constexpr,
         PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Waits until ``block`` of every rank has signalled this generation.

    Returns OK, TIMED_OUT, MISMATCHED or ABORTED. Anything but OK has been reported to all ranks,
    and the caller must leave without reading payload or counting the call.
    """
    source = tl.arange(0, PADDED)
    valid = source < W
    address = own_address(addresses, rank)
    offset = _word_offset(generation, phase, block, MAX_BLOCKS, PADDED, WORDS)
    words = _words_at(address + offset) + source
    # A word of exactly this generation, not of a later one: the two tables of words make it
    # impossible to miss one, and a later one would mean that a peer has lost count.
    seen = _load_acquire(words, mask=valid)
    missing = tl.sum((valid & ((seen >> 16) != generation)).to(tl.int32), axis=0)
    polls = 0
    alive = True
    while (missing > 0) & (polls < max_polls) & alive:
        # Not through a function: the interpreter takes a millisecond to call one.
        seen = tl.atomic_add(words, 0, mask=valid, sem="acquire", scope="sys")
        missing = tl.sum((valid & ((seen >> 16) != generation)).to(tl.int32), axis=0)
        polls += 1
        if polls % ABORT_POLL_INTERVAL == 0:
            alive = is_alive(address)
    # Orders the payload reads of all threads of the block after the acquire above.
    tl.debug_barrier()

    expected = (generation << 16) | tag
    # Only block 0 compares tags. Ranks that disagree about the call may have different grids, so
    # that other blocks can have no counterpart at all: they wait for the abort word.
    wrong = valid & ((seen >> 16) != generation)
    status = OK
    if missing > 0:
        status = TIMED_OUT
        if not alive:
            status = ABORTED
    elif block == 0:
        wrong = valid & (seen != expected)
        if tl.sum(wrong.to(tl.int32), axis=0) > 0:
            status = MISMATCHED
    if (status == TIMED_OUT) | (status == MISMATCHED):
        peer = tl.min(tl.where(wrong, source, PADDED), axis=0)
        word = tl.sum(tl.where(source == peer, seen, 0), axis=0)
        if status == TIMED_OUT:
            # The last that the peer has sent may be in the table of the generation before.
            before = _word_offset(generation - 1, phase, block, MAX_BLOCKS, PADDED, WORDS)
            word = tl.maximum(word, _load_acquire(_words_at(address + before) + peer))
        _fail(addresses, rank, status, peer, generation, expected, word, W, PADDED)
    return status


@triton.jit
def meet(addresses, rank, generation, block, grid, max_polls, W: tl.constexpr,
         PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr, ARRIVALS: tl.constexpr):  # fmt: skip
    """Waits until every block of this rank's grid has come here; once in a call.

    What they stored before can be read afterwards. Returns what :func:`wait` returns. Triton's
    interpreter runs one block after the other: there a grid that meets must have one block.
    """
    address = own_address(addresses, rank)
    arrivals = _words_at(address + ARRIVALS)
    # Release: this block's stores, made visible to the others of the GPU.
    tl.debug_barrier()
    tl.atomic_xchg(arrivals + block, generation, sem="release", scope="gpu")
    other = tl.arange(0, MAX_BLOCKS)
    present = other < grid
    # A word for each block and not one counter: nothing has to be set back for the next call.
    missing = 1
    polls = 0
    alive = True
    # A block that waits for a peer may come as late as its own limit allows.
    while (missing > 0) & (polls // 2 < max_polls) & alive:
        seen = tl.atomic_add(arrivals + other, 0, mask=present, sem="acquire", scope="gpu")
        missing = tl.sum((present & (seen != generation)).to(tl.int32), axis=0)
        polls += 1
        if polls % ABORT_POLL_INTERVAL == 0:
            alive = is_alive(address)
    # Orders the reads of all threads of the block after the acquire above.
    tl.debug_barrier()

    status = OK
    if missing > 0:
        status = TIMED_OUT
        if not alive:
            status = ABORTED
        if status == TIMED_OUT:
            _fail(addresses, rank, status, rank, generation, generation << 16, generation * 0,
                  W, PADDED)  # fmt: skip
    return status


@triton.jit
def _fail(addresses, rank, kind, peer, generation, expected, seen,
          W: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Writes this rank's record, unless there is one, and sets every rank's abort word."""
    record = _words_at(own_address(addresses, rank) + RECORD)
    first = tl.atomic_cas(record, tl.zeros([], tl.int64), tl.full([], 1, tl.int64),
                          sem="acq_rel", scope="sys") == 0  # fmt: skip
    if first:
        tl.store(record + 1, kind.to(tl.int64))
        tl.store(record + 2, rank.to(tl.int64))
        tl.store(record + 3, peer.to(tl.int64))
        tl.store(record + 4, generation)
        tl.store(record + 5, expected)
        tl.store(record + 6, seen)
        tl.debug_barrier()
        # Release: whoever sees the abort word finds the record complete. The maximum, because two
        # ranks may fail at once: the word then names one of them, and both have their record.
        ranks = tl.arange(0, PADDED)
        aborts = _words_at(tl.load(addresses + ranks, mask=ranks < W, other=0) + ABORT)
        reporter = tl.zeros([PADDED], tl.int64) + (rank + 1)
        tl.atomic_max(aborts, reporter, mask=ranks < W, sem="release", scope="sys")

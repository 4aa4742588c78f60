"""Grouped-query attention over a KV cache: new keys and values appended, then attended to.

Two ways, for two kinds of passes. Decoding: a row's keys are cut into parts of fixed length, each
for a block of its own, so that one row keeps the whole GPU reading; a second kernel joins the
parts. Prefill: a block takes several rows and goes through their keys once. Which row is computed
with which does not change its bits in either.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from commfuse.errors import UsageError

from .arguments import check_device, check_like, overlap, wait_for_predecessor
from .numerics import dot, from_float32, inverse_root_mean_square, to_float32
from .workspace import DTYPES

# Keys of a block in decoding, and into how many parts a row's are cut at most: behind that many,
# parts double. A row's bits depend on both, so they are never tuned to a batch.
PART, MOST_PARTS = 128, 128
PARTS_AT_ONCE = 16  # that are joined in one step
DOT_ROWS = 16  # the fewest that tensor cores multiply
PREFILL_ROWS = 64  # queries of a block, rows times heads of a group
NUM_WARPS, PREFILL_WARPS = 4, 8


@triton.jit
def append_kernel(
    qkv,  # [rows, (heads + 2 kv_heads) * dim]
    q,  # [rows, heads * dim], written
    k_cache, v_cache,  # [sequences, kv_heads, max_length, dim], written
    cos, sin,  # float32 [positions, dim / 2]
    sequences, positions,  # int64 [rows]
    q_norm, k_norm,  # [dim] or None
    heads, kv_heads, max_length, dim, eps,
    HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, heads + kv_heads): normalises and rotates a head of Q or K, and copies V's."""
    wait_for_predecessor(OVERLAP, False)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, position = tl.load(sequences + row), tl.load(positions + row)
    half = dim // 2
    i = tl.arange(0, HALF)
    inside = i < half
    source = qkv + (row * (heads + 2 * kv_heads) + head) * dim + i
    first = to_float32(tl.load(source, mask=inside, other=0.0))
    second = to_float32(tl.load(source + half, mask=inside, other=0.0))
    if q_norm is not None:
        squares = tl.sum(first * first + second * second, axis=0)
        factor = inverse_root_mean_square(squares, dim, eps)
        if head < heads:
            scale = to_float32(tl.load(q_norm + i, mask=inside, other=0.0))
            scale_second = to_float32(tl.load(q_norm + half + i, mask=inside, other=0.0))
        else:
            scale = to_float32(tl.load(k_norm + i, mask=inside, other=0.0))
            scale_second = to_float32(tl.load(k_norm + half + i, mask=inside, other=0.0))
        first *= factor * scale
        second *= factor * scale_second
    c = tl.load(cos + position * half + i, mask=inside, other=0.0)
    s = tl.load(sin + position * half + i, mask=inside, other=0.0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    turned = from_float32(first * c - second * s, dtype)
    turned_second = from_float32(second * c + first * s, dtype)
    if head < heads:
        target = q + (row * heads + head) * dim + i
        tl.store(target, turned, mask=inside)
        tl.store(target + half, turned_second, mask=inside)
    else:
        place = ((sequence * kv_heads + head - heads) * max_length + position) * dim + i
        tl.store(k_cache + place, turned, mask=inside)
        tl.store(k_cache + place + half, turned_second, mask=inside)
        values = source + kv_heads * dim
        tl.store(v_cache + place, tl.load(values, mask=inside), mask=inside)
        tl.store(v_cache + place + half, tl.load(values + half, mask=inside), mask=inside)


@triton.jit
def _attend(
    q, keys, values, begin, end, seen, dim, scale, total, largest, weight,
    KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Takes positions begin to end - 1 into the running softmax of the queries q [M, DIM].

    ``seen`` [M] is the last position that a query sees, -1 for none. Of positions from ``end`` on
    nothing is read: they may hold anything, NaN too.
    """
    d = tl.arange(0, DIM)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        there = (j < end)[:, None] & (d < dim)[None, :]
        place = j[:, None] * dim + d[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], KEYS), tl.float32)) * scale
        scores = tl.where(j[None, :] <= seen[:, None], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1))
        # -inf - -inf is NaN: queries that have seen nothing yet are kept at 0.
        base = tl.where(now == float("-inf"), 0.0, now)
        kept = tl.exp2(largest - base)
        p = tl.exp2(scores - base[:, None])
        weight = weight * kept + tl.sum(p, axis=1)
        v = tl.load(values + place, mask=there, other=0.0)
        total = dot(from_float32(p, v.dtype), v, total * kept[:, None])
        largest = now
    return total, largest, weight


@triton.jit
def _part_length(position, PART: tl.constexpr, MOST_PARTS: tl.constexpr):
    """Keys of a part, for a row at ``position``: a function of that alone."""
    length = PART
    while length <= position // MOST_PARTS:
        length *= 2
    return length


@triton.jit
def decode_kernel(
    q,  # [rows, heads * dim]
    k_cache, v_cache,  # [sequences, kv_heads, max_length, dim]
    sequences, positions,  # int64 [rows]
    totals,  # float32 [rows, heads, parts, dim], written
    sums,  # float32 [rows, heads, parts, 2]: largest score, sum of weights; written
    heads, kv_heads, head_offset, group, max_length, dim, scale,
    GROUP: tl.constexpr, PART: tl.constexpr, MOST_PARTS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, kv_heads, parts): the queries of a KV head over one part of their keys."""
    wait_for_predecessor(OVERLAP, True)
    row, kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(2)
    position = tl.load(positions + row).to(tl.int32)
    length = _part_length(position, PART, MOST_PARTS)
    begin = part * length
    if begin <= position:
        member = tl.arange(0, GROUP)
        # The rank's first and last group may be cut.
        head = (head_offset // group + kv) * group + member - head_offset
        valid = (member < group) & (head >= 0) & (head < heads)
        d = tl.arange(0, DIM)
        inside = valid[:, None] & (d < dim)[None, :]
        mine = tl.load(q + (row * heads + head)[:, None] * dim + d[None, :], mask=inside, other=0.0)
        base = (tl.load(sequences + row) * kv_heads + kv) * max_length * dim
        end = tl.minimum(begin + length, position + 1)
        seen = tl.where(valid, position, -1)
        total, largest, weight = _attend(
            mine, k_cache + base, v_cache + base, begin, end, seen, dim, scale,
            tl.zeros((GROUP, DIM), tl.float32), tl.full((GROUP,), float("-inf"), tl.float32),
            tl.zeros((GROUP,), tl.float32), KEYS, DIM,
        )  # fmt: skip
        place = (row * heads + head) * parts + part
        tl.store(totals + place[:, None] * dim + d[None, :], total, mask=inside)
        tl.store(sums + place * 2, largest, mask=valid)
        tl.store(sums + place * 2 + 1, weight, mask=valid)


@triton.jit
def join_kernel(
    totals, sums,  # as decode_kernel has written them
    positions,  # int64 [rows]
    out,  # [rows, heads * dim], written
    heads, parts, dim,
    PART: tl.constexpr, MOST_PARTS: tl.constexpr, AT_ONCE: tl.constexpr, DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, heads): one head's output from its parts, always in the same order."""
    wait_for_predecessor(OVERLAP, True)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    count = position // _part_length(position, PART, MOST_PARTS) + 1
    d = tl.arange(0, DIM)
    begin = (row * heads + head) * parts
    total, weight = tl.zeros((DIM,), tl.float32), 0.0
    largest = float("-inf")
    for first in range(0, count, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        there = part < count
        place = begin + part
        score = tl.load(sums + place * 2, mask=there, other=float("-inf"))
        own = tl.load(sums + place * 2 + 1, mask=there, other=0.0)
        inside = there[:, None] & (d < dim)[None, :]
        values = tl.load(totals + place[:, None] * dim + d[None, :], mask=inside, other=0.0)
        # Every part holds a key that the row sees, so that no largest score is -inf.
        now = tl.maximum(largest, tl.max(score, axis=0))
        kept, factor = tl.exp2(largest - now), tl.exp2(score - now)
        weight = weight * kept + tl.sum(own * factor, axis=0)
        total = total * kept + tl.sum(values * factor[:, None], axis=0)
        largest = now
    target = out + (row * heads + head) * dim + d
    tl.store(target, from_float32(total / weight, out.dtype.element_ty), mask=d < dim)


@triton.jit(do_not_specialize=["rows"])
def prefill_kernel(
    q, k_cache, v_cache, sequences, positions,  # as for decode_kernel
    out,  # [rows, heads * dim], written
    rows, heads, kv_heads, head_offset, group, max_length, dim, scale,
    ROWS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows / ROWS, kv_heads): the queries of a KV head in ROWS rows, sequence by sequence."""
    wait_for_predecessor(OVERLAP, True)
    first, kv = tl.program_id(0) * ROWS, tl.program_id(1)
    m = tl.arange(0, ROWS * GROUP)
    row, member = (first + m // GROUP).to(tl.int64), m % GROUP
    head = (head_offset // group + kv) * group + member - head_offset
    valid = (row < rows) & (member < group) & (head >= 0) & (head < heads)
    d = tl.arange(0, DIM)
    inside = valid[:, None] & (d < dim)[None, :]
    place = (row * heads + head)[:, None] * dim + d[None, :]
    mine = tl.load(q + place, mask=inside, other=0.0)
    sequence = tl.load(sequences + row, mask=row < rows, other=-1)
    position = tl.load(positions + row, mask=row < rows, other=-1)
    total = tl.zeros((ROWS * GROUP, DIM), tl.float32)
    largest = tl.full((ROWS * GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS * GROUP,), tl.float32)
    # A block most often holds rows of one sequence alone: its keys are then read once.
    current = tl.min(tl.where(sequence >= 0, sequence, tl.max(sequence, axis=0)), axis=0)
    last = tl.max(sequence, axis=0)
    while current <= last:
        seen = tl.where(sequence == current, position, -1)
        end = (tl.max(seen, axis=0) + 1).to(tl.int32)
        base = (current * kv_heads + kv) * max_length * dim
        total, largest, weight = _attend(
            mine, k_cache + base, v_cache + base, 0, end, seen, dim, scale, total, largest,
            weight, KEYS, DIM,
        )  # fmt: skip
        after = tl.where(sequence > current, sequence, last + 1)
        current = tl.min(after, axis=0)
    result = from_float32(total / tl.where(valid, weight, 1.0)[:, None], out.dtype.element_ty)
    tl.store(out + place, result, mask=inside)


def keys_at_once(dtype: torch.dtype) -> int:
    """Keys that a block multiplies in one step: what fits its registers and shared memory."""
    return 32 if dtype == torch.float32 else 64


def padded(size: int, least: int = 1) -> int:
    """A power of two, as Triton's blocks are."""
    return max(least, triton.next_power_of_2(size))


def most_parts(span: int) -> int:
    """Into how many parts the keys of a row are cut that stands at no position from ``span`` on."""
    return min(triton.cdiv(span, PART), MOST_PARTS)


def prefill_rows(group: int) -> int:
    """Rows of a block in the prefill."""
    return max(1, PREFILL_ROWS // padded(group))


def attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    heads: int,
    head_offset: int,
    group: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    span: int | None,
) -> torch.Tensor:
    """As :func:`commfuse.ops.attention`, which says what the arguments are.

    Sequences and positions are read when the kernels run, and not checked: a captured call may be
    replayed with others.

    Raises:
        UsageError: the tensors do not fit each other.
        BackendUnavailable: CPU tensors, and Triton's interpreter is off.
    """
    _check(qkv, k_cache, v_cache, cos, sin, sequences, positions, heads, head_offset, group)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_like("attention", name, weight, qkv, v_cache.shape[3:])
    if (q_norm is None) != (k_norm is None):
        raise UsageError("attention: give both q_norm and k_norm, or neither")
    check_device(append_kernel, qkv)
    rows = len(qkv)
    _, kv_heads, max_length, dim = v_cache.shape
    q, out = qkv.new_empty(rows, heads * dim), qkv.new_empty(rows, heads * dim)
    if rows == 0:
        return out
    sizes = (heads, kv_heads, head_offset, group, max_length, dim, math.log2(math.e) / dim**0.5)
    blocks = {"KEYS": keys_at_once(qkv.dtype), "DIM": padded(dim, DOT_ROWS)}
    early = overlap(qkv)
    with torch.cuda.device_of(qkv):
        append_kernel[(rows, heads + kv_heads)](
            qkv, q, k_cache, v_cache, cos, sin, sequences, positions, q_norm, k_norm,
            heads, kv_heads, max_length, dim, eps, HALF=padded(dim // 2), num_warps=1, **early,
        )  # fmt: skip
        if span is None:
            of_block = prefill_rows(group)
            prefill_kernel[(triton.cdiv(rows, of_block), kv_heads)](
                q, k_cache, v_cache, sequences, positions, out, rows, *sizes,
                ROWS=of_block, GROUP=padded(group, DOT_ROWS // of_block), num_warps=PREFILL_WARPS,
                **blocks, **early,
            )  # fmt: skip
            return out
        parts = most_parts(min(span, max_length))
        totals = torch.empty(rows, heads, parts, dim, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(rows, heads, parts, 2, dtype=torch.float32, device=qkv.device)
        cut = {"PART": PART, "MOST_PARTS": MOST_PARTS}
        decode_kernel[(rows, kv_heads, parts)](
            q, k_cache, v_cache, sequences, positions, totals, sums, *sizes,
            GROUP=padded(group, DOT_ROWS), num_warps=NUM_WARPS, **cut, **blocks, **early,
        )  # fmt: skip
        join_kernel[(rows, heads)](
            totals, sums, positions, out, heads, parts, dim, AT_ONCE=PARTS_AT_ONCE,
            DIM=padded(dim), num_warps=NUM_WARPS, **cut, **early,
        )  # fmt: skip
    return out


def _check(qkv, k_cache, v_cache, cos, sin, sequences, positions, heads, head_offset, group):
    op = "attention"
    if qkv.dtype not in DTYPES:
        raise UsageError(f"{op}: dtype {qkv.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if qkv.dim() != 2 or v_cache.dim() != 4:
        raise UsageError(
            f"{op}: qkv is [rows, columns] and v_cache [sequences, kv_heads, max_length, dim], not "
            f"{list(qkv.shape)} and {list(v_cache.shape)}"
        )
    rows, (_, kv_heads, _, dim) = len(qkv), v_cache.shape
    if heads < 1 or head_offset < 0 or group < 1:
        raise UsageError(f"{op}: heads are ({heads}, {head_offset}, {group})")
    read = (head_offset + heads - 1) // group - head_offset // group + 1
    if kv_heads != read:
        raise UsageError(
            f"{op}: v_cache has {kv_heads} KV heads, and heads {head_offset} to "
            f"{head_offset + heads - 1} in groups of {group} read {read}"
        )
    check_like(op, "qkv", qkv, qkv, (rows, (heads + 2 * kv_heads) * dim))
    check_like(op, "v_cache", v_cache, qkv, v_cache.shape)
    check_like(op, "k_cache", k_cache, qkv, v_cache.shape)
    table = torch.empty(0, dtype=torch.float32, device=qkv.device)
    check_like(op, "cos", cos, table, (len(cos), dim // 2))
    check_like(op, "sin", sin, table, cos.shape)
    index = torch.empty(0, dtype=torch.int64, device=qkv.device)
    check_like(op, "sequences", sequences, index, (rows,))
    check_like(op, "positions", positions, index, (rows,))

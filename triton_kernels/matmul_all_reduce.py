"""Decode GEMM with its all-reduce in one launch: the weights stream, the finished tiles travel.

Such a GEMM (M <= 64) takes as long as its weights take to stream from memory. Every block computes
tiles of output columns for all rows, one after the other, in one loop over (tile, step along K):
the loads of the next tile are under way while a finished one is rounded and pushed to every peer.
After its last tile a block signals once, waits for the same block of every peer, and adds up what
it has received, in rank order. With RMSNorm, the blocks then tell each other the sums of squares of
their columns, and each normalises what it has just written::

    block 0   tile 0 |push| tile g   |push| signal, wait | add tiles 0, g   | meet | norm
    block 1   tile 1  |push| tile g+1 |push| signal, wait | add tiles 1, g+1 | meet | norm

Whose tile is whose depends on N and the workspace alone: peers, whose K may differ, cut alike. The
number of rows enters nowhere but as padding: a row's bits do not depend on its batch. To that end
the weights are the left operand of the products, whose instruction is then the same for any number
of rows, and everything after the exchange works on groups of 16 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from commfuse.errors import BackendUnavailable, UsageError

from .arguments import (
    aligned,
    check_aligned,
    check_device,
    check_fits_slot,
    check_input,
    check_like,
)
from .numerics import INTERPRETED, dot, from_float32, inverse_root_mean_square, to_float32
from .protocol import (
    MAX_ROWS,
    OK,
    begin,
    describe,
    finish,
    is_alive,
    meet,
    own_address,
    signal,
    slot_pointer,
    wait,
)
from .workspace import DTYPES, OPS, Layout, Workspace, call_tag, options_code

NUM_WARPS = 4
STEP_BYTES = 8192  # weights of one step along K, at most 256 bytes of each column
STEP_FLOAT32 = 16  # elements: without tensor cores a step lies in registers
MOST_STAGES = 16
STAGED_BYTES = 96 * 1024  # of shared memory; a block has 163 KB and more from compute 8.0 on
ROW_GROUP = tl.constexpr(16)  # rows that are added up and normalised together


@triton.jit
def _push(total, tile, addresses, rank, generation, rows, columns, dtype: tl.constexpr,
          TILE: tl.constexpr, PADDED_ROWS: tl.constexpr, W: tl.constexpr,
          PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr):  # fmt: skip
    """Stores a finished tile, float32 [TILE, PADDED_ROWS], into this rank's slot of every rank."""
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = (tile * TILE + tl.arange(0, TILE))[None, :]
    value = tl.trans(from_float32(total, dtype))
    for peer in tl.static_range(W):
        target = tl.load(addresses + peer)
        slot = slot_pointer(target, generation, rank, dtype, PAYLOAD, HALF, SLOT)
        tl.store(slot + row * columns + column, value, mask=(row < rows) & (column < columns))


@triton.jit
def _advance(total, step, steps, x, w, block, grid, addresses, rank, generation,
             rows, columns, depth, TILE: tl.constexpr, STEP: tl.constexpr,
             PADDED_ROWS: tl.constexpr, W: tl.constexpr,
             PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr):  # fmt: skip
    """One step of a block, of ``steps`` in each tile: returns the tile's sum so far."""
    dtype: tl.constexpr = x.dtype.element_ty
    tile = block + step // steps * grid
    k = step % steps * STEP + tl.arange(0, STEP)
    column = tile * TILE + tl.arange(0, TILE)
    row = tl.arange(0, PADDED_ROWS)
    weights = tl.load(
        w + column.to(tl.int64)[:, None] * depth + k[None, :],
        mask=(column < columns)[:, None] & (k < depth)[None, :],
        other=0.0,
        eviction_policy="evict_first",  # nobody reads them again; x is read by every block
    )
    inputs = tl.load(
        x + row[:, None] * depth + k[None, :],
        mask=(row < rows)[:, None] & (k < depth)[None, :],
        other=0.0,
        eviction_policy="evict_last",
    )
    total = dot(weights, tl.trans(inputs), total)
    if step % steps == steps - 1:
        _push(total, tile, addresses, rank, generation, rows, columns, dtype,
              TILE, PADDED_ROWS, W, PAYLOAD, HALF, SLOT)  # fmt: skip
        total = tl.zeros([TILE, PADDED_ROWS], tl.float32)
    return total


@triton.jit(do_not_specialize=["rank", "rows", "op", "dtype", "optional", "tag", "max_polls"])
def matmul_all_reduce_kernel(
    x, w,  # [rows, depth], [columns, depth]
    bias, residual, norm_weight,  # [columns], [rows, columns], [columns]; None each
    summed, normalised,  # [rows, columns]; without norm_weight the latter is None
    addresses,  # int64 [W]
    rank, rows, columns, depth, eps, op, dtype, optional, tag, max_polls,
    TILE: tl.constexpr, STEP: tl.constexpr, PADDED_ROWS: tl.constexpr, STAGES: tl.constexpr,
    W: tl.constexpr, PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr,
    GENERATIONS: tl.constexpr, WORDS: tl.constexpr,
    PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr,
    ARRIVALS: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """rows <= PADDED_ROWS <= MAX_ROWS; any grid <= MAX_BLOCKS, of 1 where blocks cannot meet."""
    block = tl.program_id(0)
    grid = tl.num_programs(0)
    dtype_: tl.constexpr = x.dtype.element_ty
    address = own_address(addresses, rank)
    if is_alive(address):
        generation = begin(address, block, GENERATIONS)

        # At least one step in a tile: a rank whose share of K is empty sends zeros.
        steps = tl.maximum(tl.cdiv(depth, STEP), 1)
        tiles = tl.cdiv(columns, TILE)
        count = (tiles - block + grid - 1) // grid * steps
        total = tl.zeros([TILE, PADDED_ROWS], tl.float32)
        if INTERPRETED:  # which cannot loop over a range: see all_reduce
            step = block * 0
            while step < count:
                total = _advance(
                    total, step, steps, x, w, block, grid, addresses, rank, generation,
                    rows, columns, depth, TILE, STEP, PADDED_ROWS, W, PAYLOAD, HALF, SLOT,
                )  # fmt: skip
                step += 1
        else:
            for step in tl.range(count, num_stages=STAGES):
                total = _advance(
                    total, step, steps, x, w, block, grid, addresses, rank, generation,
                    rows, columns, depth, TILE, STEP, PADDED_ROWS, W, PAYLOAD, HALF, SLOT,
                )  # fmt: skip
        if block == 0:
            describe(addresses, rank, generation, op, dtype, rows, columns, optional, W, PADDED)
        signal(addresses, rank, generation, tag, 0, block, W, PADDED, MAX_BLOCKS, WORDS)
        status = wait(
            addresses, rank, generation, tag, 0, block, max_polls, W, PADDED, MAX_BLOCKS, WORDS
        )
        if status == OK:
            # In rank order everywhere, so that every rank gets the same bits.
            first = slot_pointer(address, generation, rank * 0, dtype_, PAYLOAD, HALF, SLOT)
            squares = (address + SQUARES).to(tl.pointer_type(tl.float32))
            group = block * 0
            while group < rows:
                row = group + tl.arange(0, ROW_GROUP)
                # Element by element over the block's tiles, and across a tile once, at the end.
                group_squares = tl.zeros([ROW_GROUP, TILE], tl.float32)
                tile = block
                while tile < tiles:
                    column = tile * TILE + tl.arange(0, TILE)
                    mask = (row < rows)[:, None] & (column < columns)[None, :]
                    place = row[:, None] * columns + column[None, :]
                    value = to_float32(tl.load(first + place, mask=mask, other=0.0))
                    for source in tl.static_range(1, W):
                        slot = first + source * (SLOT // (dtype_.primitive_bitwidth // 8))
                        value += to_float32(tl.load(slot + place, mask=mask, other=0.0))
                    if bias is not None:
                        added = tl.load(bias + column, mask=column < columns, other=0.0)
                        value += to_float32(added)[None, :]
                    if residual is not None:
                        value += to_float32(tl.load(residual + place, mask=mask, other=0.0))
                    rounded = from_float32(value, dtype_)
                    tl.store(summed + place, rounded, mask=mask)
                    if norm_weight is not None:
                        # Of the rounded sum: it is what whoever reads the residual sees.
                        value = to_float32(rounded)
                        group_squares = tl.fma(value, value, group_squares)
                    tile += grid
                if norm_weight is not None:
                    tl.store(squares + block * MAX_ROWS + row, tl.sum(group_squares, axis=1))
                group += ROW_GROUP

            if norm_weight is not None:
                status = meet(
                    addresses, rank, generation, block, grid, max_polls,
                    W, PADDED, MAX_BLOCKS, ARRIVALS,
                )  # fmt: skip
            if status == OK:
                if norm_weight is not None:
                    other = tl.arange(0, MAX_BLOCKS)
                    group = block * 0
                    while group < rows:
                        row = group + tl.arange(0, ROW_GROUP)
                        parts = tl.load(
                            squares + other[None, :] * MAX_ROWS + row[:, None],
                            mask=(other < grid)[None, :] & (row < rows)[:, None],
                            other=0.0,
                        )
                        factor = inverse_root_mean_square(tl.sum(parts, axis=1), columns, eps)
                        tile = block
                        while tile < tiles:
                            column = tile * TILE + tl.arange(0, TILE)
                            mask = (row < rows)[:, None] & (column < columns)[None, :]
                            place = row[:, None] * columns + column[None, :]
                            value = to_float32(tl.load(summed + place, mask=mask, other=0.0))
                            scale = tl.load(norm_weight + column, mask=column < columns, other=0.0)
                            value = value * factor[:, None] * to_float32(scale)[None, :]
                            tl.store(normalised + place, from_float32(value, dtype_), mask=mask)
                            tile += grid
                        group += ROW_GROUP
                finish(address, generation, block, grid, MAX_BLOCKS, GENERATIONS)


def tile_columns(columns: int, max_blocks: int) -> int:
    """Output columns of a tile: those with which the busiest block has the least to do.

    A tile costs what 16 columns more would cost besides, since all of ``x`` is read for it.
    """

    def cost(tile: int) -> int:
        return -(-triton.cdiv(columns, tile) // max_blocks) * (tile + 16)

    return min((64, 32, 16), key=cost)


def grid_size(columns: int, layout: Layout, blocks_meet: bool) -> int:
    """Number of blocks: the same on every rank, as the protocol demands."""
    if INTERPRETED.value and blocks_meet:
        return 1  # the interpreter runs one block after the other
    tiles = triton.cdiv(columns, tile_columns(columns, layout.max_blocks))
    return max(1, min(tiles, layout.max_blocks))


def compile_constants(
    rows: int, columns: int, dtype: torch.dtype, layout: Layout
) -> dict[str, int]:
    """The compile-time arguments for a size. None of those that shape a sum depends on ``rows``."""
    padded_rows = max(ROW_GROUP.value, triton.next_power_of_2(rows))
    tile = tile_columns(columns, layout.max_blocks)
    step = min(STEP_BYTES // tile, 256) // dtype.itemsize
    if dtype == torch.float32:
        step = STEP_FLOAT32
    return {
        "TILE": tile,
        "STEP": step,
        "PADDED_ROWS": padded_rows,
        "STAGES": min(STAGED_BYTES // ((tile + padded_rows) * step * dtype.itemsize), MOST_STAGES),
        **layout.constants(),
        **layout.meeting_constants(),
    }


def matmul_all_reduce(
    x: torch.Tensor,
    w: torch.Tensor,
    summed: torch.Tensor,
    workspace: Workspace,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    normalised: torch.Tensor | None = None,
) -> None:
    """summed = sum of x wᵀ over ranks (+ bias) (+ residual); normalised = RMSNorm(summed).

    Partial products are summed over this rank's K in float32 and rounded to the dtype; the ranks'
    are added in float32, in rank order, and rounded once: every rank gets the same bits, and a
    row's do not depend on the other rows. Every rank must call with the same rows, columns, dtype
    and options.

    Args:
        x: [rows, k of this rank], contiguous, at most 64 rows; bfloat16, float16 or float32.
        w: [columns, k of this rank], contiguous. Rows of a multiple of 16 elements are fastest.
        summed: [rows, columns]; may be ``residual`` itself, but must not overlap it otherwise. It
            begins at a multiple of 16 bytes; a bias, residual or norm_weight that does not is
            copied.
        workspace: on the device of ``x``.
        bias: [columns], the whole bias, equal on all ranks; added once.
        residual: [rows, columns], equal on all ranks.
        norm_weight: [columns], equal on all ranks; given together with ``normalised``.
        eps: of RMSNorm, added to the mean square.
        normalised: [rows, columns], beginning at a multiple of 16 bytes.

    Raises:
        UsageError: the tensors do not fit the above.
        BackendUnavailable: CPU tensors, and Triton's interpreter is off; or more than 64 rows, or
            more of them than a slot holds.
        CommunicatorError: (CPU only) the call failed, or an earlier one did; see
            :meth:`Workspace.check`.

    Example::

        matmul_all_reduce(x, w, summed, workspace, residual=residual)
    """
    name = "matmul_all_reduce"
    check_input(name, x, workspace)
    if x.dim() != 2 or w.dim() != 2:
        raise UsageError(
            f"{name}: x must be [rows, k] and w [columns, k]; they have the shapes "
            f"{list(x.shape)} and {list(w.shape)}"
        )
    (rows, depth), columns = x.shape, w.shape[0]
    check_like(name, "w", w, x, (columns, depth))
    check_like(name, "bias", bias, x, (columns,))
    check_like(name, "norm_weight", norm_weight, x, (columns,))
    for argument, tensor in (
        ("residual", residual),
        ("summed", summed),
        ("normalised", normalised),
    ):
        check_like(name, argument, tensor, x, (rows, columns))
    if (norm_weight is None) != (normalised is None):
        raise UsageError(f"{name}: norm_weight and normalised are given together or not at all")
    for argument, tensor in (("summed", summed), ("normalised", normalised)):
        check_aligned(name, argument, tensor)
    check_device(matmul_all_reduce_kernel, x)
    if rows > MAX_ROWS.value:
        raise BackendUnavailable(
            f"{name}: the triton backend takes up to {MAX_ROWS.value} rows, not {rows}; use the "
            "torch backend for more, or call it for parts of the rows"
        )
    layout = workspace.layout
    check_fits_slot(name, f"the output of {rows} rows", summed.numel() * x.dtype.itemsize, layout)

    # Not x and w: how products are summed does not depend on their addresses.
    bias, residual, norm_weight = aligned(bias), aligned(residual), aligned(norm_weight)
    op, dtype = OPS.index(name), DTYPES.index(x.dtype)
    options = options_code(bias=bias, residual=residual, norm_weight=norm_weight)
    tag = call_tag(op, dtype, rows, columns, options)
    with torch.cuda.device_of(x):
        matmul_all_reduce_kernel[(grid_size(columns, layout, norm_weight is not None),)](
            x, w, bias, residual, norm_weight, summed, normalised, workspace.addresses,
            workspace.rank, rows, columns, depth, eps, op, dtype, options, tag,
            workspace.max_polls, **compile_constants(rows, columns, x.dtype, layout),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    if x.device.type == "cpu":
        workspace.check()  # the interpreter has finished; no device to wait for

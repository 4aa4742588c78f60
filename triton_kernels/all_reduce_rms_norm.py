"""All-reduce, residual addition and RMSNorm in one launch; the exchange is that of ``all_reduce``.

A block keeps its row in registers from the sum to the normalised output, so that the tail costs one
reduction across the block and no further traffic.
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
from .numerics import from_float32, inverse_root_mean_square, to_float32
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
from .workspace import DTYPES, OPS, Layout, Workspace, call_tag, options_code

MAX_COLUMNS = 1 << 20  # elements of one block of values in Triton


@triton.jit(do_not_specialize=["rank", "rows", "op", "dtype", "all_rows", "optional", "tag",
                               "max_polls"])  # fmt: skip
def all_reduce_rms_norm_kernel(
    x, residual, weight,  # [rows, columns], [rows, columns] or None, [columns]
    summed, normalised,  # [rows, columns]
    addresses,  # int64 [W]
    rank, rows, columns, eps, op, dtype, all_rows, optional, tag, max_polls,
    BLOCK: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr,
    GENERATIONS: tl.constexpr, WORDS: tl.constexpr,
    PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Rows that fit a slot, of a call with ``all_rows``; BLOCK >= columns; any grid <= MAX_BLOCKS.

    Block b takes the rows b, b + grid, ...; no sum depends on how many rows there are.
    """
    block = tl.program_id(0)
    grid = tl.num_programs(0)
    dtype_: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, BLOCK)
    mask = column < columns
    address = own_address(addresses, rank)
    if is_alive(address):
        generation = begin(address, block, GENERATIONS)

        row = block
        while row < rows:
            value = tl.load(x + row * columns + column, mask=mask)
            for peer in tl.static_range(W):
                target = tl.load(addresses + peer)
                slot = slot_pointer(target, generation, rank, dtype_, PAYLOAD, HALF, SLOT)
                tl.store(slot + row * columns + column, value, mask=mask)
            row += grid
        if block == 0:
            describe(addresses, rank, generation, op, dtype, all_rows, columns, optional, W, PADDED)
        signal(addresses, rank, generation, tag, 0, block, W, PADDED, MAX_BLOCKS, WORDS)

        # What no peer has a part in is loaded while their data is on its way.
        scale = to_float32(tl.load(weight + column, mask=mask, other=0.0))
        status = wait(
            addresses, rank, generation, tag, 0, block, max_polls, W, PADDED, MAX_BLOCKS, WORDS
        )
        if status == OK:
            # In rank order everywhere, so that every rank gets the same bits.
            first = slot_pointer(address, generation, rank * 0, dtype_, PAYLOAD, HALF, SLOT)
            row = block
            while row < rows:
                place = row * columns + column
                total = to_float32(tl.load(first + place, mask=mask, other=0.0))
                for source in tl.static_range(1, W):
                    slot = first + source * (SLOT // (dtype_.primitive_bitwidth // 8))
                    total += to_float32(tl.load(slot + place, mask=mask, other=0.0))
                if residual is not None:
                    total += to_float32(tl.load(residual + place, mask=mask, other=0.0))
                rounded = from_float32(total, dtype_)
                tl.store(summed + place, rounded, mask=mask)
                # Of the rounded sum: it is what whoever reads the residual sees.
                total = to_float32(rounded)
                factor = inverse_root_mean_square(tl.sum(total * total, axis=0), columns, eps)
                output = from_float32(total * factor * scale, dtype_)
                tl.store(normalised + place, output, mask=mask)
                row += grid
            finish(address, generation, block, grid, MAX_BLOCKS, GENERATIONS)


def block_size(columns: int) -> int:
    """Elements that a block has in its registers: a row, padded to a power of two."""
    return triton.next_power_of_2(max(columns, 16))


def num_warps(columns: int, dtype: torch.dtype) -> int:
    """Of a block: 16 bytes for each thread, up to 16 warps."""
    return max(1, min(block_size(columns) * dtype.itemsize // (16 * 32), 16))


def grid_size(rows: int, layout: Layout) -> int:
    """Number of blocks: the same on every rank, as the protocol demands."""
    return max(1, min(rows, layout.max_blocks))


def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    summed: torch.Tensor,
    normalised: torch.Tensor,
    workspace: Workspace,
) -> None:
    """summed = residual + the sum of ``x`` over ranks; normalised = RMSNorm(summed) · weight.

    The sum is formed in float32, in rank order, and rounded once; the norm is that of the rounded
    sum, in float32: every rank gets the same bits, and a row's do not depend on the other rows.
    RMSNorm: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. One launch for as
    many rows as a slot holds. Every rank must call with the same shapes, dtype and options.

    Args:
        x: [rows, columns], contiguous; bfloat16, float16 or float32.
        residual: [rows, columns], equal on all ranks, or None for zero.
        weight: [columns], equal on all ranks.
        eps: added to the mean square.
        summed: [rows, columns]; may be ``residual`` itself, but must not overlap it otherwise.
        normalised: [rows, columns].
        workspace: on the device of ``x``.

    Raises:
        UsageError: the tensors do not fit the above.
        BackendUnavailable: CPU tensors, and Triton's interpreter is off; or a row is longer than a
            slot, or than 2**20 elements.
        CommunicatorError: (CPU only) the call failed, or an earlier one did; see
            :meth:`Workspace.check`.

    Example::

        all_reduce_rms_norm(x, residual, weight, 1e-5, summed, normalised, workspace)
    """
    name = "all_reduce_rms_norm"
    check_input(name, x, workspace)
    if x.dim() != 2:
        raise UsageError(f"{name}: x must be [rows, columns]; it has shape {list(x.shape)}")
    rows, columns = x.shape
    for argument, tensor in (
        ("residual", residual),
        ("summed", summed),
        ("normalised", normalised),
    ):
        check_like(name, argument, tensor, x, x.shape)
    check_like(name, "weight", weight, x, (columns,))
    for argument, tensor in (("summed", summed), ("normalised", normalised)):
        check_aligned(name, argument, tensor)
    check_device(all_reduce_rms_norm_kernel, x)
    x, residual, weight = aligned(x), aligned(residual), aligned(weight)
    layout = workspace.layout
    row_bytes = columns * x.dtype.itemsize
    check_fits_slot(name, "one row", row_bytes, layout)
    if columns > MAX_COLUMNS:
        raise BackendUnavailable(
            f"{name}: the triton backend takes rows of up to {MAX_COLUMNS} elements, not {columns}"
        )

    op, dtype, options = OPS.index(name), DTYPES.index(x.dtype), options_code(residual=residual)
    tag = call_tag(op, dtype, rows, columns, options)
    rows_per_call = layout.slot_bytes // row_bytes if row_bytes else max(1, rows)
    with torch.cuda.device_of(x):
        for start in range(0, max(1, rows), rows_per_call):
            part = slice(start, min(start + rows_per_call, rows))
            count = part.stop - part.start
            all_reduce_rms_norm_kernel[(grid_size(count, layout),)](
                x[part], residual[part] if residual is not None else None, weight,
                summed[part], normalised[part], workspace.addresses, workspace.rank,
                count, columns, eps, op, dtype, rows, options, tag, workspace.max_polls,
                BLOCK=block_size(columns), **layout.constants(),
                num_warps=num_warps(columns, x.dtype),
            )  # fmt: skip
    if x.device.type == "cpu":
        workspace.check()  # the interpreter has finished; no device to wait for

"""One-shot all-reduce: every rank pushes its data to every peer, and each adds up what it received.

Latency is one signal, traffic W times the message per rank: the choice for small messages. The same
kernel runs on CUDA, over memory that GPUs map of each other, and in Triton's interpreter
(``TRITON_INTERPRET=1``), where the ranks are processes that share memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_input, check_like
from .numerics import from_float32, to_float32
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
from .workspace import DTYPES, OPS, Layout, Workspace, call_tag

TILE_BYTES = 4096  # one step of a block: 16 bytes for each of its 256 threads
NUM_WARPS = 8


@triton.jit(do_not_specialize=["rank", "op", "dtype", "rows", "columns", "tag", "max_polls"])
def all_reduce_kernel(
    x, out,  # [numel]
    addresses,  # int64 [W]
    rank, numel, op, dtype, rows, columns, tag, max_polls,
    BLOCK: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr, MAX_BLOCKS: tl.constexpr,
    GENERATIONS: tl.constexpr, WORDS: tl.constexpr,
    PAYLOAD: tl.constexpr, HALF: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """out[i] = sum of all ranks' x[i], for one message that fits a slot; any grid <= MAX_BLOCKS."""
    block = tl.program_id(0)
    grid = tl.num_programs(0)
    dtype_: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    address = own_address(addresses, rank)
    if is_alive(address):
        generation = begin(address, block, GENERATIONS)

        # Not a loop over range(): Triton 3.6's interpreter cannot turn a scalar into a Python int
        # where numpy is 2.4 or newer. The hint keeps the accesses 16 bytes wide.
        start = block * BLOCK
        while start < numel:
            start = tl.multiple_of(start, BLOCK)
            mask = start + lane < numel
            value = tl.load(x + start + lane, mask=mask)
            for peer in tl.static_range(W):
                target = tl.load(addresses + peer)
                slot = slot_pointer(target, generation, rank, dtype_, PAYLOAD, HALF, SLOT)
                tl.store(slot + start + lane, value, mask=mask)
            start += grid * BLOCK
        if block == 0:
            describe(addresses, rank, generation, op, dtype, rows, columns, 0, W, PADDED)
        signal(addresses, rank, generation, tag, 0, block, W, PADDED, MAX_BLOCKS, WORDS)

        status = wait(
            addresses, rank, generation, tag, 0, block, max_polls, W, PADDED, MAX_BLOCKS, WORDS
        )
        if status == OK:
            # In rank order everywhere, so that every rank gets the same bits.
            first = slot_pointer(address, generation, rank * 0, dtype_, PAYLOAD, HALF, SLOT)
            start = block * BLOCK
            while start < numel:
                start = tl.multiple_of(start, BLOCK)
                mask = start + lane < numel
                total = to_float32(tl.load(first + start + lane, mask=mask, other=0.0))
                for source in tl.static_range(1, W):
                    slot = first + source * (SLOT // (dtype_.primitive_bitwidth // 8))
                    total += to_float32(tl.load(slot + start + lane, mask=mask, other=0.0))
                tl.store(out + start + lane, from_float32(total, dtype_), mask=mask)
                start += grid * BLOCK
            finish(address, generation, block, grid, MAX_BLOCKS, GENERATIONS)


def block_size(dtype: torch.dtype) -> int:
    """Elements that a block moves in one step."""
    return TILE_BYTES // dtype.itemsize


def grid_size(numel: int, dtype: torch.dtype, layout: Layout) -> int:
    """Number of blocks for one message: the same on every rank, as the protocol demands."""
    return max(1, min(triton.cdiv(numel, block_size(dtype)), layout.max_blocks))


def all_reduce(x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> None:
    """Sums ``x`` over the ranks of ``workspace`` into ``out``.

    The sum is formed in float32, in rank order, and rounded once: every rank gets the same bits.
    Messages above the capacity of a slot are sent in several generations. Every rank must call with
    the same shape and dtype, empty tensors included. On CUDA the call returns at once; a failure is
    found later, by ``workspace.check()``. Compile before capturing a graph, by calling once.

    Args:
        x: any shape, contiguous; bfloat16, float16 or float32.
        out: shape, dtype and device of ``x``, contiguous; may be ``x`` itself, but must not overlap
            it otherwise.
        workspace: on the device of ``x``.

    Raises:
        UsageError: the tensors do not fit the above.
        BackendUnavailable: CPU tensors, and Triton's interpreter is off.
        CommunicatorError: (CPU only) the call failed, or an earlier one did; see
            :meth:`Workspace.check`.

    Example::

        workspace = Workspace.create(comm.rank, [comm.workspace(r) for r in range(comm.world_size)])
        all_reduce(x, out, workspace)
    """
    check_input("all_reduce", x, workspace)
    check_like("all_reduce", "out", out, x, x.shape)
    check_device(all_reduce_kernel, x)
    op, dtype = OPS.index("all_reduce"), DTYPES.index(x.dtype)
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns if columns else 0
    tag = call_tag(op, dtype, rows, columns, 0)
    layout = workspace.layout
    capacity = layout.slot_bytes // x.dtype.itemsize
    x, out = x.view(-1), out.view(-1)
    with torch.cuda.device_of(x):
        for start in range(0, max(1, x.numel()), capacity):
            part = x[start : start + capacity]
            all_reduce_kernel[(grid_size(part.numel(), x.dtype, layout),)](
                part, out[start : start + capacity], workspace.addresses, workspace.rank,
                part.numel(), op, dtype, rows, columns, tag, workspace.max_polls,
                BLOCK=block_size(x.dtype), **layout.constants(), num_warps=NUM_WARPS,
            )  # fmt: skip
    if x.device.type == "cpu":
        workspace.check()  # the interpreter has finished; no device to wait for

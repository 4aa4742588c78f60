"""silu(gate) · up behind the GEMM of a gated MLP, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from commfuse.errors import UsageError

from .arguments import check_device, overlap, wait_for_predecessor
from .numerics import from_float32, to_float32
from .workspace import DTYPES

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up, out, features, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Grid (rows, features / BLOCK): gate_up [rows, 2 features] -> out [rows, features]."""
    wait_for_predecessor(OVERLAP, True)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    source = gate_up + row * 2 * features + column
    gate = to_float32(tl.load(source, mask=mask, other=0.0))
    up = to_float32(tl.load(source + features, mask=mask, other=0.0))
    result = from_float32(gate / (1.0 + tl.exp(-gate)) * up, out.dtype.element_ty)
    tl.store(out + row * features + column, result, mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of rows that hold both; computed in float32 and rounded once.

    Args:
        gate_up: [rows, 2 features], contiguous, the gate first; bfloat16, float16 or float32.

    Returns:
        [rows, features].

    Raises:
        UsageError: another shape or dtype.
        BackendUnavailable: CPU tensors, and Triton's interpreter is off.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if gate_up.dtype not in DTYPES or gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise UsageError(
            f"silu_mul: gate_up is {gate_up.dtype}{list(gate_up.shape)}; [rows, 2 features] of "
            f"{', '.join(map(str, DTYPES))} is needed"
        )
    if not gate_up.is_contiguous():
        raise UsageError("silu_mul: gate_up must be contiguous")
    check_device(silu_mul_kernel, gate_up)
    rows, features = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, features)
    if out.numel():
        grid = (rows, triton.cdiv(features, BLOCK))
        with torch.cuda.device_of(gate_up):
            silu_mul_kernel[grid](
                gate_up, out, features, BLOCK=BLOCK, num_warps=4, **overlap(gate_up)
            )
    return out

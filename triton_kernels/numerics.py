"""Conversions between the wire dtypes (bfloat16, float16, float32) and float32, for kernels.

On a GPU these are Triton's own casts. Triton's interpreter, as of 3.9, truncates float32 to
bfloat16 where the hardware rounds to nearest even, and gets subnormal bfloat16 numbers wrong, so
that there the conversion is spelled out on the bits; results then agree with the GPU and torch.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_float32(value):
    """The exact float32 of ``value`` (any block of bfloat16, float16 or float32)."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def from_float32(value, dtype: tl.constexpr):
    """``value`` (a block of float32) rounded to nearest even in ``dtype``; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def dot(a, b, total):
    """``total`` + ``a`` ``b``, in float32: products of 16-bit inputs are exact, float32 is not cut.

    Triton's interpreter, as of 3.9, multiplies the bits of bfloat16 as if they were integers.
    """
    if INTERPRETED:
        return tl.dot(to_float32(a), to_float32(b), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def inverse_root_mean_square(squares, columns, eps):
    """What RMSNorm multiplies a row with, from the sum of its squares."""
    return 1.0 / tl.sqrt(squares / columns + eps)

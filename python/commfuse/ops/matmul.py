"""Packed weights and the GEMM over them: the column-parallel half of a layer, no communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from commfuse import _extension
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_kernel_obstacle,
    cuda_kernel_obstacle,
    define,
    torch_obstacle,
)

# Of csrc/cpu/kernel_table.h: outputs of one vector.
LANES = 16


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _pack_fake(w):
    k_step = 2 if w.dtype == torch.bfloat16 else 1
    return w.new_empty(_round_up(w.shape[0], LANES) * _round_up(w.shape[1], k_step))


def _matmul_fake(x, weight, n, bias, silu_mul, out_columns, out_float32):
    dtype = torch.float32 if out_float32 else x.dtype
    return x.new_empty((x.shape[0], out_columns), dtype=dtype)


_pack_weight = define("pack_weight(Tensor w) -> Tensor", _pack_fake)
_matmul = define(
    "matmul(Tensor x, Tensor weight, int n, Tensor? bias, bool silu_mul, int out_columns,"
    " bool out_float32) -> Tensor",
    _matmul_fake,
)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the order in which our CPU GEMM reads it: as one stream.

    Attributes:
        data: the packed elements, one-dimensional.
        n: packed rows.
        k: input features.
        out_features: rows of the result's width: ``n``, or half of it (less padding) for gate+up.
        gate_up: whether gate and up rows alternate in groups of 16, for ``silu(gate) * up``.
    """

    data: torch.Tensor
    n: int
    k: int
    out_features: int
    gate_up: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The elements' dtype."""
        return self.data.dtype

    def unpack(self) -> torch.Tensor:
        """The weight as it was packed, [n, k]; gate and up still alternate."""
        k_step = 2 if self.dtype == torch.bfloat16 else 1
        k_padded, begin = _round_up(self.k, k_step), 0
        panels = [self.data.new_empty((0, k_padded))]  # all there is of an empty shard
        while begin < _round_up(self.n, LANES):
            width = min(_extension.require().panel_columns, _round_up(self.n, LANES) - begin)
            panel = self.data[begin * k_padded : (begin + width) * k_padded]
            panel = panel.view(k_padded // k_step, width, k_step).permute(1, 0, 2)
            panels.append(panel.reshape(width, k_padded))
            begin += width
        return torch.cat(panels)[: self.n, : self.k].contiguous()


def pack_weight(w: torch.Tensor) -> PackedWeight:
    """Packs a weight [out, in] for :func:`matmul` and ``matmul_all_reduce`` on the CPU.

    Args:
        w: [n, k], rows contiguous; bfloat16, float16 or float32.

    Raises:
        BackendUnavailable: the extension is missing.

    Example:
        >>> w = pack_weight(torch.randn(4096, 2048, dtype=torch.bfloat16))
        >>> matmul(x, w).shape      # x is [rows, 2048]
        torch.Size([rows, 4096])
    """
    _extension.require()
    return PackedWeight(_pack_weight(w), *w.shape, w.shape[0])


def pack_gate_up(gate: torch.Tensor, up: torch.Tensor) -> PackedWeight:
    """Packs the two input weights of a gated MLP, so that one GEMM gives ``silu(gate) * up``.

    Args:
        gate, up: [intermediate, k] each (Shazeer, "GLU Variants Improve Transformer", 2020).

    Example:
        >>> h = matmul(x, pack_gate_up(gate, up))      # [rows, intermediate]
    """
    _extension.require()
    features, k = gate.shape
    padded = _round_up(features, LANES)
    pairs = gate.new_zeros((padded // LANES, 2, LANES, k))
    for index, half in enumerate((gate, up)):
        rows = half.new_zeros((padded, k))
        rows[:features] = half
        pairs[:, index] = rows.view(padded // LANES, LANES, k)
    data = _pack_weight(pairs.view(2 * padded, k))
    return PackedWeight(data, 2 * padded, k, features, gate_up=True)


Weight = torch.Tensor | PackedWeight


def gated_features(weight: Weight) -> int:
    """Features that :func:`gated_matmul` yields."""
    return weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0] // 2


def reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x wᵀ + bias in float64."""
    product = x.double() @ w.double().T
    return product if bias is None else product + bias.double()


def _cpu(x, w, bias, float32_out):
    return _matmul(x, w.data, w.n, bias, w.gate_up, w.out_features, float32_out)


def _cuda(x, w, bias, float32_out):
    return _matmul(x, w, w.shape[0], bias, False, w.shape[0], float32_out)


def _torch(x, w, bias, float32_out):
    if isinstance(w, PackedWeight):
        return _cpu(x, w, bias, float32_out)
    y = F.linear(x, w, bias)
    return y.float() if float32_out else y


OP = Op(
    "matmul",
    (
        Backend("cpu", _cpu, cpu_kernel_obstacle),
        Backend("cuda", _cuda, cuda_kernel_obstacle),
        Backend("torch", _torch, torch_obstacle),
    ),
)


def matmul(
    x: torch.Tensor,
    w: Weight,
    bias: torch.Tensor | None = None,
    *,
    float32_out: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """x wᵀ (+ bias), or silu(x gateᵀ) · (x upᵀ) for weights from :func:`pack_gate_up`.

    The CPU kernel streams the weights from memory once for up to six rows; a row's bits do not
    depend on how many rows there are.

    Args:
        x: [rows, k], contiguous; bfloat16, float16 or float32.
        w: on the CPU a :class:`PackedWeight`, or a tensor [n, k] for torch's own GEMM; on a GPU a
            tensor [n, k], which may be read before the kernel in front of this one has ended: a
            kernel of another library that writes it must not be that one (``docs/kernels.md``).
        bias: [n] in packed order, or None.
        float32_out: return the float32 sums instead of rounding them to ``x``'s dtype.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"torch"``. ``"cuda"`` has a kernel for
            up to 64 rows of bfloat16 or float16, which streams the weights once; the rest goes
            to torch's GEMM.

    Returns:
        [rows, out_features].

    Example:
        >>> y = matmul(x, pack_weight(w))
    """
    run = OP.select(backend, None, x, isinstance(w, PackedWeight))
    return run(x, w, bias, float32_out)


def gated_matmul(
    x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """silu(x gateᵀ + …) · (x upᵀ + …), for the two input weights of a gated MLP as one.

    Args:
        x: [rows, k], contiguous.
        w: on the CPU from :func:`pack_gate_up`; else a tensor [2 features, k], gate's rows first.
        bias: in the order of the weight's rows, or None.
        backend: of the GEMM.

    Returns:
        [rows, features].

    Raises:
        BackendUnavailable: as :func:`matmul`.

    Example:
        >>> h = gated_matmul(x, torch.cat((gate, up)))
    """
    y = matmul(x, w, bias, backend=backend)
    if isinstance(w, PackedWeight):
        return y
    if y.is_cuda:
        from commfuse.triton_kernels.silu_mul import silu_mul

        return silu_mul(y)
    gate, up = y.chunk(2, dim=1)
    return F.silu(gate) * up

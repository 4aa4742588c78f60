"""Linear layers and embeddings, cut by output features, input features or vocabulary entries."""

from __future__ import annotations

import torch
from torch import nn

from commfuse import _extension, ops
from commfuse.ops import PackedWeight
from commfuse.runtime.communicator import Communicator


def _prepare(weight: torch.Tensor) -> PackedWeight | torch.Tensor:
    """Packed where the CPU kernels will read it, else as it is."""
    if weight.device.type == "cpu" and _extension.module is not None:
        return ops.pack_weight(weight)
    return weight


class ColumnParallelLinear(nn.Module):
    """y = x wᵀ (+ bias) for the output features of this rank; no communication.

    Args:
        weight: [features of this rank, in_features].
        bias: [features of this rank] or None.

    Example:
        >>> y = ColumnParallelLinear(weight[span.begin:span.end])(x)
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = _prepare(weight)
        self.bias = bias

    def forward(self, x: torch.Tensor, float32_out: bool = False) -> torch.Tensor:
        """x: [rows, in_features] -> [rows, features of this rank]."""
        return ops.matmul(x, self.weight, self.bias, float32_out=float32_out)


class GatedColumnParallelLinear(nn.Module):
    """silu(x gateᵀ) · (x upᵀ) for the features of this rank, as one GEMM.

    Args:
        gate, up: [features of this rank, in_features] each.
        gate_bias, up_bias: [features of this rank] each, or None both.
    """

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ):
        super().__init__()
        self.weight = ops.pack_gate_up(gate, up)
        self.bias = None
        if gate_bias is not None:
            self.bias = ops.pack_gate_up(gate_bias[:, None], up_bias[:, None]).unpack().flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] -> [rows, features of this rank]."""
        return ops.matmul(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Sum over ranks of x wᵀ (+ bias), with the residual and the RMSNorm that may follow.

    Args:
        weight: [out_features, in_features of this rank].
        comm: the ranks that hold the other input features.
        bias: [out_features], whole on every rank, or None.

    Example:
        >>> h, residual = RowParallelLinear(weight, comm)(x, residual, norm_weight, eps)
    """

    def __init__(self, weight: torch.Tensor, comm: Communicator, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = _prepare(weight)
        self.comm = comm
        self.bias = bias

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As :func:`commfuse.ops.matmul_all_reduce`."""
        return ops.matmul_all_reduce(
            x,
            self.weight,
            self.comm,
            bias=self.bias,
            residual=residual,
            norm_weight=norm_weight,
            eps=eps,
        )


class VocabParallelEmbedding(nn.Module):
    """The embedding of a vocabulary that is cut over the ranks; also the head, where tied.

    Args:
        weight: [entries of this rank, hidden].
        vocab_begin: global id of the first entry.
        comm: the ranks that hold the others.
    """

    def __init__(self, weight: torch.Tensor, vocab_begin: int, comm: Communicator):
        super().__init__()
        self.weight = _prepare(weight)
        self.vocab_begin = vocab_begin
        self.comm = comm

    def forward(
        self, tokens: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 1e-6
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As :func:`commfuse.ops.vocab_parallel_embedding`."""
        return ops.vocab_parallel_embedding(
            tokens, self.weight, self.vocab_begin, self.comm, norm_weight=norm_weight, eps=eps
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The tied head: [rows, hidden] -> float32 [rows, entries of this rank]."""
        return ops.matmul(x, self.weight, float32_out=True)

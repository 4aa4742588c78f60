"""The transformer block: two half-blocks, each ending in one fused all-reduce."""

from __future__ import annotations

import torch
from torch import nn

from commfuse import ops
from commfuse.nn.attention import ParallelAttention
from commfuse.nn.linear import GatedColumnParallelLinear, RowParallelLinear
from commfuse.ops import BlockWeights, Placement


class ParallelMLP(nn.Module):
    """Gated MLP (Shazeer, "GLU Variants Improve Transformer", 2020) over a rank's features.

    Args:
        gate_up: the input layers.
        down: the output layer.
        eps: of the RMSNorm that follows.
    """

    def __init__(self, gate_up: GatedColumnParallelLinear, down: RowParallelLinear, eps: float):
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One half-block: (RMSNorm(residual'), residual') with residual' = residual + MLP(x)."""
        return self.down(self.gate_up(x), residual, norm_weight, self.eps)


class ParallelBlock(nn.Module):
    """Attention and MLP of one layer.

    The RMSNorm in front of the block belongs to whatever precedes it, since it rides on that
    all-reduce; in its place the block computes the norm of its successor.

    Args:
        attention: the first half.
        mlp: the second half.
        middle_norm: [hidden], RMSNorm between the halves.
        next_norm: [hidden], RMSNorm of the next block or of the head.
    """

    def __init__(
        self,
        attention: ParallelAttention,
        mlp: ParallelMLP,
        middle_norm: torch.Tensor,
        next_norm: torch.Tensor,
    ):
        super().__init__()
        self.attention = attention
        self.mlp = mlp
        q_norm, k_norm = attention.norms
        self.weights = BlockWeights(
            qkv=attention.qkv.weight,
            output=attention.output.weight,
            gate_up=mlp.gate_up.weight,
            down=mlp.down.weight,
            middle_norm=middle_norm,
            next_norm=next_norm,
            heads=attention.heads,
            eps=attention.eps,
            qkv_bias=attention.qkv.bias,
            output_bias=attention.output.bias,
            gate_up_bias=mlp.gate_up.bias,
            down_bias=mlp.down.bias,
            q_norm=q_norm,
            k_norm=k_norm,
        )

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        placement: Placement,
        read_next: ops.PackedWeight | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) [tokens, hidden] each, x normalised -> the same behind the block.

        One call of :func:`commfuse.ops.transformer_blocks`; running ``attention`` and ``mlp`` one
        after the other gives the same bits.
        """
        return ops.transformer_blocks(
            x,
            residual,
            [self.weights],
            [cache],
            placement,
            self.attention.output.comm,
            read_next=read_next,
        )

"""The transformer block: two half-blocks, each ending in one fused all-reduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn.attention import ParallelAttention
from commfuse.nn.linear import GatedColumnParallelLinear, RowParallelLinear
from commfuse.nn.norm import RMSNorm
from commfuse.nn.sharded import ShardedGroup, require_children
from commfuse.ops import BlockWeights, Placement
from commfuse.runtime.communicator import Communicator


class ParallelMLP(ShardedGroup):
    """Gated MLP (Shazeer, "GLU Variants Improve Transformer", 2020) over a rank's features.

    Its state dict has the keys of the unsharded module: ``gate_proj``, ``up_proj``, ``down_proj``.

    Args:
        gate_up: the input layers.
        down: the output layer.
        eps: of the RMSNorm that follows.
    """

    def __init__(
        self, gate_up: GatedColumnParallelLinear, down: RowParallelLinear, eps: float = 1e-6
    ):
        super().__init__({"": gate_up, "down_proj.": down})
        self.gate_up = gate_up
        self.down = down
        self.eps = eps

    @classmethod
    def from_mlp(cls, mlp: nn.Module, comm: Communicator, *, eps: float = 1e-6) -> ParallelMLP:
        """This rank's features of a module that every rank has whole, or on torch's meta device.

        Args:
            mlp: with linear layers ``gate_proj``, ``up_proj`` and ``down_proj``:
                down(silu(gate(x)) · up(x)), as in the Llama family of the transformers library.
            comm: the ranks.
            eps: of the RMSNorm that follows.

        Raises:
            UsageError: more ranks than features; parameters besides these; an ``act_fn`` that is
                not SiLU.

        Example:
            >>> mlp = ParallelMLP.from_mlp(layer.mlp, comm)
            >>> y = mlp(x)
        """
        require_children(mlp, ("gate_proj", "up_proj", "down_proj"))
        probe = torch.linspace(-4, 4, 9, device="cpu")
        if hasattr(mlp, "act_fn") and not torch.allclose(mlp.act_fn(probe), F.silu(probe)):
            raise UsageError(f"the MLP's act_fn is not SiLU but {mlp.act_fn}")
        features = mlp.gate_proj.out_features
        if comm.world_size > features:
            raise UsageError(f"tp={comm.world_size} exceeds the MLP's {features} features")
        layers = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}
        return cls(
            GatedColumnParallelLinear.from_linears(layers, comm),
            RowParallelLinear.from_linear(mlp.down_proj, comm),
            eps,
        )

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [..., hidden] -> MLP(x) (+ residual); or a half-block.

        With norm_weight [hidden] and x and residual [tokens, hidden]: (RMSNorm(residual'),
        residual') with residual' = residual + MLP(x).
        """
        return self.down(self.gate_up(x), residual, norm_weight, self.eps)


class ParallelBlock(nn.Module):
    """Attention and MLP of one layer.

    The RMSNorm in front of the block is computed by whatever precedes it, since it rides on that
    all-reduce; in its place the block computes the norm of its successor. Its state dict has the
    keys of the unsharded module.

    Args:
        self_attn: the first half.
        mlp: the second half.
        input_layernorm: the norm in front; the block only holds it.
        post_attention_layernorm: the norm between the halves.
    """

    def __init__(
        self,
        self_attn: ParallelAttention,
        mlp: ParallelMLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    @classmethod
    def from_block(cls, block: nn.Module, comm: Communicator) -> ParallelBlock:
        """This rank's part of a block that every rank has whole, or on torch's meta device.

        Args:
            block: with ``self_attn`` as :meth:`ParallelAttention.from_attention` takes it, ``mlp``
                as :meth:`ParallelMLP.from_mlp` does, and RMSNorms ``input_layernorm`` and
                ``post_attention_layernorm`` of one eps: a decoder layer of Llama, Mistral without
                its window, Qwen2 or Qwen3 of the transformers library, or one of your own.
            comm: the ranks.

        Raises:
            UsageError: the block is another; the message says in what.

        Example:
            >>> with torch.device("meta"):
            ...     whole = LlamaDecoderLayer(config, layer_idx=0)
            >>> block = ParallelBlock.from_block(whole, comm)
            >>> block.load_state_dict(state_of_the_unsharded_layer)
        """
        norms = ("input_layernorm", "post_attention_layernorm")
        require_children(block, ("self_attn", "mlp", *norms))
        before, between = (RMSNorm.from_norm(getattr(block, name)) for name in norms)
        attention = block.self_attn
        heads = [n for n in ("q_norm", "k_norm") if getattr(attention, n, None) is not None]
        every = [before, between, *(RMSNorm.from_norm(getattr(attention, n)) for n in heads)]
        if len({norm.eps for norm in every}) > 1:
            raise UsageError(f"RMSNorms of one eps are needed, not {[n.eps for n in every]}")
        return cls(
            ParallelAttention.from_attention(attention, comm, eps=before.eps),
            ParallelMLP.from_mlp(block.mlp, comm, eps=before.eps),
            before,
            between,
        )

    def weights(self, next_norm: torch.Tensor) -> BlockWeights:
        """What this rank holds of the block, for :func:`commfuse.ops.transformer_blocks`.

        Args:
            next_norm: [hidden], RMSNorm of the next block or of the head.
        """
        for part in (self.self_attn, self.mlp, self.post_attention_layernorm):
            part.require_loaded()
        q_norm, k_norm = self.self_attn.norm_weights
        return BlockWeights(
            qkv=self.self_attn.qkv.weight,
            output=self.self_attn.output.weight,
            gate_up=self.mlp.gate_up.weight,
            down=self.mlp.down.weight,
            middle_norm=self.post_attention_layernorm.weight,
            next_norm=next_norm,
            heads=self.self_attn.heads,
            eps=self.self_attn.eps,
            qkv_bias=self.self_attn.qkv.bias,
            output_bias=self.self_attn.output.bias,
            gate_up_bias=self.mlp.gate_up.bias,
            down_bias=self.mlp.down.bias,
            q_norm=q_norm,
            k_norm=k_norm,
        )

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        placement: Placement,
        next_norm: torch.Tensor,
        read_next: ops.PackedWeight | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) [tokens, hidden] each, x normalised -> the same behind the block.

        One call of :func:`commfuse.ops.transformer_blocks`; running ``self_attn`` and ``mlp`` one
        after the other gives the same bits.

        Args:
            x, residual: as the block or the embedding in front returned them.
            cache: K and V of this layer; written.
            placement: of the tokens.
            next_norm: [hidden], RMSNorm of the next block or of the head.
            read_next: as there.
        """
        return ops.transformer_blocks(
            x,
            residual,
            [self.weights(next_norm)],
            [cache],
            placement,
            self.self_attn.output.comm,
            read_next=read_next,
        )

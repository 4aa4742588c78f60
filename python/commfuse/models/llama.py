"""A Llama-family decoder split into stages and shards, read shard by shard from a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.models.checkpoint import Checkpoint, return_freed_memory
from commfuse.models.config import ModelConfig
from commfuse.models.stages import Stage, cut_stages
from commfuse.nn import (
    GatedColumnParallelLinear,
    KVCache,
    MergedColumnParallelLinear,
    ParallelAttention,
    ParallelBlock,
    ParallelMLP,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    shard_heads,
    shard_vocabulary,
    split,
)
from commfuse.ops import Placement
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator


def check_parallelism(config: ModelConfig, tp: int) -> None:
    """Refuses, before anything is read, a model or a tensor parallelism that cannot run.

    Pipeline stages: :func:`~commfuse.models.stages.cut_stages`.

    Raises:
        UsageError: the message says what would work.
    """
    shard_heads(config.num_heads, config.num_kv_heads, tp, 0)
    if tp > config.intermediate_size:
        raise UsageError(f"tp={tp} exceeds the MLP's {config.intermediate_size} features")
    if config.head_dim % 16:
        raise UsageError(f"head_dim is {config.head_dim}; the kernels take multiples of 16")


class Llama(nn.Module):
    """The part of a decoder that one rank holds.

    Args:
        checkpoint: every rank reads its own slices of it, one tensor at a time.
        comm: the tensor-parallel ranks of this stage; the model lies on its device.
        dtype: of weights and activations; None: the checkpoint's.
        stage: of a pipeline, which layers it holds; None: all.
        backend: of the layers and the embedding: ``"auto"``, or by name.

    Raises:
        UsageError: the model cannot be split over these ranks.

    Example:
        >>> with open_checkpoint(path) as checkpoint:
        ...     model = Llama(checkpoint, comm)
        >>> cache = model.new_cache(sequences=1, max_length=512)
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        comm: Communicator,
        dtype: torch.dtype | None = None,
        stage: Stage | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.config = config = checkpoint.config
        self.comm, self.backend = comm, backend
        self.dtype = dtype or config.dtype
        check_parallelism(config, comm.world_size)
        self.heads = shard_heads(config.num_heads, config.num_kv_heads, comm.world_size, comm.rank)
        self.features = split(config.intermediate_size, comm.world_size, comm.rank)
        self.vocabulary = shard_vocabulary(config.vocab_size, comm.world_size, comm.rank)

        self.stage = stage or cut_stages(config, 1)[0]

        rows = slice(self.vocabulary.begin, self.vocabulary.end)
        tied = config.tie_word_embeddings
        self.embedding: VocabParallelEmbedding | None = None
        if self.stage.first or (self.stage.last and tied):
            embedding = self._read(checkpoint, "model.embed_tokens.weight", rows=rows)
            self.embedding = VocabParallelEmbedding(embedding, self.vocabulary.begin, comm)
            del embedding
        self.head: VocabParallelHead | None = None
        if self.stage.last:
            self.head = VocabParallelHead(
                self.embedding if tied else self._read(checkpoint, "lm_head.weight", rows=rows),
                config.vocab_size,
                comm,
            )
        # One more than layers: the last belongs to what follows them.
        norms = [
            self._norm(checkpoint, layer)
            for layer in range(self.stage.layers.begin, self.stage.layers.end + 1)
        ]
        self.first_norm = norms[0]
        self.blocks = nn.ModuleList()
        for index, norm in enumerate(norms[:-1]):
            prefix = f"model.layers.{self.stage.layers.begin + index}."
            self.blocks.append(self._block(checkpoint, prefix, norm))
            return_freed_memory()

        self._stack = [
            block.weights(norm) for block, norm in zip(self.blocks, norms[1:], strict=True)
        ]

    def _read(self, checkpoint: Checkpoint, name: str, **part: slice | None) -> torch.Tensor:
        return checkpoint.read(name, dtype=self.dtype, **part).to(self.comm.device)

    def _norm(self, checkpoint: Checkpoint, layer: int) -> torch.Tensor:
        """The RMSNorm in front of a layer, or of the head."""
        name = f"model.layers.{layer}.input_layernorm.weight"
        if layer == self.config.num_layers:
            name = "model.norm.weight"
        return self._read(checkpoint, name)

    def _block(self, checkpoint: Checkpoint, prefix: str, norm: torch.Tensor) -> ParallelBlock:
        config, comm = self.config, self.comm

        def read(name: str, rows: slice | None = None, columns: slice | None = None):
            return self._read(checkpoint, prefix + name, rows=rows, columns=columns)

        query = self.heads.query.scaled(config.head_dim)
        kv = self.heads.kv.scaled(config.head_dim)
        features = self.features.scaled(1)

        def qkv(kind: str) -> torch.Tensor:
            parts = (("q", query), ("k", kv), ("v", kv))
            return torch.cat([read(f"self_attn.{p}_proj.{kind}", rows=r) for p, r in parts])

        def rms_norm(name: str) -> RMSNorm:
            return RMSNorm(read(f"{name}.weight"), config.rms_norm_eps)

        attention = ParallelAttention(
            MergedColumnParallelLinear(qkv("weight"), qkv("bias") if config.qkv_bias else None),
            RowParallelLinear(
                read("self_attn.o_proj.weight", columns=query),
                comm,
                read("self_attn.o_proj.bias") if config.o_bias else None,
            ),
            self.heads,
            norms=(
                (rms_norm("self_attn.q_norm"), rms_norm("self_attn.k_norm"))
                if config.qk_norm
                else None
            ),
            eps=config.rms_norm_eps,
        )
        biases = ("gate_proj", "up_proj") if config.mlp_bias else ()
        mlp = ParallelMLP(
            GatedColumnParallelLinear(
                read("mlp.gate_proj.weight", rows=features),
                read("mlp.up_proj.weight", rows=features),
                *(read(f"mlp.{name}.bias", rows=features) for name in biases),
            ),
            RowParallelLinear(
                read("mlp.down_proj.weight", columns=features),
                comm,
                read("mlp.down_proj.bias") if config.mlp_bias else None,
            ),
            config.rms_norm_eps,
        )
        return ParallelBlock(
            attention,
            mlp,
            RMSNorm(norm, config.rms_norm_eps),
            rms_norm("post_attention_layernorm"),
        )

    def weight_bytes_per_step(self) -> int:
        """Bytes of weights that this rank reads in a decoding step, a head included."""
        weights = [
            m.weight
            for m in self.blocks.modules()
            if hasattr(m, "weight") and not isinstance(m, RMSNorm)
        ]
        if self.head is not None:
            weights.append(self.head.weight)
        return sum(w.data.nbytes for w in weights)

    def new_cache(self, sequences: int, max_length: int) -> KVCache:
        """An empty cache for this rank's heads and layers."""
        return KVCache(
            len(self.blocks),
            sequences,
            len(self.heads.kv),
            max_length,
            self.config.head_dim,
            self.dtype,
            self.comm.device,
        )

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions 0 to length - 1: float32 [length, head_dim / 2] each."""
        positions = torch.arange(length, dtype=torch.float32)
        angles = torch.outer(positions, self.config.rope_frequencies())
        return angles.cos().to(self.comm.device), angles.sin().to(self.comm.device)

    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        placement: Placement,
        rows: torch.Tensor | None = None,
        *,
        source: Channel | None = None,
        target: Channel | None = None,
    ) -> torch.Tensor | None:
        """The logits of this rank's vocabulary entries; None before the last stage.

        Args:
            tokens: int64 [tokens]; only the first stage looks at them.
            cache: extended by the tokens.
            placement: where they stand.
            rows: int64, the tokens whose logits are wanted; None: all.
            source: from the stage before; None in the first.
            target: to the next stage; None in the last.

        Returns:
            [rows, entries of this rank]: float32 on the CPU, on a GPU in the model's dtype.
        """
        x = residual = None
        if self.stage.first:
            x, residual = self.embedding(
                tokens, self.first_norm, self.config.rms_norm_eps, self.backend
            )
        x, _ = ops.transformer_blocks(
            x,
            residual,
            self._stack,
            cache.layers,
            placement,
            self.comm,
            read_next=self.head.weight if self.stage.last else None,
            first_norm=None if self.stage.first else self.first_norm,
            source=source,
            target=target,
            backend=self.backend,
        )
        if not self.stage.last:
            return None
        if rows is not None:
            x = x[rows]
        return self.head.local(x)

"""What lies in a device's memory, and how many tokens of KV cache are left room for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from commfuse.planner.devices import Device
from commfuse.planner.layout import Layout, stage_layers
from commfuse.planner.model import KV_BYTES, Model

USABLE = 0.9  # of the memory; the rest is for the context, the allocator's gaps, the library
_RESERVED = 0.5e9  # bytes on a GPU for workspaces of GEMM and collective libraries
_LOGIT_ROWS = 256  # requests whose logits are computed at once
BLOCK = 16  # tokens by which a KV cache grows


@dataclass(frozen=True)
class Precision:
    """dtypes of weights and of the KV cache, as in :data:`commfuse.planner.model.WEIGHT_BYTES`."""

    weights: str = "bf16"
    kv: str = "bf16"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device of a layout.

    Attributes:
        usable: what may be filled.
        weights, activations, workspace: what is filled whatever comes.
        kv_per_token: of one token of context.
        kv_tokens: tokens that have room, over all requests of one replica; negative: short.
    """

    usable: float
    weights: float
    activations: float
    workspace: float
    kv_per_token: float

    @property
    def room(self) -> float:
        """Bytes left for the KV cache; negative: the layout does not fit."""
        return self.usable - self.weights - self.activations - self.workspace

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that have room, over all requests of one replica."""
        return int(self.room // (self.kv_per_token * BLOCK)) * BLOCK

    def requests(self, tokens: float) -> int:
        """Requests of ``tokens`` each that have room."""
        return max(0, int(self.kv_tokens // (-(-tokens // BLOCK) * BLOCK)))

    def short(self, tokens: float) -> float:
        """Bytes that one device lacks for one request of ``tokens``; 0: it fits."""
        needed = self.kv_per_token * -(-tokens // BLOCK) * BLOCK
        return max(0.0, needed - self.room)


@functools.lru_cache(maxsize=100_000)
def memory_of(
    model: Model, device: Device, layout: Layout, precision: Precision, chunk: int
) -> Memory:
    """The memory of the fullest device.

    Args:
        model, device, layout, precision: what runs where.
        chunk: tokens of the largest step (a chunk of prefill).
    """
    tp = layout.tp
    layers = stage_layers(model, layout.pp, precision.weights)
    tied = model.tie_word_embeddings and layout.pp == 1
    weights = 0.0
    for stage, count in enumerate(layers):
        tables = (stage == 0) + (stage == layout.pp - 1) - tied
        stage_bytes = count * model.layer_bytes(tp, precision.weights)
        weights = max(weights, stage_bytes + tables * model.table_bytes(tp))
    shard = model.shard(tp)
    widest = max(2 * shard.features, (shard.heads + 2 * shard.kv_heads) * model.head_dim)
    activations = chunk * (4 * model.hidden_size + 1.5 * widest) * 2.0
    logits = _LOGIT_ROWS * shard.vocabulary * 4.0
    exchanged = chunk * model.hidden_size * 2.0 * 2 if tp > 1 or layout.pp > 1 else 0.0
    kv = 2 * max(layers) * shard.kv_heads * model.head_dim * KV_BYTES[precision.kv]
    return Memory(
        usable=device.memory_gb * 1e9 * USABLE,
        weights=weights,
        activations=activations + logits,
        workspace=exchanged + (_RESERVED if device.is_gpu else 0.0),
        kv_per_token=kv,
    )

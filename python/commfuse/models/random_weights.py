"""Weights that are made up: a model of any shape, where no checkpoint can be had."""

from __future__ import annotations

import zlib

import torch

from commfuse.errors import UsageError
from commfuse.models.config import ModelConfig


class RandomCheckpoint:
    """Stands for a :class:`~commfuse.models.checkpoint.Checkpoint`: normal weights, norms of ones.

    A parameter depends on its name and the seed alone, so that every rank of every split has parts
    of the same model. One whole parameter exists at a time, while its part is read.

    Args:
        config: the model's shape.
        device: where weights are made, and stay.
        scale: their standard deviation.
        seed: of the model.

    Example:
        >>> model = Llama(RandomCheckpoint(config, comm.device), comm)
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        *,
        scale: float = 0.02,
        seed: int = 0,
    ):
        self.config, self.device = config, torch.device(device)
        self.scale, self.seed = scale, seed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, ``(out, in)`` or ``(n,)``.

        Raises:
            UsageError: a Llama-family model has no such parameter.
        """
        config = self.config
        hidden, features = config.hidden_size, config.intermediate_size
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        matrices = {
            "embed_tokens": (config.vocab_size, hidden),
            "lm_head": (config.vocab_size, hidden),
            "q_proj": (heads, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, heads),
            "gate_proj": (features, hidden),
            "up_proj": (features, hidden),
            "down_proj": (hidden, features),
        }
        layer, _, kind = name.rpartition(".")
        last = layer.rpartition(".")[2]
        if last in matrices and kind in ("weight", "bias"):
            return matrices[last] if kind == "weight" else matrices[last][:1]
        if last in ("q_norm", "k_norm") and kind == "weight":
            return (config.head_dim,)
        if last.endswith("norm") and kind == "weight":
            return (hidden,)
        raise UsageError(f"a Llama-family model has no parameter {name!r}")

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A slice of a parameter, as :meth:`~commfuse.models.checkpoint.StoredTensors.read`."""
        shape, dtype = self.shape(name), dtype or self.config.dtype
        if "norm" in name:
            whole = torch.ones(shape, dtype=dtype, device=self.device)
        else:
            generator = torch.Generator(self.device)
            generator.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            whole = torch.empty(shape, dtype=dtype, device=self.device)
            whole.normal_(0, self.scale, generator=generator)
        part = whole[rows or slice(None)]
        return (part if columns is None else part[:, columns]).clone().contiguous()

"""Models of the transformers library that are read shard by shard: made without weights first."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from commfuse.errors import UsageError
from commfuse.models.checkpoint import StoredTensors, read_json


def skeleton_of(path: Path, tensors: StoredTensors, dtype: torch.dtype | None) -> nn.Module:
    """The model of a directory without weights, on the meta device.

    Args:
        path: of the directory.
        tensors: that it stores.
        dtype: of the model; None: as in config.json, or else as stored.

    Raises:
        UsageError: transformers is missing, or the weights are quantised.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise UsageError(
            f"a directory is read with transformers: pip install transformers ({error})"
        ) from None
    if read_json(path / "config.json").get("quantization_config"):
        raise UsageError(f"{path} has quantised weights, which parallelize does not read")
    config = AutoConfig.from_pretrained(path)
    dtype = dtype or config.dtype or tensors.dtype(tensors.names()[0])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # What is computed from the configuration, such as rotary frequencies.
            model.set_submodule(name, type(module)(config=model.config))
    return model


def read_the_rest(model: nn.Module, tensors: StoredTensors) -> None:
    """Reads the parameters that every rank keeps whole."""
    for name, parameter in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        whole = tensors.read(name, dtype=parameter.dtype)
        setattr(model.get_submodule(parent), child, nn.Parameter(whole, requires_grad=False))

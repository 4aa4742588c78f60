"""Parallel layers and blocks: pieces put together equal the whole."""

from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, LlamaConfig, Qwen3Config
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from commfuse.errors import UsageError
from commfuse.nn import ParallelBlock
from commfuse.runtime.communicator import Communicator
from commfuse.testing import run_ranks

WORKERS = Path(__file__).parents[1] / "workers"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("worker", ["modules", "blocks"])
def test_the_pieces_make_the_whole(worker, world_size):
    assert run_ranks(f"{WORKERS / worker}.py:run", world_size) == [[]] * world_size


def test_a_block_compiled_without_a_graph_break():
    assert run_ranks(f"{WORKERS / 'blocks.py'}:compiled", 2) == [[], []]


@pytest.mark.parametrize(
    ("config", "layer"), [(LlamaConfig, LlamaDecoderLayer), (Qwen3Config, Qwen3DecoderLayer)]
)
def test_layers_of_transformers(config, layer):
    whole = layer(config(**SIZES), 0).requires_grad_(False)
    with Communicator() as alone:
        block = ParallelBlock.from_block(whole, alone)
        state = block.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.state_dict().items())


def test_a_layer_of_transformers_that_scales_its_scores():
    whole = GraniteDecoderLayer(GraniteConfig(**SIZES), 0)
    with Communicator() as alone, pytest.raises(UsageError, match="scores are scaled by 1 here"):
        ParallelBlock.from_block(whole, alone)

"""Passes with static shapes, as CUDA graphs need them, give the tokens of those without."""

from pathlib import Path

import pytest

from commfuse.errors import UsageError
from commfuse.generation import Generator
from commfuse.generation.inputs import bucket, bucket_span
from commfuse.models.config import ModelConfig
from commfuse.models.llama import Llama
from commfuse.models.random_weights import RandomCheckpoint
from commfuse.runtime.communicator import Communicator
from commfuse.testing import run_ranks

WORKER = str(Path(__file__).parents[1] / "workers" / "steps.py")


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    return run_ranks(f"{WORKER}:run", request.param, timeout=120)


def test_static_shapes_change_nothing(ranks):
    for rank in ranks:
        assert rank["graphs"] == ranks[0]["exact"]  # log-probabilities and numbers of steps too


def test_the_ops_of_a_gpu_in_turn_give_the_same_tokens(ranks):
    for rank in ranks:
        for name, (outputs, _, steps) in rank["in turn"].items():
            assert (outputs, steps) == (rank["exact"][name][0], rank["exact"][name][2]), name


def test_drafts_are_taken_back_and_shorten_generations(ranks):
    exact = ranks[0]["exact"]
    for plain, drafted in (("greedy", "drafted"), ("sampled", "sampled and drafted"),
                           ("one stops", "one stops, drafted")):  # fmt: skip
        assert exact[drafted][0] == exact[plain][0]
    assert exact["drafted"][2][1] < exact["greedy"][2][1]


def test_sizes_that_come_up_again_are_captured(ranks):
    for rank in ranks:
        # Rows, requests, drafts, span: without log-probabilities, with them, over a new cache.
        assert rank["captured"].count((8, 8, 0, 32)) == 3
        assert (16, 8, 3, 32) in rank["captured"]


def test_attention_as_on_a_gpu():
    (rank,) = run_ranks(f"{WORKER}:interpreted", 1, timeout=120, env={"TRITON_INTERPRET": "1"})
    assert rank["triton"] == rank["cpu"]


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 5, 9, 16, 17, 33, 64, 65)] == [
        1, 2, 4, 8, 16, 16, 32, 48, 64, 80,
    ]  # fmt: skip
    assert [bucket_span(n, 5000) for n in (1, 1024, 1025, 4096, 4097)] == [
        1024, 1024, 2048, 4096, 5000,
    ]  # fmt: skip


SMALL = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_options_that_cannot_be_had_on_the_cpu():
    with Communicator() as comm:
        model = Llama(RandomCheckpoint(ModelConfig.from_hf(SMALL)), comm)
        with pytest.raises(UsageError, match="CUDA graphs need a model on a GPU"):
            Generator(model, graphs=True)


def test_random_weights_do_not_depend_on_the_cut():
    checkpoint = RandomCheckpoint(ModelConfig.from_hf(SMALL))
    name = "model.layers.0.mlp.down_proj.weight"
    whole = checkpoint.read(name)
    assert whole.shape == (64, 96) and 0.015 < whole.std() < 0.025
    part = checkpoint.read(name, rows=slice(3, 9), columns=slice(10, 20))
    assert part.equal(whole[3:9, 10:20])
    assert not whole.equal(checkpoint.read(name.replace("layers.0", "layers.1")))
    assert checkpoint.read("model.norm.weight").eq(1).all()
    with pytest.raises(UsageError, match="has no parameter"):
        checkpoint.read("model.layers.0.mlp.router.weight")

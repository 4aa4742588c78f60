"""Models: real configurations give the parameters that their makers state; bad ones are named."""

import json

import pytest

from commfuse.errors import UsageError
from commfuse.planner.model import from_config, load_model, presets

# Parameters as counted in the published checkpoints (safetensors metadata), norms and biases
# included, in 1e9.
PUBLISHED = {
    "llama-2-7b": 6.738,
    "llama-2-70b": 68.977,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554,
    "llama-3.1-405b": 405.854,
    "llama-3.2-1b": 1.236,
    "mistral-7b": 7.248,
    "qwen2.5-7b": 7.616,
    "qwen2.5-72b": 72.706,
    "qwen3-8b": 8.191,
    "qwen3-32b": 32.762,
    "smollm2-135m": 0.1345,
}
GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_checkpoint(name):
    assert load_model(name).parameters == pytest.approx(PUBLISHED[name] * 1e9, rel=0.003)


def test_405b_weighs_what_its_makers_say():
    assert load_model("llama-3.1-405b").weight_bytes("bf16") == pytest.approx(812e9, rel=0.03)


def test_kv_cache_by_hand():
    # 80 layers, 8 heads of 128, keys and values, 2 bytes.
    assert load_model("llama-3.1-70b").kv_bytes_per_token("bf16") == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize("name", sorted(presets()))
@pytest.mark.parametrize("tp", [1, 2, 3, 5, 8])
def test_shards_hold_the_whole(name, tp):
    model = load_model(name)
    shard = model.shard(tp)
    assert shard.heads * tp >= model.num_heads
    assert shard.features * tp >= model.intermediate_size
    assert shard.vocabulary * tp >= model.vocab_size
    if tp == 1:
        layer = sum(k * n for k, n in model.gemms(1))
        assert layer == model.layer_parameters


def test_a_rank_keeps_every_kv_head_that_it_reads():
    model = from_config(GOOD, "six heads, three KV heads")
    assert [model.shard(tp).kv_heads for tp in (1, 2, 3, 4, 6)] == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("repository", "preset"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("amd/Llama-3.1-405B-Instruct-FP8-KV", "llama-3.1-405b"),
        ("LLAMA3.1_8B", "llama-3.1-8b"),
        ("RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8", "llama-3.3-70b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo-12b"),
        ("Qwen/Qwen2.5-0.5B-Instruct-AWQ", "qwen2.5-0.5b"),
    ],
)
def test_names_of_repositories(repository, preset):
    assert load_model(repository).name == preset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be a positive integer"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures is MixtralForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is a mixture of experts"),
        ({"num_local_experts": 8}, "mixture of experts"),
    ],
)
def test_a_malformed_configuration_is_refused(change, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UsageError, match=message):
        load_model(str(tmp_path))


def test_unknown_names_get_the_closest():
    with pytest.raises(UsageError, match=r"llama-3\.1-70b"):
        load_model("llama-3.1-71b")
    with pytest.raises(UsageError, match="a mixture of experts"):
        load_model("mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(UsageError, match="no such file"):
        load_model("./nothing.json")

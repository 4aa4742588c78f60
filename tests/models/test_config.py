"""ModelConfig against transformers' own classes, in the styles of its versions 4 and 5."""

import json

import pytest
import torch
import transformers

from commfuse.errors import UsageError
from commfuse.models.config import ModelConfig, RopeScaling

SIZES = {
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
CLASSES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}


def basic(architecture="LlamaForCausalLM", **more):
    return {"architectures": [architecture], **SIZES, **more}


def saved(architecture, tmp_path, **more):
    """Return the config.json that transformers writes, and its config object."""
    if architecture == "MistralForCausalLM":
        more.setdefault("sliding_window", None)
    config = CLASSES[architecture](architectures=[architecture], dtype="bfloat16", **SIZES, **more)
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text()), config


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_writes(architecture, tied, tmp_path):
    content, theirs = saved(architecture, tmp_path, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    ours = ModelConfig.from_hf(content)
    head_dim = 128 if architecture == "Qwen3ForCausalLM" else 16
    assert ours.architecture == architecture
    for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
        assert getattr(ours, name) == SIZES[name]
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads) == (2, 6, 3)
    assert (ours.head_dim, ours.rms_norm_eps, ours.dtype) == (head_dim, 1e-5, torch.bfloat16)
    assert ours.tie_word_embeddings is tied
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("bias", [False, True])
def test_says_which_layers_have_biases_and_norms(architecture, bias, tmp_path):
    more = {}
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        more["attention_bias"] = bias
    if architecture == "LlamaForCausalLM":
        more["mlp_bias"] = bias
    content, theirs = saved(architecture, tmp_path, **more)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    names = set(model.state_dict())
    ours = ModelConfig.from_hf(content)
    layer = "model.layers.0."
    for projection in "qkv":
        assert ours.qkv_bias == (f"{layer}self_attn.{projection}_proj.bias" in names)
    assert ours.o_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == (f"{layer}mlp.down_proj.bias" in names)
    assert ours.qk_norm == (f"{layer}self_attn.q_norm.weight" in names)


@pytest.mark.parametrize("scaling", [None, "linear", "llama3"])
def test_rope_frequencies_equal_those_of_transformers(scaling, tmp_path):
    parameters = {"rope_theta": 5000.0, "rope_type": scaling or "default"}
    parameters |= {"linear": {"factor": 4.0}, "llama3": LLAMA3}.get(scaling, {})
    content, theirs = saved("LlamaForCausalLM", tmp_path, head_dim=64, rope_parameters=parameters)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    ours = ModelConfig.from_hf(content)
    torch.testing.assert_close(ours.rope_frequencies(), rotary.inv_freq, rtol=1e-6, atol=0)
    # The same, as version 4 wrote it.
    old = {k: v for k, v in content.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5000.0, "torch_dtype": "bfloat16", "rope_scaling": None}
    if scaling:
        old["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    assert ModelConfig.from_hf(old) == ours


def test_rope_scaling_with_the_oldest_key():
    config = ModelConfig.from_hf(basic(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == RopeScaling("linear", 2.0)
    assert config.rope_theta == 10000.0


def test_defaults_of_absent_and_null_keys():
    config = ModelConfig.from_hf(basic(num_key_value_heads=None, head_dim=None, rope_scaling=None))
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (6, 16, 1e-6)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert (config.dtype, config.tie_word_embeddings) == (torch.float32, False)
    config = ModelConfig.from_hf(basic(bos_token_id=None, eos_token_id=[7, 9]))
    assert (config.bos_token_id, config.eos_token_ids) == (None, (7, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (basic("GPT2LMHeadModel"), r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        (basic("MixtralForCausalLM"), "MixtralForCausalLM.*supported are"),
        ({**basic(), "architectures": None}, "none given"),
        ({"architectures": ["LlamaForCausalLM"]}, "lacks vocab_size, hidden_size"),
        (basic(quantization_config={"quant_method": "awq"}), "quantised weights .awq"),
        (basic(num_experts=8), "mixture-of-experts"),
        (basic(hidden_act="gelu"), "activation 'gelu'"),
        (basic("MistralForCausalLM", sliding_window=1024), "window of 1024 .* 4096"),
        (basic("MistralForCausalLM", max_position_embeddings=32768), "window of 4096"),
        (basic("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=64), "window of 64"),
        (basic(layer_types=["full_attention", "sliding_attention"]), "sliding-window"),
        (basic(rope_scaling={"rope_type": "yarn", "factor": 4}), "'yarn'.*linear and llama3"),
        (basic(rope_scaling={"rope_type": "llama3", "factor": 4}), "lacks 'low_freq_factor'"),
        (basic(partial_rotary_factor=0.5), "partial rotary"),
        (basic(torch_dtype="float8_e4m3fn"), "float8_e4m3fn.*bfloat16"),
        (basic(num_key_value_heads=4), "6 query heads .* 4 key/value heads"),
        (basic(head_dim=15), "head_dim 15 is odd"),
        (basic(hidden_size=0, head_dim=16), "hidden_size must be a positive integer"),
    ],
)
def test_refuses_what_cannot_be_run(content, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig.from_hf(content)


def test_a_window_that_covers_the_context_is_no_window():
    ModelConfig.from_hf(basic("MistralForCausalLM", sliding_window=4096))
    ModelConfig.from_hf(basic("MistralForCausalLM", sliding_window=None))
    ModelConfig.from_hf(basic("Qwen2ForCausalLM", sliding_window=64, use_sliding_window=False))

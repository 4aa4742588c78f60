"""Small checkpoints of every family, split over 1 to 4 ranks, against transformers."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from commfuse.errors import UsageError
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.config import ModelConfig
from commfuse.models.llama import Llama, check_parallelism
from commfuse.models.smollm2 import ensure_smollm2
from commfuse.runtime.communicator import Communicator
from commfuse.testing import run_ranks
from commfuse.testing.numerics import error
from commfuse.testing.small_models import CONTEXT, LLAMA3, SIZES

LLAMA = str(Path(__file__).parents[1] / "workers" / "llama.py")
NEW_TOKENS, GAP = 24, 1e-4


def sizes(vocabulary, heads, kv_heads, head_dim, tied=False, **more):
    return {
        **SIZES,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        **more,
    }


# One KV head, two, three, as many as query heads; odd vocabularies, some with empty shards.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**sizes(257, 8, 1, 16))),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**sizes(1000, 9, 3, 16, tied=True))),
    "llama biases, llama3 rope": (
        LlamaForCausalLM,
        LlamaConfig(
            **sizes(129, 8, 8, 32), attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**sizes(300, 4, 2, 32), sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**sizes(385, 6, 3, 16, tied=True))),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**sizes(257, 4, 2, 48))),
}
# Ragged; one token; one that repeats itself, so that drafts are made; one near the context's end.
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [11, 12, 13] * 5, list(range(60, 100))]


def make(kind, config):
    """A model whose biases and norms are not what they are initialised to."""
    torch.manual_seed(len(MODELS))
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def interleaved(rows, head_dim):
    """The row order of q and k in llama.cpp's files."""
    split = rows.reshape(len(rows) // head_dim, 2, head_dim // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model, path):
    """The model in float32, under the names and in the layout of GGUF."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        data = tensor.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            data = interleaved(data, config.head_dim)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: (path of the checkpoint, transformers' model)."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, (kind, config) in MODELS.items():
        model, path = make(kind, config), folder / name.replace(" ", "-")
        model.save_pretrained(path)
        made[name] = (path, model)
    _, tied = made["llama tied"]
    write_gguf(tied, folder / "tied.gguf")
    made["gguf"] = (folder / "tied.gguf", tied)
    return made


def greedy(model, prompt):
    """(tokens, how far the best logit is ahead at each) by transformers, to the context's end."""
    count = min(NEW_TOKENS, CONTEXT - len(prompt))
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        output_logits=True, return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
    gaps = []
    for logits in out.logits:
        best = logits[0].topk(2).values
        gaps.append((best[0] - best[1]).item())
    return out.sequences[0, len(prompt) :].tolist(), gaps


@pytest.fixture(scope="module")
def references(models):
    """By name: greedy tokens and gaps of each prompt; logits in float64, float32 and bfloat16."""
    found = {}
    for name, (_, model) in models.items():
        tokens = [greedy(model, prompt) for prompt in PROMPTS]
        logits = {}
        with torch.no_grad():
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                # In bfloat16 the truth is that of the weights as they are then.
                kind, config = MODELS.get(name, MODELS["llama tied"])
                copy = kind(config).eval()
                copy.load_state_dict(model.state_dict())
                copy = copy.to(dtype)
                logits[dtype] = torch.cat([copy(torch.tensor([p])).logits[0] for p in PROMPTS])
                if dtype == torch.bfloat16:
                    rounded = copy.double()
                    logits["rounded"] = torch.cat(
                        [rounded(torch.tensor([p])).logits[0] for p in PROMPTS]
                    )
        found[name] = (tokens, logits)
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request, models):
    paths = [str(path) for path, _ in models.values()]
    args = (paths, PROMPTS, NEW_TOKENS, ["float32", "bfloat16"])
    return run_ranks(f"{LLAMA}:run", request.param, args=args, timeout=200)


def whole_logits(ranks, path, dtype):
    return torch.cat([torch.from_numpy(rank[str(path), dtype]["logits"]) for rank in ranks], dim=1)


@pytest.mark.parametrize("name", [*MODELS, "gguf"])
def test_logits_err_at_most_twice_as_much_as_transformers(ranks, models, references, name):
    path, (_, logits) = models[name][0], references[name]
    exact = logits[torch.float64]
    ours = whole_logits(ranks, path, "float32")
    assert error(ours, exact) <= 2 * error(logits[torch.float32], exact)
    ours = whole_logits(ranks, path, "bfloat16")
    assert error(ours, logits["rounded"]) <= 2 * error(logits[torch.bfloat16], logits["rounded"])


@pytest.mark.parametrize("how", ["alone", "batch", "drafted"])
@pytest.mark.parametrize("name", [*MODELS, "gguf"])
def test_greedy_tokens(ranks, models, references, name, how):
    """Alone, in a ragged batch, with speculation; the last prompt runs into the context's end."""
    path, (expected, _) = models[name][0], references[name]
    for rank in ranks:
        outputs = rank[str(path), "float32"][how]
        for output, (tokens, gaps) in zip(outputs, expected, strict=True):
            same = [a == b for a, b in zip(output, tokens, strict=True)]
            if not all(same):
                assert gaps[same.index(False)] < GAP
        assert outputs == ranks[0][str(path), "float32"][how]


def test_neither_batch_nor_speculation_changes_a_token(ranks):
    for rank in ranks:
        for results in rank.values():
            assert results["alone"] == results["batch"] == results["drafted"]


def test_speculation_saves_steps(ranks):
    steps = [results["statistics"] for rank in ranks for results in rank.values()]
    assert all(s["decode_tokens"] == 3 * (NEW_TOKENS - 1) + CONTEXT - 40 - 1 for s in steps)
    assert any(s["request_steps"] < s["decode_tokens"] for s in steps)


def test_a_rank_holds_its_shards_and_no_more():
    """While loading, one tensor beside them; and 24 MiB for what the allocators keep."""
    for rank in run_ranks(f"{LLAMA}:memory", 2, args=(str(ensure_smollm2()),)):
        assert rank["peak"] - rank["before"] <= rank["weights"] + rank["largest"] + (24 << 20)
        assert rank["after"] - rank["before"] <= rank["weights"] + (24 << 20)
        assert rank["after"] - rank["before"] >= rank["weights"] // 2  # it has measured something


def config_with(tmp_path, **settings):
    """The config of a checkpoint without weights."""
    config = {**sizes(100, 9, 3, 16), "architectures": ["LlamaForCausalLM"], **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("settings", "tp", "message"),
    [
        ({}, 10, "9 attention heads.*use 1 to 9"),
        ({"intermediate_size": 4}, 5, "tp=5 exceeds the MLP's 4 features"),
        ({"head_dim": 24}, 1, "head_dim is 24.*multiples of 16"),
    ],
)
def test_what_cannot_be_split_is_refused_before_reading(tmp_path, settings, tp, message):
    config = ModelConfig.from_hf(config_with(tmp_path, **settings))
    with pytest.raises(UsageError, match=message):
        check_parallelism(config, tp)


def test_the_checkpoint_is_closed_after_loading(models):
    """Weights are copies: the model works on after the file has gone."""
    path, _ = models["llama"]
    with Communicator() as comm:
        with open_checkpoint(path) as checkpoint:
            model = Llama(checkpoint, comm)
        weights = {name for name, _ in model.named_parameters()}
        assert weights == set()  # packed; nothing is kept twice
        assert "model.safetensors" not in Path("/proc/self/maps").read_text()

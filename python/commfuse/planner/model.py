"""What a planner must know of a model: sizes, bytes, the GEMMs of a layer; from config.json."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commfuse.errors import UsageError
from commfuse.planner.names import choose

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Bytes of one weight. Four-bit weights carry a 16-bit scale for each group of 128 (int4), or an
# 8-bit one for each group of 16 (fp4).
WEIGHT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128, "fp4": 0.5 + 1 / 16}
KV_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
GEMMS = ("qkv", "output", "gate_up", "down")  # of a layer, in order
SUMMED = (1, 3)  # those of them that end in a sum over ranks
VOCABULARY_BLOCK = 128  # shards of the vocabulary are cut at multiples of it
_DATA = Path(__file__).parent / "data"
# Repositories whose names do not say how large the model is.
_WITHOUT_SIZE = {
    "mistral-nemo-2407": "mistral-nemo-12b",
    "mistral-large-2407": "mistral-large-123b",
    "mistral-large-2411": "mistral-large-123b",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Model:
    """Sizes of a dense Llama-family decoder; the fields are named as in ``config.json``.

    Attributes:
        name: as the user gave it.
        qk_norm: whether queries and keys pass a norm of their own (Qwen3).

    Example:
        >>> model = load_model("llama-3.1-8b")
        >>> round(model.parameters / 1e9, 2), model.kv_bytes_per_token("bf16")
        (8.03, 131072.0)
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qk_norm: bool
    max_position_embeddings: int

    @functools.cached_property
    def layer_parameters(self) -> int:
        """Weights of one layer, without norms and biases."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    @functools.cached_property
    def parameters(self) -> int:
        """All weights, without norms and biases."""
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_layers * self.layer_parameters + tables * self.embedding_parameters

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of all weights. Embedding and head stay in 16 bits when layers are quantised."""
        layers = self.num_layers * self.layer_parameters
        return layers * WEIGHT_BYTES[dtype] + (self.parameters - layers) * 2.0

    def kv_bytes_per_token(self, dtype: str) -> float:
        """Bytes of the KV cache that one token takes, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * KV_BYTES[dtype]

    @functools.cache  # noqa: B019 - a model is small, and lives as long as a plan
    def shard(self, tp: int) -> Shard:
        """What the most loaded of ``tp`` ranks holds of a layer.

        Raises:
            UsageError: more ranks than query heads.
        """
        if tp > self.num_heads:
            raise UsageError(
                f"{self.name} has {self.num_heads} query heads: at most TP {self.num_heads}"
            )
        blocks = -(-self.vocab_size // VOCABULARY_BLOCK)
        return Shard(
            heads=-(-self.num_heads // tp),
            kv_heads=_most_kv_heads(self.num_heads, self.num_kv_heads, tp),
            features=-(-self.intermediate_size // tp),
            vocabulary=min(self.vocab_size, -(-blocks // tp) * VOCABULARY_BLOCK),
        )

    @functools.cache  # noqa: B019
    def gemms(self, tp: int) -> tuple[tuple[int, int], ...]:
        """(K, N) of the four GEMMs of a layer on the most loaded rank, see :data:`GEMMS`."""
        shard = self.shard(tp)
        return (
            (self.hidden_size, (shard.heads + 2 * shard.kv_heads) * self.head_dim),
            (shard.heads * self.head_dim, self.hidden_size),
            (self.hidden_size, 2 * shard.features),
            (shard.features, self.hidden_size),
        )

    def layer_bytes(self, tp: int, dtype: str) -> float:
        """Bytes of a layer's weights on the most loaded rank."""
        return sum(k * n for k, n in self.gemms(tp)) * WEIGHT_BYTES[dtype]

    def table_bytes(self, tp: int) -> float:
        """Bytes of the embedding's shard, or of the head's, on the most loaded rank."""
        return self.shard(tp).vocabulary * self.hidden_size * 2.0


@dataclass(frozen=True)
class Shard:
    """The most loaded rank's part: query heads, KV heads, MLP features, vocabulary entries."""

    heads: int
    kv_heads: int
    features: int
    vocabulary: int


def _most_kv_heads(heads: int, kv_heads: int, tp: int) -> int:
    """The most KV heads that a contiguous, even cut of the query heads makes a rank keep."""
    group, most, begin = heads // kv_heads, 0, 0
    for rank in range(tp):
        end = begin + heads // tp + (rank < heads % tp)
        most = max(most, -(-end // group) - begin // group)
        begin = end
    return most


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """The configurations that come with the package, by name."""
    return json.loads((_DATA / "models.json").read_text())


def load_model(name: str) -> Model:
    """A model from the name of a preset, a config.json, or the directory that holds one.

    Raises:
        UsageError: no such model (close names are offered), or a configuration that cannot be used.

    Example:
        >>> load_model("meta-llama/Llama-3.1-70B-Instruct").num_layers
        80
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return from_config(_read(path), str(path))
    if path.suffix == ".json" or name.startswith((".", "/")):
        raise UsageError(f"--model {name}: there is no such file")
    if re.search(r"mixtral|moe|deepseek|gpt-oss|\d+b-a\d+b|\d+x\d+b", name.lower()):
        raise UsageError(f"--model {name}: a mixture of experts; only dense models so far")
    found = choose(preset_name(name), presets(), f"--model {name}", "model", "a config.json")
    return from_config(presets()[found], found)


def preset_name(name: str) -> str:
    """A Hugging Face repository's name as presets are named.

    Example:
        >>> preset_name("meta-llama/Llama-3.1-8B-Instruct"), preset_name("Qwen/Qwen3-32B-FP8")
        ('llama-3.1-8b', 'qwen3-32b')
    """
    short = name.rsplit("/", 1)[-1].lower().replace("_", "-").replace("meta-llama-", "llama-")
    short = re.sub(r"^llama(?=\d)", "llama-", short)
    parts = [part for part in short.split("-") if part not in ("instruct", "hf", "chat", "base")]
    sizes = [index for index, part in enumerate(parts) if re.fullmatch(r"\d+(\.\d+)?[bm]", part)]
    if sizes:  # behind the size there is a date, a version or how the weights were quantised
        parts = parts[: sizes[0] + 1]
    found = "-".join(parts)
    return _WITHOUT_SIZE.get(found, found)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: a JSON object was expected, not {type(config).__name__}")
    return config


def from_config(config: dict[str, Any], name: str) -> Model:
    """A model from the content of a ``config.json``.

    Args:
        config: as parsed from JSON.
        name: what errors and answers call it.

    Raises:
        UsageError: a mixture of experts, another architecture, a field that is missing or no
            positive integer; the message names the field.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise UsageError(f"{name}: architectures must be a list, not {architectures!r}")
    for key in _EXPERTS:
        if config.get(key) or any("moe" in str(a).lower() for a in architectures):
            kind = ", ".join(map(str, architectures)) or key
            raise UsageError(f"{name}: {kind} is a mixture of experts; only dense models so far")
    if not set(architectures) & set(ARCHITECTURES):
        given = ", ".join(map(str, architectures)) or "none"
        raise UsageError(
            f"{name}: architectures is {given}; supported are {', '.join(ARCHITECTURES)}"
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None and default is not None:
            value = default
        if value is None:
            raise UsageError(f"{name}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name}: {key} must be a positive integer, not {value!r}")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UsageError(
            f"{name}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    return Model(
        name=name,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size("head_dim", max(1, hidden // heads)),
        vocab_size=size("vocab_size"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm="Qwen3ForCausalLM" in architectures,
        max_position_embeddings=size("max_position_embeddings", 1 << 20),
    )

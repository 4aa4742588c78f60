"""GGUF files: metadata, names, layouts and quantised blocks.

The header is parsed here: the reader of the ``gguf`` package makes an array per string, which
takes seconds and hundreds of megabytes for a vocabulary, in every rank. Long arrays are skipped
until they are asked for. Block sizes and dequantisation are the package's.

Two things differ from the Hugging Face layout besides the names. Dimensions are listed from the
innermost, and files of architecture ``llama`` store the rows of q_proj and k_proj so that the two
rows of a rotary pair are neighbours, head by head; :class:`StoredTensor` puts them back.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from commfuse.errors import UsageError
from commfuse.models.checkpoint import Checkpoint, StoredTensor, TensorFile, plain_decoder
from commfuse.models.config import ModelConfig, RopeScaling
from commfuse.models.tokenizer import Tokenizer

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_FLOATS = {
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F64: torch.float64,
}

# Formats of the scalar value types, by their number in the file; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_TOKENS = 1 << 24  # A longer array means a damaged file, not a larger vocabulary.

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file (version 2 or 3, little-endian) as a checkpoint.

    Names, shapes and row order are those of Hugging Face. ``config.dtype`` is bfloat16 where the
    embedding is quantised, else its own type. Raises UsageError, naming the file, for one that is
    truncated, split, of another architecture or uses a feature that commfuse lacks.
    """
    file = TensorFile(path)
    try:
        metadata, entries = _read_header(file)
        if metadata.get("split.count", 0) > 1:
            raise UsageError(f"{path} is one part of a split model; merge the parts first")
        tensors = _tensors(file, entries)
        factors = tensors.pop(_ROPE_FACTORS, None)
        config = _config(metadata, tensors, factors)
        tensors = _rename(tensors, config)
    except BaseException as error:
        file.close()
        if isinstance(error, UsageError) and str(path) not in str(error):
            raise UsageError(f"{path}: {error}") from None
        raise
    return Checkpoint(
        path,
        config,
        tensors,
        lambda: Tokenizer.from_gguf(metadata, config.eos_token_ids, str(path)),
    )


class _Metadata(Mapping[str, Any]):
    """Key to value; an array is decoded when it is first asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = value.decode()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Array:
    """An array of the header that was skipped: its own bytes and what they mean."""

    def __init__(self, kind: int, count: int, data: bytes) -> None:
        self._kind, self._count, self._data = kind, count, data

    def decode(self) -> list[Any]:
        if self._kind == _STRING:
            cursor = _Cursor(self._data)
            return [cursor.string() for _ in range(self._count)]
        return list(struct.unpack(f"<{self._count}{_SCALARS[self._kind]}", self._data))


class _Cursor:
    """Reads values one after the other; IndexError past the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self._data):
            raise IndexError
        return self._data[start : self.position]

    def scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> _Array:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_TOKENS:
            raise ValueError(f"an array of {count} values")
        start = self.position
        if kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
        elif kind in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        else:
            raise ValueError(f"an array of value type {kind}")
        return _Array(kind, count, self._data[start : self.position])


def _read_header(file: TensorFile) -> tuple[_Metadata, dict[str, Any]]:
    """Return the metadata and, by name, each tensor's (dimensions, type, offset in the file)."""
    if file.size < 24 or file.read(4, 0) != b"GGUF":
        raise UsageError(f"{file.path} is not a GGUF file")
    # The header's size is not stored: read more of the file until the header is complete.
    size = min(file.size, 1 << 22)
    while True:
        try:
            return _parse_header(file.read(size, 0))
        except IndexError:
            if size == file.size:
                raise UsageError(f"{file.path} is truncated: it ends within its header") from None
            size = min(file.size, 4 * size)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{file.path} is damaged: its header has {error}") from None


def _parse_header(data: bytes) -> tuple[_Metadata, dict[str, Any]]:
    cursor = _Cursor(data)
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise UsageError(f"unsupported GGUF version {version}; supported are 2 and 3")
    tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
    values = {}
    for _ in range(value_count):
        key = cursor.string()
        values[key] = cursor.value(cursor.scalar("I"))
    entries = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        entries[name] = (dimensions, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"the alignment {alignment!r}")
    base = -(-cursor.position // alignment) * alignment
    return _Metadata(values), {
        name: (dimensions, kind, base + offset)
        for name, (dimensions, kind, offset) in entries.items()
    }


def _tensors(file: TensorFile, entries: dict[str, Any]) -> dict[str, StoredTensor]:
    tensors = {}
    for name, (dimensions, number, offset) in entries.items():
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UsageError(f"tensor {name!r} has the unknown type {number}") from None
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if not dimensions or dimensions[0] % block_elements or len(dimensions) > 2:
            raise UsageError(f"tensor {name!r} has the unsupported shape {dimensions[::-1]}")
        if len(dimensions) == 1 and block_elements > 1:
            raise UsageError(f"tensor {name!r} is a quantised vector, which is not supported")
        if kind in _FLOATS:
            decode, dtype = plain_decoder(_FLOATS[kind]), _FLOATS[kind]
        else:
            decode, dtype = _quantised_decoder(kind, name), torch.bfloat16
        tensors[name] = StoredTensor(
            file=file,
            offset=offset,
            shape=tuple(reversed(dimensions)),
            dtype=dtype,
            block_elements=block_elements,
            block_bytes=block_bytes,
            decode=decode,
        )
    needed = max((t.offset + t.stored_bytes for t in tensors.values()), default=0)
    if needed > file.size:
        raise UsageError(
            f"{file.path} is truncated: it has {file.size} bytes, its header needs {needed}"
        )
    return tensors


def _quantised_decoder(
    kind: GGMLQuantizationType, name: str
) -> Callable[[np.ndarray], torch.Tensor]:
    def decode(raw: np.ndarray) -> torch.Tensor:
        # Blocks know no rows. As one row, dequantize() does not cut them into many small groups.
        values = gguf.dequantize(raw.reshape(1, -1), kind)
        return torch.from_numpy(values).view(len(raw), -1)

    try:
        decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8))
    except NotImplementedError:  # what gguf raises for a type that it cannot decode
        raise UsageError(
            f"tensor {name!r} has the type {kind.name}, which is not supported"
        ) from None
    return decode


def _config(
    metadata: Mapping[str, Any], tensors: dict[str, StoredTensor], factors: StoredTensor | None
) -> ModelConfig:
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise UsageError(
            f"unsupported GGUF architecture {name!r}; supported are {', '.join(_ARCHITECTURES)}"
        )

    def get(key: str, *fallback: Any) -> Any:
        value = metadata.get(f"{name}.{key}", *fallback)
        if value is None and not fallback:
            raise UsageError(f"the metadata lack {name}.{key}")
        return value

    def has(tensor: str) -> bool:
        return f"blk.0.{tensor}" in tensors

    if "token_embd.weight" not in tensors:
        raise UsageError("there is no tensor 'token_embd.weight'")
    embedding = tensors["token_embd.weight"]
    if get("expert_count", 0):
        raise UsageError("mixture-of-experts models are not supported")
    hidden, heads = get("embedding_length"), get("attention.head_count")
    kv_heads, context = get("attention.head_count_kv", heads), get("context_length")
    if not all(isinstance(n, int) and n > 0 for n in (hidden, heads, kv_heads)):
        raise UsageError("layers with different numbers of heads are not supported")
    head_dim = get("attention.key_length", hidden // heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise UsageError("keys and values of different sizes are not supported")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UsageError("partial rotary embeddings are not supported")
    window = get("attention.sliding_window", 0)
    if 0 < window < context:
        raise UsageError(f"sliding-window attention is not supported (window of {window} tokens)")
    theta = float(get("rope.freq_base", 10000.0))
    ends = (
        metadata.get("tokenizer.ggml.eos_token_id"),
        metadata.get("tokenizer.ggml.eot_token_id"),
    )
    return ModelConfig(
        architecture=_ARCHITECTURES[name],
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(metadata, name, theta, head_dim, factors),
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias=has("attn_q.bias"),
        o_bias=has("attn_output.bias"),
        mlp_bias=has("ffn_down.bias"),
        qk_norm=has("attn_q_norm.weight"),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        dtype=embedding.dtype,
    )


def _shortest(value: float) -> float:
    """Return the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    metadata: Mapping[str, Any],
    name: str,
    theta: float,
    head_dim: int,
    factors: StoredTensor | None,
) -> RopeScaling | None:
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    factor = metadata.get(f"{name}.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise UsageError(f"unsupported RoPE scaling {kind!r}; supported are none, linear, llama3")
    if factors is not None:
        return _llama3_scaling(factors, theta, head_dim)
    return RopeScaling("linear", float(factor)) if kind == "linear" and factor != 1.0 else None


def _llama3_scaling(stored: StoredTensor, theta: float, head_dim: int) -> RopeScaling | None:
    """Find the llama3 scaling that gives the stored divisors of the rotary frequencies.

    The file has the divisors alone. Scaling the original context and both frequency factors
    together changes nothing, so the latter can stay at 1 and 4, as all Llama 3 models have them.
    """
    divisors = stored.read(range(stored.shape[0]), range(1), torch.float32).squeeze(1)
    if bool((divisors == 1).all()):
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if divisors.shape == frequencies.shape:
        for context in (1 << power for power in range(10, 21)):
            scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, context)
            expected = frequencies / scaling.apply(frequencies)
            if torch.allclose(divisors, expected, rtol=1e-4):
                return scaling
    raise UsageError(f"{_ROPE_FACTORS} is not of the llama3 form; other forms are not supported")


def _rename(tensors: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Give tensors their Hugging Face names, and interleaved heads their row order."""
    renamed = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in _NAMES:
            raise UsageError(f"tensor {name!r} belongs to no architecture that is supported")
        layer, part, kind = match.groups()
        prefix = "" if layer is None else f"model.layers.{layer}."
        if part in ("attn_q", "attn_k") and config.architecture == "LlamaForCausalLM":
            tensor = _with_rotary_rows(tensor, config.head_dim)
        renamed[f"{prefix}{_NAMES[part]}.{kind}"] = tensor
    return renamed


def _with_rotary_rows(tensor: StoredTensor, head_dim: int) -> StoredTensor:
    if tensor.shape[0] % head_dim:
        raise UsageError(f"{tensor.shape[0]} rows of queries or keys are not whole heads")
    return dataclasses.replace(tensor, rotary_head_dim=head_dim)

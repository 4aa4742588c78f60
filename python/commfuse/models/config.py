"""What commfuse knows of a model: the sizes and switches of a Llama-family decoder.

A :class:`ModelConfig` is read from a Hugging Face ``config.json`` (as written by version 4 or 5 of
``transformers``) or from the metadata of a GGUF file (:mod:`commfuse.models.gguf`). A setting
that would change the result and that commfuse does not implement is refused here, with its name,
so that no rank starts on a model that it would compute wrongly.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from commfuse.errors import UsageError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Values that transformers assumes for a key that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "MistralForCausalLM": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}

# Null in config.json means "none" for these; for any other key it means "the default".
_NULL_HAS_MEANING = ("sliding_window", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context.

    kind: ``"linear"`` divides every frequency by ``factor``. ``"llama3"`` divides those whose
    wavelength exceeds ``original_max_position_embeddings / low_freq_factor`` positions, keeps
    those below ``original_max_position_embeddings / high_freq_factor`` and blends in between;
    the last three fields are None for ``"linear"``.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Return the stretched frequencies (any shape, radians per position), same dtype."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Llama-family decoder. Field names follow ``config.json``.

    ``qkv_bias``, ``o_bias`` and ``mlp_bias`` say which projections have a bias; ``qk_norm`` that
    queries and keys pass an RMSNorm over ``head_dim`` before the rotation. ``dtype`` is the
    checkpoint's own. ``eos_token_ids`` may be empty.

    Example::

        config = ModelConfig.from_hf(json.loads(Path("config.json").read_text()))
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"model config: {name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"model config: {self.num_heads} query heads are not a multiple of "
                f"{self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise UsageError(
                f"model config: head_dim {self.head_dim} is odd; rotary embeddings need an even one"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the content of a ``config.json``.

        A missing key takes the default of ``transformers`` for that architecture; a missing dtype
        is float32. Raises UsageError for an unknown architecture and for what cannot be run:
        quantised weights, attention windows shorter than the context, partial rotary embeddings,
        other activations than SiLU, other RoPE scalings than linear and llama3.
        """
        architecture = _architecture(config)
        defaults = _DEFAULTS[architecture]

        def get(key: str, fallback: Any = None) -> Any:
            if key in config and (config[key] is not None or key in _NULL_HAS_MEANING):
                return config[key]
            return defaults.get(key, fallback)

        missing = [
            key
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if config.get(key) is None
        ]
        if missing:
            raise UsageError(f"config.json lacks {', '.join(missing)}")

        _refuse_unsupported(architecture, config, get)
        rope_theta, rope_scaling = _rope(config, get("max_position_embeddings"))
        heads = config["num_attention_heads"]
        attention_bias = bool(get("attention_bias", False))
        has_attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        return cls(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", heads),
            head_dim=get("head_dim", config["hidden_size"] // heads),
            rms_norm_eps=float(get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=get("max_position_embeddings"),
            tie_word_embeddings=bool(get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM" or (has_attention_bias and attention_bias),
            o_bias=has_attention_bias and attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            bos_token_id=get("bos_token_id"),
            eos_token_ids=token_ids(get("eos_token_id")),
            dtype=_dtype(config),
        )

    def rope_frequencies(self) -> torch.Tensor:
        """Return the rotary frequencies, float32 ``[head_dim / 2]``, in radians per position."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequencies = 1.0 / (self.rope_theta**exponents)
        return frequencies if self.rope_scaling is None else self.rope_scaling.apply(frequencies)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Normalise an ``eos_token_id`` entry: one id, a list of ids, or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures") or []
    for name in named:
        if name in ARCHITECTURES:
            return name
    given = ", ".join(named) or "none given"
    raise UsageError(
        f"unsupported architecture ({given}); supported are {', '.join(ARCHITECTURES)}"
    )


def _refuse_unsupported(architecture: str, config: dict[str, Any], get: Any) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UsageError(
            f"config.json asks for quantised weights ({method}); commfuse reads bfloat16, float16 "
            "and float32 safetensors, and quantised weights from GGUF files"
        )
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (config.get(key) or 0) > 1:
            raise UsageError(f"mixture-of-experts models are not supported ({key}={config[key]})")
    if get("hidden_act", "silu") != "silu":
        raise UsageError(f"unsupported activation {get('hidden_act')!r}; supported is 'silu'")
    if "sliding_attention" in (config.get("layer_types") or []):
        raise UsageError("sliding-window attention is not supported (layer_types)")
    # Qwen models carry the window's size even where they do not use it.
    if architecture.startswith("Qwen") and not get("use_sliding_window", False):
        return
    window = get("sliding_window")
    if window is not None and window < get("max_position_embeddings"):
        raise UsageError(
            f"sliding-window attention is not supported: the window of {window} tokens is shorter "
            f"than the context of {get('max_position_embeddings')}"
        )


def _rope(config: dict[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    # transformers 5 keeps everything in rope_parameters; version 4 has rope_theta at the top and
    # rope_scaling beside it.
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = settings.get("rope_theta") or config.get("rope_theta") or 10000.0
    partial = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UsageError(f"partial rotary embeddings are not supported (factor {partial})")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind in ("default", "none"):
        return float(theta), None
    try:
        if kind == "linear":
            return float(theta), RopeScaling("linear", float(settings["factor"]))
        if kind == "llama3":
            return float(theta), RopeScaling(
                "llama3",
                float(settings["factor"]),
                float(settings["low_freq_factor"]),
                float(settings["high_freq_factor"]),
                int(settings.get("original_max_position_embeddings") or context),
            )
    except KeyError as error:
        raise UsageError(f"RoPE scaling {kind!r} lacks {error.args[0]!r}") from None
    raise UsageError(f"unsupported RoPE scaling {kind!r}; supported are none, linear and llama3")


def _dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"unsupported dtype {name!r}; supported are {', '.join(DTYPES)}")
    return DTYPES[name]

"""What a decoding step and a prefill cost, term by term."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from commfuse.planner.calibration import Calibration
from commfuse.planner.cluster import Cluster
from commfuse.planner.layout import Stage
from commfuse.planner.memory import Precision
from commfuse.planner.model import KV_BYTES, SUMMED, WEIGHT_BYTES, Model

# Measured on one H100 that several ranks share (docs/kernels.md), the only place so far: with few
# rows half of an all-reduce hides behind its GEMM, with more rows nothing is gained.
FUSED_ROWS, _HIDDEN = 8, 0.5
_FUSED_COST = 0.04  # what sending tiles adds to its GEMM
_SHARPNESS = 3.0  # how abruptly a GEMM turns from memory to arithmetic; infinite: a roofline
_KERNELS = 10  # of a layer: norms, projections, rotation, attention in two, activation
_NORM_KERNELS, _QUANTISE_KERNELS = 2, 4
_REPLAY = 0.25  # a kernel's cost in a pass over a prompt: it overlaps with its neighbours


@dataclass(frozen=True)
class Terms:
    """Seconds, by where they go. The sum is the time.

    Attributes:
        weights: reading weights.
        kv: reading the KV cache.
        gemm: arithmetic beyond the reading of weights; attention over a prompt.
        all_reduce: the exposed part.
        send_recv: between stages.
        bubble: stages that wait for each other.
        launch: small kernels of the layers, and ranks waiting for each other.
        host: scheduling, sampling.
        prefill: of other requests, in between.
        draft: of speculation.
    """

    weights: float = 0.0
    kv: float = 0.0
    gemm: float = 0.0
    all_reduce: float = 0.0
    send_recv: float = 0.0
    bubble: float = 0.0
    launch: float = 0.0
    host: float = 0.0
    prefill: float = 0.0
    draft: float = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(getattr(self, name) for name in _TERMS)

    @property
    def communication(self) -> float:
        """What distribution alone costs."""
        return self.all_reduce + self.send_recv + self.bubble

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, name) + getattr(other, name) for name in _TERMS))

    def scaled(self, factor: float) -> Terms:
        """All of them times ``factor``."""
        return Terms(*(getattr(self, name) * factor for name in _TERMS))

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return {name: getattr(self, name) for name in _TERMS}


_TERMS = tuple(field.name for field in fields(Terms))


@dataclass(frozen=True)
class Setting:
    """What does not change while layouts are compared.

    Attributes:
        fused: whether commfuse's fused kernels run where they can; otherwise as other engines do.
    """

    model: Model
    cluster: Cluster
    precision: Precision
    calibration: Calibration
    fused: bool = True

    def flops(self, dtype: str) -> float:
        """Operations/s that large GEMMs reach on weights of ``dtype``."""
        device = self.cluster.device
        kind = device.compute_dtype(dtype)
        share = self.calibration.gemm if kind == "bf16" else self.calibration.gemm_low
        return device.tflops[kind] * 1e12 * device.achievable * share


def _gemm(
    setting: Setting, tp: int, rows: float, k: int, n: int, weight_bytes: float
) -> tuple[float, float]:
    """Seconds of reading the weights of one GEMM, and of what it takes longer than that."""
    memory = setting.cluster.device.memory_bandwidth(tp) * setting.calibration.memory
    reading = k * n * weight_bytes / memory
    moving = reading + rows * (k + n) * 2.0 / memory
    arithmetic = 2.0 * rows * k * n / setting.flops(setting.precision.weights)
    total = (moving**_SHARPNESS + arithmetic**_SHARPNESS) ** (1 / _SHARPNESS)
    return reading, total - reading


def _fused_exposed(setting: Setting, begin: int, tp: int, nbytes: float, gemm: float) -> float:
    """What of an all-reduce shows when its GEMM sends tiles as they are finished."""
    plain = setting.cluster.all_reduce_seconds(begin, tp, nbytes)
    least = setting.cluster.all_reduce_seconds(begin, tp, 0.0)
    hidden = min(_HIDDEN * plain, gemm, plain - min(least, plain))
    return plain - hidden + _FUSED_COST * gemm


def all_reduces(setting: Setting, tp: int, begin: int, rows: float) -> tuple[float, bool]:
    """Seconds that the two all-reduces of a layer show, and whether fusing them pays.

    Args:
        setting: what runs.
        tp, begin: the devices ``begin`` … ``begin + tp - 1`` take part.
        rows: of the hidden state.
    """
    if tp == 1:
        return 0.0, False
    nbytes = rows * setting.model.hidden_size * 2.0
    plain = len(SUMMED) * setting.cluster.all_reduce_seconds(begin, tp, nbytes)
    if not setting.fused or rows > FUSED_ROWS or not setting.cluster.mapped(begin, tp):
        return plain, False
    fused = 0.0
    weight_bytes = WEIGHT_BYTES[setting.precision.weights]
    for k, n in (setting.model.gemms(tp)[index] for index in SUMMED):
        gemm = sum(_gemm(setting, tp, rows, k, n, weight_bytes))
        fused += _fused_exposed(setting, begin, tp, nbytes, gemm)
    return min(plain, fused), fused < plain


def _kernels(setting: Setting) -> int:
    """Small kernels in a layer."""
    quantised = setting.cluster.device.compute_dtype(setting.precision.weights) != "bf16"
    return _KERNELS + _NORM_KERNELS * setting.model.qk_norm + _QUANTISE_KERNELS * quantised


def _layer_gemms(setting: Setting, stage: Stage, rows: float) -> tuple[float, float]:
    """Seconds of the GEMMs of a stage's layers: reading weights, and what comes on top."""
    weight_bytes = WEIGHT_BYTES[setting.precision.weights]
    reading = more = 0.0
    for k, n in setting.model.gemms(stage.tp):
        a, b = _gemm(setting, stage.tp, rows, k, n, weight_bytes)
        reading, more = reading + a * stage.layers, more + b * stage.layers
    return reading, more


@functools.lru_cache(maxsize=200_000)
def stage_decode(
    setting: Setting, stage: Stage, requests: float, context: float, rows: float
) -> Terms:
    """One stage's part of a decoding step.

    Args:
        setting, stage: what runs where.
        requests: in this step; each reads its KV cache.
        context: tokens that each has, on average.
        rows: tokens computed: ``requests``, or more when drafts are verified.
    """
    model, calibration, tp, layers = setting.model, setting.calibration, stage.tp, stage.layers
    shard = model.shard(tp)
    reading, more = _layer_gemms(setting, stage, rows)
    # Every stage is a process that prepares its own pass.
    host = calibration.step + calibration.request * requests
    if stage.last:
        a, b = _gemm(setting, tp, rows, model.hidden_size, shard.vocabulary, 2.0)
        reading, more = reading + a, more + b
    kv = 2 * layers * shard.kv_heads * model.head_dim * KV_BYTES[setting.precision.kv]
    kv_seconds = (
        requests
        * context
        * kv
        / (setting.cluster.device.memory_bandwidth(tp) * calibration.attention_memory)
    )
    exchange, _ = all_reduces(setting, tp, stage.begin, rows)
    waiting = 2 * calibration.sync if tp > 1 else 0.0
    return Terms(
        weights=reading,
        kv=kv_seconds,
        gemm=more,
        all_reduce=layers * exchange,
        launch=layers * (_kernels(setting) * calibration.kernel + waiting),
        host=host,
    )


@functools.lru_cache(maxsize=200_000)
def stage_prefill(setting: Setting, stage: Stage, tokens: float, before: float) -> Terms:
    """One stage's pass over ``tokens`` of a prompt of which ``before`` are already in the cache."""
    model, calibration, tp, layers = setting.model, setting.calibration, stage.tp, stage.layers
    shard = model.shard(tp)
    reading, more = _layer_gemms(setting, stage, tokens)
    pairs = tokens * (before + tokens / 2)
    device = setting.cluster.device
    attention = 4 * pairs * shard.heads * model.head_dim
    attention /= device.tflops["bf16"] * 1e12 * device.achievable * calibration.attention
    passes = calibration.activation_passes * tokens * model.hidden_size * 2.0
    more += layers * (attention + passes / (device.memory_bandwidth(tp) * calibration.memory))
    exchange, _ = all_reduces(setting, tp, stage.begin, tokens)
    return Terms(
        weights=reading,
        gemm=more,
        all_reduce=layers * exchange,
        launch=layers * _kernels(setting) * calibration.kernel * _REPLAY,
    )

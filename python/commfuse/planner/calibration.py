"""The few constants of the cost model that are fitted to measurements, and what they mean."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from commfuse.errors import UsageError

_DATA = Path(__file__).parent / "data" / "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Constants of the cost model. Each is physical, so that it holds on devices never measured.

    Attributes:
        memory: part of the memory's bandwidth at which GEMMs stream weights.
        attention_memory: part of it at which decoding attention reads the KV cache.
        gemm: part of a device's achievable arithmetic that GEMMs of real shapes reach.
        gemm_low: the same for weights in 8 or 4 bits, activations being quantised on the way.
        attention: part of the achievable arithmetic that attention over a prompt reaches.
        kernel: seconds that a small kernel of a layer takes, whatever it computes.
        sync: seconds by which ranks wait for each other in front of an all-reduce.
        step: seconds of a step outside the layers: scheduling, sampling.
        request: seconds of a step for each request in it.
        activation_passes: how often a prompt's hidden states pass memory in a layer.
        arrival: seconds from a request's arrival to its first kernel.
        load: of the time, under full load, what decoding and prefill get: slots stand empty between
            requests, and the last ones of a run are alone.
        queue: of the requests in flight, the part that a new one finds waiting for prefill.
    """

    memory: float = 0.85
    attention_memory: float = 0.7
    gemm: float = 0.95
    gemm_low: float = 0.76
    attention: float = 0.45
    kernel: float = 3e-6
    sync: float = 3e-6
    step: float = 1e-3
    request: float = 5e-6
    activation_passes: float = 12.0
    arrival: float = 0.04
    load: float = 0.88
    queue: float = 0.08

    def with_changes(self, **changes: float) -> Calibration:
        """A copy with other constants.

        Raises:
            UsageError: an unknown constant, or one that is not positive.
        """
        known = {f.name for f in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise UsageError(f"calibration: unknown {name}; known: {', '.join(sorted(known))}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise UsageError(f"calibration: {name} must be positive, not {value!r}")
        return replace(self, **changes)

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


PRIOR = Calibration()  # what one would say without a measurement: fits are drawn towards it


@dataclass(frozen=True)
class Errors:
    """Errors of predictions on rows that were not fitted. Half of the relative errors are below
    ``median``; four in five measurements are at most ``1 + p80`` times the prediction, and at least
    that part of it."""

    median: float
    p80: float


@functools.cache
def _facts() -> dict:
    return json.loads(_DATA.read_text())


@functools.cache
def shipped() -> Calibration:
    """The constants that come with the package, for GPUs."""
    return PRIOR.with_changes(**_facts()["constants"])


def for_device(is_gpu: bool, measured: dict[str, float] | None = None) -> Calibration:
    """The constants for a device: the GPUs', or a CPU's, changed by what was measured on it.

    Args:
        is_gpu: whether kernels are launched.
        measured: by ``commfuse profile``, by name.
    """
    base = shipped() if is_gpu else PRIOR.with_changes(**_facts()["cpu_constants"])
    return base.with_changes(**measured) if measured else base


@functools.cache
def errors() -> dict[str, Errors]:
    """By kind of figure: tpot, ttft, speedup (of TP), throughput, memory."""
    return {kind: Errors(**found) for kind, found in _facts()["errors"].items()}


def origin() -> str:
    """What the constants were fitted to, in words."""
    return _facts()["origin"]

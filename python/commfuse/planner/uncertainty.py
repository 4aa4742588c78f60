"""How far a figure may be off: the error of its kind where it was held against measurements."""

from __future__ import annotations

from dataclasses import dataclass

from commfuse.planner.calibration import errors
from commfuse.planner.cluster import Cluster
from commfuse.planner.layout import Layout

# What was never measured doubles the error, or widens it by half; the reason is told.
_NEVER, _RARELY = 2.0, 1.5


@dataclass(frozen=True)
class Spread:
    """Four in five figures are within these relative errors.

    Attributes:
        tpot, ttft, throughput, memory: relative.
        reasons: why they are wider than in the validation, in words.
    """

    tpot: float
    ttft: float
    throughput: float
    memory: float
    reasons: tuple[str, ...]


def spread(cluster: Cluster, layout: Layout) -> Spread:
    """Of the figures of a layout."""
    wider, reasons = 1.0, []
    if layout.pp > 1:
        wider *= _RARELY
        reasons.append("few measurements of pipelines were at hand")
    used = cluster.level_between(0, layout.tp * layout.pp - 1)
    if layout.tp * layout.pp > 1:
        if used.name == "network":
            wider *= _NEVER if layout.tp > cluster.host_size else _RARELY
            reasons.append("no measurements across hosts were at hand")
        elif not used.link.measured:
            wider *= _RARELY
            reasons.append(f"all-reduces over {used.link.name} are computed, not measured")
    if not cluster.device.is_gpu:
        reasons.append("CPUs are validated on one machine")
    found = errors()
    return Spread(
        tpot=found["tpot"].p80 * wider,
        ttft=found["ttft"].p80 * wider,
        throughput=found["throughput"].p80 * wider,
        memory=found["memory"].p80,
        reasons=tuple(reasons),
    )

"""How far a figure may be off: the error of its kind where it was held against measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from commfuse.planner.calibration import errors
from commfuse.planner.cluster import Cluster
from commfuse.planner.layout import Layout
from commfuse.planner.memory import Memory
from commfuse.planner.names import figure

# What was never measured doubles the error, or widens it by half; the reason is told.
_NEVER, _RARELY = 2.0, 1.5


class Range(NamedTuple):
    """A figure, and between what four in five measurements lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As in ``47.6 (38 to 60)``."""
        return f"{figure(self.value)} ({figure(self.low, 2)} to {figure(self.high, 2)})"


def around(value: float, error: float) -> Range:
    """What lies within an error, which is a factor: 0.2 is 1.2 times as much, or as little.

    Example:
        >>> around(6.0, 0.5)
        Range(value=6.0, low=4.0, high=9.0)
    """
    return Range(value, value / (1 + error), value * (1 + error))


def exactly(value: float) -> Range:
    """What is known."""
    return Range(value, value, value)


@dataclass(frozen=True)
class Spread:
    """Errors of figures, as :func:`around` takes them.

    Attributes:
        tpot, ttft, throughput, memory: of these; a price is as uncertain as the throughput.
        ratio: of the speeds of two layouts, one of which this is.
        reasons: why they are wider than in the validation, in words.
    """

    tpot: float
    ttft: float
    throughput: float
    memory: float
    ratio: float
    reasons: tuple[str, ...]

    def kv_tokens(self, memory: Memory) -> Range:
        """The tokens that have room, if all that is computed is larger or smaller by its error."""
        filled = around(memory.usable - memory.room, self.memory)
        least, most = (
            max(0.0, (memory.usable - taken) / memory.kv_per_token)
            for taken in (filled.high, filled.low)
        )
        return Range(memory.kv_tokens, least, most)


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
        wider *= _RARELY
        reasons.append("CPUs are validated on one machine")
    found = errors()
    return Spread(
        tpot=found["tpot"].p80 * wider,
        ttft=found["ttft"].p80 * wider,
        throughput=found["throughput"].p80 * wider,
        memory=found["memory"].p80,
        ratio=found["speedup"].p80 * wider,
        reasons=tuple(reasons),
    )

"""Devices: memory, bandwidth and arithmetic, as their makers state them or as measured."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from commfuse.errors import UsageError
from commfuse.planner.names import choose

_DATA = Path(__file__).parent / "data" / "devices.json"
# Names without a form factor, and those of other tools, mean the usual one.
_ALIASES = {
    "a100": "a100-80g-sxm",
    "a100-sxm": "a100-80g-sxm",
    "a100-80g": "a100-80g-sxm",
    "a100-pcie": "a100-80g-pcie",
    "h100": "h100-sxm",
    "h200-sxm": "h200",
    "b200-sxm": "b200",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
    "3090": "rtx-3090",
    "rtx3090": "rtx-3090",
    "rtx-pro-6000-server": "rtx-pro-6000",
}


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name, title: as typed, as shown.
        memory_gb: 1e9 bytes.
        bandwidth_gb_per_s: of its memory, 1e9 bytes/s.
        tflops: dense 1e12 operations/s by dtype (bf16, which fp16 shares; fp8, fp4 where it has
            them).
        achievable: the part of ``tflops`` that large GEMMs reach.
        host: devices in one host, usually.
        link: between the devices of a host, the name of a link.
        dollars_per_hour: what one costs to rent; an assumption that the user may replace.
        host_bandwidth_gb_per_s: of a host's memory, where devices share it (cores do); None: each
            has its own.
    """

    name: str
    title: str
    memory_gb: float
    bandwidth_gb_per_s: float
    tflops: dict[str, float] = field(hash=False)
    achievable: float
    host: int
    link: str
    dollars_per_hour: float
    host_bandwidth_gb_per_s: float | None = None

    def __post_init__(self):
        for key in (
            "memory_gb",
            "bandwidth_gb_per_s",
            "achievable",
            "dollars_per_hour",
            "host_bandwidth_gb_per_s",
        ):
            value = getattr(self, key)
            if value is None and key == "host_bandwidth_gb_per_s":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise UsageError(f"device {self.name}: {key} must be positive, not {value!r}")
        if "bf16" not in self.tflops:
            raise UsageError(f"device {self.name}: tflops lacks bf16")

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are launched on it."""
        return not self.name.startswith("cpu")

    def compute_dtype(self, dtype: str) -> str:
        """In which dtype it multiplies weights of ``dtype``: the same, or 16 bits, unpacked."""
        return dtype if dtype in self.tflops else "bf16"

    def memory_bandwidth(self, active: int) -> float:
        """Bytes/s that one device reads while ``active`` ones of its host read."""
        own = self.bandwidth_gb_per_s * 1e9
        if self.host_bandwidth_gb_per_s is None:
            return own
        return min(own, self.host_bandwidth_gb_per_s * 1e9 / active)

    def with_changes(self, **changes: object) -> Device:
        """A copy with other figures."""
        return replace(self, **changes)


@functools.cache
def _facts() -> dict[str, dict]:
    return json.loads(_DATA.read_text())


def device_names() -> list[str]:
    """The presets."""
    return sorted(_facts())


def load_device(name: str, given: str) -> Device:
    """A preset.

    Args:
        name: as typed; capitals and underscores are forgiven.
        given: what the user typed and where, for the error.

    Raises:
        UsageError: unknown; the closest names are offered.

    Example:
        >>> load_device("H100_SXM", "--cluster 8:H100_SXM").memory_gb
        80
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    wanted = choose(_ALIASES.get(wanted, wanted), _facts(), given, "device", "a YAML file")
    return Device(name=wanted, **_facts()[wanted])

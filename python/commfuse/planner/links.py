"""Links between devices: how long a message and an all-reduce take over one of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from commfuse.errors import UsageError
from commfuse.planner.curves import Curve
from commfuse.planner.names import choose

_DATA = Path(__file__).parent / "data" / "links.json"
# A kernel that pushes to its peers' memory itself reaches less of a port than a copy engine.
_KERNEL_SHARE = 0.6
_FIELDS = (
    "latency_us",
    "gb_per_s",
    "mapped",
    "shared",
    "all_reduce_us",
    "small_us",
    "send_us",
    "source",
)


@dataclass(frozen=True)
class Link:
    """What joins the devices of one level.

    Attributes:
        name: of the preset, or in the user's file.
        latency: seconds from one device to another for a small message.
        bandwidth: bytes/s that one device sends.
        mapped: whether kernels can reach their peers' memory: then small messages need no library,
            and communication can be fused into GEMMs.
        shared: whether the members of a domain below share one port; ``bandwidth`` is then its.
        all_reduce: measured, by number of devices; for others see :meth:`all_reduce_seconds`.
        small: seconds of a small all-reduce by a kernel of its own, by number of devices.
        send: measured time of one message; None: latency + bytes / bandwidth.
        source: where the figures are from.
    """

    name: str
    latency: float
    bandwidth: float
    mapped: bool = False
    shared: bool = False
    all_reduce: Mapping[int, Curve] = field(default_factory=dict, hash=False)
    small: Mapping[int, float] = field(default_factory=dict, hash=False)
    send: Curve | None = None
    source: str = ""

    @property
    def measured(self) -> bool:
        """Whether its all-reduce was measured, rather than put together from latency and bytes."""
        return bool(self.all_reduce)

    def send_seconds(self, nbytes: float) -> float:
        """One message from one device to another."""
        if self.send is not None:
            return self.send.seconds(nbytes)
        return self.latency + nbytes / self.bandwidth

    def all_reduce_seconds(self, nbytes: float, members: int, port_share: int = 1) -> float:
        """An all-reduce of ``nbytes`` over ``members``: the best of a library's and a kernel's.

        Args:
            nbytes: of the message on each member.
            members: how many take part.
            port_share: members of a domain that use a shared port at the same time.
        """
        if members == 1:
            return 0.0
        library = self._library_seconds(nbytes, members, port_share)
        # A profile measures whatever is best: its curve is not for a formula to undercut.
        if not self.mapped or (self.all_reduce and not self.small):
            return library
        return min(library, self.kernel_seconds(nbytes, members))

    def kernel_seconds(self, nbytes: float, members: int) -> float:
        """An all-reduce by a kernel that writes to its peers' memory: in one shot, or in two."""
        bandwidth = _KERNEL_SHARE * self.bandwidth
        small = _between(self.small, members) if self.small else self.latency
        one_shot = small + (members - 1) * nbytes / bandwidth
        two_shot = 1.5 * small + 2 * (members - 1) / members * nbytes / bandwidth
        return min(one_shot, two_shot)

    def _library_seconds(self, nbytes: float, members: int, port_share: int) -> float:
        if self.all_reduce and port_share == 1:
            return _curve_between(self.all_reduce, members, nbytes)
        share = port_share if self.shared else 1
        wire = 2 * (members - 1) / members * nbytes * share / self.bandwidth
        # A ring takes 2 (n - 1) hops in a row, a tree goes up and down and moves twice the bytes.
        hops = 2 * max(1, (members - 1).bit_length())
        ring = 2 * (members - 1) * self.latency + wire
        return min(ring, hops * self.latency + 2 * wire)

    def faster(self, factor: float) -> Link:
        """The same with ``factor`` times the bandwidth; latencies stay."""
        return replace(
            self,
            bandwidth=self.bandwidth * factor,
            all_reduce={n: curve.faster(factor) for n, curve in self.all_reduce.items()},
            send=self.send.faster(factor) if self.send else None,
        )


def _neighbours(table: Mapping[int, Any], members: int) -> tuple[int, int, float]:
    """The measured counts around ``members``, and how far it is from the first to the second."""
    counts = sorted(table)
    upper = next((n for n in counts if n >= members), counts[-1])
    lower = max((n for n in counts if n <= members), default=counts[0])
    return lower, upper, (members - lower) / (upper - lower) if upper != lower else 0.0


def _between(table: Mapping[int, float], members: int) -> float:
    lower, upper, part = _neighbours(table, members)
    beyond = members / upper if members > upper else 1.0
    return (table[lower] * (1 - part) + table[upper] * part) * beyond


def _curve_between(table: Mapping[int, Curve], members: int, nbytes: float) -> float:
    lower, upper, part = _neighbours(table, members)
    beyond = members / upper if members > upper else 1.0
    first = table[lower].seconds(nbytes)
    return (first * (1 - part) + table[upper].seconds(nbytes) * part) * beyond


@functools.cache
def _facts() -> dict[str, dict[str, Any]]:
    return json.loads(_DATA.read_text())


def link_names() -> list[str]:
    """The presets."""
    return sorted(_facts())


def load_link(name: str, given: str) -> Link:
    """A preset.

    Args:
        name: as typed.
        given: what the user typed and where, for the error.

    Raises:
        UsageError: unknown; the closest names are offered.

    Example:
        >>> load_link("ib-ndr", "--cluster 2x8:h100-sxm,ib-ndr").bandwidth
        42000000000.0
    """
    wanted = name.strip().lower().replace("_", "-")
    aliases = {"ib": "ib-ndr", "infiniband": "ib-ndr", "efa": "efa-400g"}
    wanted = choose(aliases.get(wanted, wanted), _facts(), given, "link", "a YAML file")
    return link_from_facts(wanted, _facts()[wanted])


def link_from_facts(name: str, facts: Mapping[str, Any]) -> Link:
    """A link from figures in microseconds and GB/s, as in the package's data and in YAML files.

    Raises:
        UsageError: a figure is missing, of the wrong kind or unknown; the message names it.
    """
    if unknown := sorted(set(facts) - set(_FIELDS)):
        raise UsageError(f"link {name}: unknown {', '.join(unknown)}; known: {', '.join(_FIELDS)}")
    for key in ("latency_us", "gb_per_s"):
        value = facts.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UsageError(f"link {name}: {key} must be a positive number, not {value!r}")
    try:
        return Link(
            name=name,
            latency=facts["latency_us"] * 1e-6,
            bandwidth=facts["gb_per_s"] * 1e9,
            mapped=bool(facts.get("mapped", False)),
            shared=bool(facts.get("shared", False)),
            all_reduce={int(n): _curve(p) for n, p in facts.get("all_reduce_us", {}).items()},
            small={int(n): float(us) * 1e-6 for n, us in facts.get("small_us", {}).items()},
            send=_curve(facts["send_us"]) if facts.get("send_us") else None,
            source=str(facts.get("source", "")),
        )
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise UsageError(f"link {name}: {error}") from None
        raise UsageError(f"link {name}: points are [bytes, microseconds]: {error}") from None


def _curve(points: list[list[float]]) -> Curve:
    return Curve(tuple((float(size), float(us) * 1e-6) for size, us in points))

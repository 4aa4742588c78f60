"""Clusters: devices in domains within domains, each level joined by a link of its own.

A host of eight devices on NVLink in a cluster of two is two levels. Pairs on NVLink bridges, under
two sockets, in hosts on Ethernet are four. The devices are numbered 0, 1, … and a domain of a level
with ``size`` devices holds neighbours: the graph is a tree whose leaves are the devices.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from commfuse.errors import UsageError
from commfuse.planner.devices import Device, device_names, load_device
from commfuse.planner.links import Link, link_names, load_link

GRAMMAR = """\
--cluster takes
    [HOSTSx]DEVICES:DEVICE[,LINK]   as in 2x8:h100-sxm,ib-ndr or 16:a100-80g-sxm or 1:rtx-4090
    any:DEVICE[,LINK]               as many as are needed, in hosts of the usual size
    FILE.yaml                       your own; `commfuse profile` writes one
LINK joins hosts (the default is ib-hdr for A100, 100gbe for consumer cards, else ib-ndr); a second
one, as in 8:l40s,ib-ndr,pcie4-host, replaces the link inside a host."""
ANY_COUNT = 64  # devices that `any` looks at


@dataclass(frozen=True)
class Level:
    """Domains of ``size`` devices, each of them joined by ``link``."""

    name: str
    size: int
    link: Link


@dataclass(frozen=True)
class Cluster:
    """Devices, and how they are joined.

    Attributes:
        name: as given.
        device: all are of this kind.
        count: how many there are.
        levels: from the innermost to the one that holds all.
        free_count: whether ``count`` is a bound, and the fewest devices are looked for.
        calibration: constants that were measured on it, by name.

    Example:
        >>> cluster = parse_cluster("2x8:a100-80g-sxm,ib-hdr")
        >>> [(level.name, level.size, level.link.name) for level in cluster.levels]
        [('host', 8, 'nvlink3'), ('network', 16, 'ib-hdr')]
    """

    name: str
    device: Device
    count: int
    levels: tuple[Level, ...]
    free_count: bool = False
    calibration: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        below = 1
        for level in self.levels:
            if level.size < below or level.size % below:
                raise UsageError(
                    f"cluster {self.name}: level {level.name} has {level.size} devices, no "
                    f"multiple of the {below} of the level below"
                )
            below = level.size
        if self.count > below:
            raise UsageError(
                f"cluster {self.name}: {self.count} devices, but the top level holds {below}"
            )

    @property
    def host_size(self) -> int:
        """Devices of one host."""
        hosts = [level.size for level in self.levels if level.name == "host"]
        return min(self.count, hosts[0] if hosts else self.levels[0].size)

    def level_between(self, first: int, second: int) -> Level:
        """The innermost level with a domain that holds both devices."""
        for level in self.levels:
            if first // level.size == second // level.size:
                return level
        return self.levels[-1]

    def all_reduce_seconds(self, begin: int, members: int, nbytes: float) -> float:
        """An all-reduce over neighbours ``begin`` … ``begin + members - 1``; the best algorithm.

        Flat: as if all members were joined by the slowest link between them. Hierarchical, where
        domains are whole: inside each, across them on slices, inside again.
        """
        if members == 1:
            return 0.0
        key = self._shape(begin, members)
        return _all_reduce(self.levels[: key[0] + 1], key[1], members, nbytes)

    def _shape(self, begin: int, members: int) -> tuple[int, int]:
        """The level of a group, and where it begins in its domain."""
        top = self.level_between(begin, begin + members - 1)
        return self.levels.index(top), begin % top.size

    def canonical_begin(self, begin: int, members: int) -> int:
        """Where a group that lies like this one in its domain begins, next to device 0."""
        return self._shape(begin, members)[1]

    def mapped(self, begin: int, members: int) -> bool:
        """Whether every member's kernels reach the memory of all others."""
        top, _ = self._shape(begin, members)
        return all(level.link.mapped for level in self.levels[: top + 1])

    def send_seconds(self, first: int, second: int, nbytes: float, senders: int) -> float:
        """A message from one device to another while ``senders`` neighbours do the same."""
        link = self.level_between(first, second).link
        return link.send_seconds(nbytes * (senders if link.shared else 1))

    def faster(self, factor: float) -> Cluster:
        """The same with ``factor`` times the bandwidth of every link."""
        levels = (replace(level, link=level.link.faster(factor)) for level in self.levels)
        return replace(self, levels=tuple(levels))


@functools.lru_cache(maxsize=200_000)
def _all_reduce(levels: tuple[Level, ...], begin: int, members: int, nbytes: float) -> float:
    link = levels[-1].link
    inside = levels[-2].size if len(levels) > 1 else 1
    # Where members of a domain share a port, all of a flat ring's traffic but one hop stays inside.
    flat = link.all_reduce_seconds(nbytes, members)
    if inside == 1 or begin % inside or members % inside:
        return flat
    within = _all_reduce(levels[:-1], 0, inside, nbytes)
    share = inside if link.shared else 1
    across = link.all_reduce_seconds(nbytes / inside, members // inside, share)
    return min(flat, within + across)


def parse_cluster(text: str) -> Cluster:
    """A cluster from its description, see :data:`GRAMMAR`.

    Raises:
        UsageError: another form, an unknown device or link.
    """
    if text.endswith((".yaml", ".yml")):
        from commfuse.planner.cluster_file import read_cluster

        return read_cluster(text)
    given = f"--cluster {text}"
    match = re.fullmatch(r"(?:(\d+)[xX])?(\d+|any):([^,:]+)((?:,[^,:]+){0,2})", text.strip())
    if not match or (match[1] and match[2] == "any"):
        raise UsageError(f"{given}: not understood\n{GRAMMAR}")
    device = load_device(match[3], given)
    links = [part for part in match[4].split(",") if part]
    network = load_link(links[0] if links else _network(device), given)
    inside = load_link(links[1] if len(links) > 1 else device.link, given)
    free = match[2] == "any"
    number = ANY_COUNT if free else int(match[2])
    count = int(match[1] or 1) * number
    host = number if match[1] else min(device.host, number)
    if count < 1:
        raise UsageError(f"{given}: at least one device\n{GRAMMAR}")
    if count > 1024:
        raise UsageError(f"{given}: {count} devices; up to 1024 are planned for")
    levels = [Level("host", host, inside)]
    if count > host:
        levels.append(Level("network", -(-count // host) * host, network))
    return Cluster(text, device, count, tuple(levels), free)


def _network(device: Device) -> str:
    if device.name.startswith("a100"):
        return "ib-hdr"
    return "100gbe" if device.name.startswith(("rtx", "cpu", "l4")) else "ib-ndr"


def known_names() -> str:
    """The presets of devices and links, in words."""
    return f"devices: {', '.join(device_names())}\nlinks: {', '.join(link_names())}"

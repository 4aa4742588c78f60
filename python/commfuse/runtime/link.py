"""Emulated links: what a rank sends is held back by latency + bytes / bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from commfuse.errors import UsageError


@dataclass(frozen=True)
class Link:
    """One direction of a rank's port.

    Attributes:
        name: what the user called it.
        latency_us: from the hand-over of a message to its arrival, microseconds.
        gigabytes_per_second: bandwidth of the port, shared by all its receivers, 1e9 bytes/s.
    """

    name: str
    latency_us: float
    gigabytes_per_second: float

    def seconds(self, messages: float, transferred_bytes: float) -> float:
        """Time that ``messages`` in a row with ``transferred_bytes`` in total take."""
        return messages * self.latency_us * 1e-6 + transferred_bytes / (
            self.gigabytes_per_second * 1e9
        )


# One-way bandwidths as the makers state them for a GPU (NVLink: all links of one GPU; InfiniBand
# and Ethernet: one port). Latencies are what a kernel or a socket typically sees for a small
# message: some 2 us over NVLink, 3 us over PCIe, 5 us over InfiniBand verbs, 30 us over TCP.
PRESETS = {
    link.name: link
    for link in (
        Link("nvlink3", 2.0, 300.0),
        Link("nvlink4", 2.0, 450.0),
        Link("nvlink5", 2.0, 900.0),
        Link("pcie4", 3.0, 31.0),
        Link("pcie5", 3.0, 63.0),
        Link("ib-hdr", 5.0, 25.0),
        Link("ib-ndr", 5.0, 50.0),
        Link("10gbe", 30.0, 1.25),
        Link("25gbe", 30.0, 3.1),
        Link("100gbe", 30.0, 12.5),
    )
}


def parse_link(text: str) -> Link:
    """A link from a preset's name or from ``latency_us:GB/s``.

    Raises:
        UsageError: neither; the message lists the presets.

    Example:
        >>> parse_link("pcie4").gigabytes_per_second
        31.0
        >>> parse_link("5:25").latency_us
        5.0
    """
    if text in PRESETS:
        return PRESETS[text]
    latency, colon, bandwidth = text.partition(":")
    try:
        link = Link(text, float(latency), float(bandwidth))
    except ValueError:
        link = None
    if not colon or link is None or not link.latency_us >= 0 or not link.gigabytes_per_second > 0:
        raise UsageError(
            f"unknown link {text!r}: use latency_us:GB/s (as in 5:25) or one of "
            f"{', '.join(PRESETS)}"
        )
    return link


def parse_links(texts: list[str]) -> dict[str, Link]:
    """Links by the dimension of the mesh they serve, from ``tp=nvlink4`` or ``nvlink4`` (for tp).

    Raises:
        UsageError: an unknown dimension or link.

    Example:
        >>> parse_links(["tp=nvlink4"])["tp"].name
        'nvlink4'
    """
    links = {}
    for text in texts:
        dimension, equals, value = text.rpartition("=")
        dimension = dimension if equals else "tp"
        if dimension not in ("tp", "pp"):
            raise UsageError(
                f"--link {text}: {dimension!r} is no dimension of the mesh; use tp=LINK or pp=LINK"
            )
        links[dimension] = parse_link(value)
    return links

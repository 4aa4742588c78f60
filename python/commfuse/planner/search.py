"""Every layout that is worth a look, what it does at work, and why others cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from commfuse.planner.cluster import Cluster
from commfuse.planner.layout import Layout, stages
from commfuse.planner.memory import Memory, memory_of
from commfuse.planner.model import Model
from commfuse.planner.serving import Service, Work, serve
from commfuse.planner.speculation import Acceptance
from commfuse.planner.step import Setting, all_reduces

OBJECTIVES = ("latency", "throughput", "cost", "pareto")
CHUNKS = (8192, 2048, 512)
EXACT_DEVICES = 16  # up to so many, every number of ranks and stages is looked at
MOST_REQUESTS = 4096  # in flight in one replica


@dataclass(frozen=True)
class Limits:
    """What an answer must keep to.

    Attributes:
        ttft, tpot: seconds, at most; None: no limit.
        tp, pp, replicas: the only value to look at; None: any.
    """

    ttft: float | None = None
    tpot: float | None = None
    tp: int | None = None
    pp: int | None = None
    replicas: int | None = None

    def missed_by(self, service: Service) -> str:
        """Which limit a layout misses, in words; empty: none."""
        missed = []
        for name, limit in (("TTFT", self.ttft), ("TPOT", self.tpot)):
            value = service.ttft if name == "TTFT" else service.tpot
            if limit is not None and value > limit:
                missed.append(f"{name} {value * 1e3:.4g} ms is above {limit * 1e3:g} ms")
        return " and ".join(missed)


@dataclass(frozen=True)
class Candidate:
    """A layout at work.

    Attributes:
        layout, chunk, service: what runs, and what comes of it.
        fused: whether fused kernels pay in its decoding steps.
        missed: which limit it misses, in words; empty: none.
        dollars: for a million output tokens, of its devices alone.
    """

    layout: Layout
    chunk: int
    service: Service
    fused: bool
    missed: str
    dollars: float

    def seconds(self, work: Work) -> float:
        """Of one request, from its arrival to its last token."""
        return self.service.ttft + (work.output - 1) * self.service.tpot


@dataclass(frozen=True)
class Refused:
    """A layout that cannot run.

    Attributes:
        layout: that cannot.
        short: bytes that each device lacks.
    """

    layout: Layout
    short: float

    @property
    def total_short(self) -> float:
        """Bytes that all devices of a replica lack together."""
        return self.short * self.layout.tp * self.layout.pp

    @property
    def reason(self) -> str:
        """In words."""
        return (
            f"does not fit: {self.short / 1e9:.1f} GB short on each device, "
            f"{self.total_short / 1e9:.0f} GB in all"
        )


def layouts(model: Model, cluster: Cluster, limits: Limits) -> Iterator[Layout]:
    """Single replicas that the cluster has devices for. Many devices: no uneven TP across hosts."""
    count, host = cluster.count, cluster.host_size
    exact = count <= EXACT_DEVICES
    for tp in range(1, min(model.num_heads, count) + 1):
        if limits.tp not in (None, tp):
            continue
        if not exact and limits.tp is None and tp > host and tp % host:
            continue
        for pp in range(1, min(model.num_layers, count // tp) + 1):
            if limits.pp not in (None, pp):
                continue
            whole = (tp * pp) % host == 0 or host % (tp * pp) == 0
            if exact or limits.pp == pp or pp <= 4 or whole:
                yield Layout(tp, pp)


def most_replicas(cluster: Cluster, layout: Layout) -> int:
    """Replicas that lie alike: whole ones in a host, or each on whole hosts."""
    size, host = layout.tp * layout.pp, cluster.host_size
    if size <= host:
        rest = cluster.count % host
        return cluster.count // host * (host // size) + rest // size
    return cluster.count // (-(-size // host) * host) or 1


def request_counts(most: int, requests: int | None, exact: bool) -> list[int]:
    """Numbers of requests in flight in one replica to look at: the most, and powers of two or four.

    Args:
        most: that have room.
        requests: the only number to look at; None: any.
        exact: whether powers of two are looked at.
    """
    if requests is not None:
        return [requests]
    most = max(1, min(most, MOST_REQUESTS))
    return sorted({1 << n for n in range(0, most.bit_length(), 1 if exact else 2)} | {most})


@dataclass(frozen=True)
class Search:
    """Looks at layouts.

    Attributes:
        setting, work, limits: as asked.
        requests: in flight, over all replicas; None: any number.
        acceptance: of speculation; None: plain decoding.
    """

    setting: Setting
    work: Work
    limits: Limits
    requests: int | None
    acceptance: Acceptance | None

    def run(self) -> tuple[list[Candidate], list[Refused]]:
        """Every candidate, and the layouts that do not fit."""
        found: list[Candidate] = []
        refused: list[Refused] = []
        for layout in layouts(self.setting.model, self.setting.cluster, self.limits):
            chunks = self._chunks(layout)
            if not chunks:
                refused.append(Refused(layout, self.short(layout)))
                continue
            counts = self._replica_counts(layout)
            for chunk in chunks:
                found += self._at_work(layout, chunk, counts)
        return found, refused

    def _replica_counts(self, layout: Layout) -> list[int]:
        most = most_replicas(self.setting.cluster, layout)
        if self.limits.replicas is not None:
            return [self.limits.replicas] if self.limits.replicas <= most else []
        if self.requests is not None:
            most = min(most, self.requests)
        if self.setting.cluster.count <= EXACT_DEVICES:
            return list(range(1, most + 1))
        return sorted({1 << n for n in range(most.bit_length())} | {most})

    def short(self, layout: Layout) -> float:
        """Bytes that each device lacks for one request."""
        return self.memory(layout, CHUNKS[-1]).short(self.work.tokens)

    def memory(self, layout: Layout, chunk: int) -> Memory:
        """Of the fullest device of a replica."""
        device, precision = self.setting.cluster.device, self.setting.precision
        return memory_of(
            self.setting.model, device, layout, precision, min(chunk, self.work.prompt)
        )

    def _chunks(self, layout: Layout) -> list[int]:
        """Chunks of prefill with which a layout fits; one stage gains nothing from small ones."""
        fits = [c for c in CHUNKS if not self.memory(layout, c).short(self.work.tokens)]
        useful = {min(chunk, self.work.prompt): chunk for chunk in reversed(fits)}
        fits = sorted(useful.values(), reverse=True)
        return fits if layout.pp > 1 else fits[:1]

    def _at_work(self, layout: Layout, chunk: int, counts: list[int]) -> Iterator[Candidate]:
        room = self.memory(layout, chunk).requests(self.work.tokens)
        exact = self.setting.cluster.count <= EXACT_DEVICES
        by_load: dict[int, Candidate] = {}
        for replicas in counts:
            each = None if self.requests is None else -(-self.requests // replicas)
            for load in request_counts(room, each, exact):
                if load not in by_load:
                    by_load[load] = self.candidate(layout, chunk, load)
                yield _replicated(by_load[load], replicas, self.requests)

    def candidate(self, layout: Layout, chunk: int, requests: int) -> Candidate:
        """One replica at work."""
        step = min(chunk, self.work.prompt)
        service = serve(self.setting, layout, self.work, requests, step, self.acceptance)
        # Of one replica; of several alike it is the same.
        price = layout.devices * self.setting.cluster.device.dollars_per_hour / 3600
        return Candidate(
            layout=layout,
            chunk=chunk,
            service=service,
            fused=self._fused(layout, service),
            missed=self.limits.missed_by(service),
            dollars=price / service.throughput * 1e6,
        )

    def _fused(self, layout: Layout, service: Service) -> bool:
        setting = self.setting
        each = service.running / service.groups
        kinds = stages(setting.model, setting.cluster, layout.single, setting.precision.weights)
        return all(all_reduces(setting, layout.tp, kind.begin, each)[1] for kind in kinds)


def _replicated(candidate: Candidate, replicas: int, requests: int | None) -> Candidate:
    """Copies of a replica that share nothing: the fullest of them counts."""
    service = candidate.service
    total = requests or service.requests * replicas
    return replace(
        candidate,
        layout=replace(candidate.layout, replicas=replicas),
        service=replace(
            service,
            requests=total,
            running=min(total, service.running * replicas),
            throughput=service.throughput * total / service.requests,
        ),
    )


def rank(candidates: list[Candidate], work: Work, objective: str) -> list[Candidate]:
    """The best first; among those that differ by about a percent, the one on fewer devices."""
    values = {
        "latency": lambda c: c.seconds(work),
        "throughput": lambda c: 1 / c.service.throughput,
        "cost": lambda c: c.dollars,
        "pareto": lambda c: c.seconds(work),
    }

    def key(candidate: Candidate) -> tuple[bool, float, int, float]:
        value = values[objective](candidate)
        return bool(candidate.missed), round(math.log(value), 2), candidate.layout.devices, value

    return sorted(candidates, key=key)


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both TPOT and tokens per second and device; by TPOT."""
    front: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.service.tpot, -_per_device(c))):
        if not front or _per_device(c) > _per_device(front[-1]) * (1 + 1e-9):
            front.append(c)
    return front


def _per_device(candidate: Candidate) -> float:
    return candidate.service.throughput / candidate.layout.devices


def fewest_devices(search: Search, most: int) -> Layout | None:
    """The fewest devices that hold the model and one request; among those, with most room.

    Args:
        search: for which model, precision and work.
        most: devices to look at.
    """
    model = search.setting.model
    for count in range(1, most + 1):
        fits = []
        for tp in range(1, min(count, model.num_heads) + 1):
            pp = count // tp
            if tp * pp != count or pp > model.num_layers:
                continue
            layout = Layout(tp, pp)
            if not search.short(layout):
                fits.append((search.memory(layout, CHUNKS[-1]).kv_tokens, layout))
        if fits:
            return max(fits, key=lambda found: found[0])[1]
    return None

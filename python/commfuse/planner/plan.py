"""A question and its answer: what to run where, how fast, and where adding devices stops paying."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace

from commfuse.errors import CommfuseError, UsageError
from commfuse.planner.calibration import errors, for_device
from commfuse.planner.cluster import ANY_COUNT, Cluster
from commfuse.planner.layout import Layout
from commfuse.planner.memory import Precision, memory_of
from commfuse.planner.model import Model
from commfuse.planner.search import (
    OBJECTIVES,
    Candidate,
    Limits,
    Refused,
    Search,
    fewest_devices,
    pareto,
    rank,
)
from commfuse.planner.serving import Work
from commfuse.planner.speculation import Acceptance
from commfuse.planner.step import Setting
from commfuse.planner.uncertainty import Range, Spread, around, spread

PER_REQUEST = ("latency", "pareto")  # objectives that look at one request's speed
PAYS = 1.2  # twice the devices must bring so much more speed to be worth it


class DoesNotFit(CommfuseError):
    """No layout has room for the model and one request; the message says how many GB are short."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        model, cluster, precision, work, limits: as given.
        objective: one of :data:`commfuse.planner.search.OBJECTIVES`.
        requests: in flight; None: one for latency, any number otherwise.
        acceptance: of speculation; None: not considered.
        fused: whether commfuse's fused kernels may be used.

    Raises:
        UsageError: an unknown objective, sizes below 1, a context that the model does not have.
    """

    model: Model
    cluster: Cluster
    work: Work = field(default_factory=lambda: Work(1024, 256))
    precision: Precision = field(default_factory=Precision)
    limits: Limits = field(default_factory=Limits)
    objective: str = "latency"
    requests: int | None = None
    acceptance: Acceptance | None = None
    fused: bool = True

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective {self.objective}: use {', '.join(OBJECTIVES)}")
        if min(self.work.prompt, self.work.output) < 1:
            raise UsageError("--prompt and --output: at least 1 token each")
        if self.requests is not None and self.requests < 1:
            raise UsageError(f"--requests {self.requests}: at least 1")
        if self.work.tokens > self.model.max_position_embeddings:
            raise UsageError(
                f"--prompt {self.work.prompt} and --output {self.work.output}: {self.model.name} "
                f"has a context of {self.model.max_position_embeddings} tokens"
            )

    @property
    def in_flight(self) -> int | None:
        """Requests in flight: those asked for; one where latency is what counts."""
        return self.requests or (1 if self.objective == "latency" else None)

    def search(self, cluster: Cluster | None = None) -> Search:
        """The search for its answer, on another cluster if one is given."""
        device = self.cluster.device
        setting = Setting(
            self.model,
            cluster or self.cluster,
            self.precision,
            for_device(device.is_gpu, dict(self.cluster.calibration)),
            self.fused,
        )
        return Search(setting, self.work, self.limits, self.in_flight, self.acceptance)


@dataclass(frozen=True)
class Point:
    """A point of the scaling curve: the best layout on exactly so many devices.

    Attributes:
        devices: how many.
        best: on them, by the objective.
        speed: output tokens/s of a request (latency) or of all (throughput, cost).
    """

    devices: int
    best: Candidate
    speed: float


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        question: what was asked.
        candidates: every layout at work that keeps the limits, the best first, one for each layout.
        refused: layouts that do not fit.
        curve: speed over devices.
        sweet_spot: the last point of the curve from which on adding devices does not pay.
        fewest: the layout on the fewest devices that hold the model.
        search: that found it, to ask for more.
    """

    question: Question
    candidates: list[Candidate]
    refused: list[Refused]
    curve: list[Point]
    sweet_spot: Point
    fewest: Layout
    search: Search

    @property
    def best(self) -> Candidate:
        """By the objective; with a free number of devices, of those on the fewest."""
        if self.question.cluster.free_count:
            fewest = [c for c in self.candidates if c.layout == self.fewest]
            return fewest[0] if fewest else self.candidates[0]
        return self.candidates[0]

    @functools.cached_property
    def front(self) -> list[Candidate]:
        """Those that no other beats in both TPOT and tokens/s of a device, under any load unless
        one was asked for."""
        search = replace(self.search, requests=self.question.requests)
        return pareto([candidate for candidate in search.run()[0] if not candidate.missed])

    def shown(self, most: int) -> list[Candidate]:
        """The best first, each TP x PP with its best number of replicas; the answer among them."""
        found: dict[Layout, Candidate] = {}
        for candidate in (self.best, *self.candidates):
            found.setdefault(candidate.layout.single, candidate)
        shown = list(found.values())[:most]
        return sorted(shown, key=self.candidates.index)

    def speed(self, candidate: Candidate) -> float:
        """What the curve shows: tokens/s of a request where latency counts, else of all."""
        return speed(self.question, candidate)

    def spread(self, candidate: Candidate) -> Spread:
        """The errors of its figures."""
        return spread(self.question.cluster, candidate.layout)

    def speeds(self, candidate: Candidate) -> Range:
        """Its speed, and within what it lies."""
        off, service = self.spread(candidate), candidate.service
        error = off.throughput
        if self.question.objective in PER_REQUEST:
            first = service.ttft / candidate.seconds(self.question.work)
            error = first * off.ttft + (1 - first) * off.tpot
        return around(self.speed(candidate), error)

    def ratio(self, candidate: Candidate, to: Candidate) -> Range:
        """How many times as fast one candidate is as another."""
        error = max(self.spread(candidate).ratio, self.spread(to).ratio)
        return around(self.speed(candidate) / self.speed(to), error)


def speed(question: Question, candidate: Candidate) -> float:
    """Output tokens/s of one request (latency), or of all (other objectives)."""
    if question.objective in PER_REQUEST:
        return question.work.output / candidate.seconds(question.work)
    return candidate.service.throughput


def plan(question: Question) -> Plan:
    """Answers a question.

    Raises:
        DoesNotFit: no layout has room; the message names the one that misses least.
        UsageError: no layout meets the limits; the message says the best that can be had.

    Example:
        >>> found = plan(Question(load_model("llama-3.1-8b"), parse_cluster("8:h100-sxm")))
        >>> found.best.layout.tp
        8
    """
    search = question.search()
    found, refused = search.run()
    if not found:
        raise DoesNotFit(_miss(question, search, refused))
    ranked = rank(found, question.work, question.objective)
    kept = [candidate for candidate in ranked if not candidate.missed]
    if not kept:
        raise UsageError(_unmet(question, ranked))
    best_of: dict[Layout, Candidate] = {}
    for candidate in kept:
        best_of.setdefault(candidate.layout, candidate)
    curve = _curve(question, kept)
    fewest = fewest_devices(search, question.cluster.count)
    return Plan(
        question=question,
        candidates=list(best_of.values()),
        refused=refused,
        curve=curve,
        sweet_spot=sweet_spot(curve),
        fewest=fewest or kept[0].layout,
        search=search,
    )


def _curve(question: Question, ranked: list[Candidate]) -> list[Point]:
    best: dict[int, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.layout.devices, candidate)
    return [Point(n, best[n], speed(question, best[n])) for n in sorted(best)]


def sweet_spot(curve: list[Point]) -> Point:
    """The point behind which more devices do not pay: twice as many must bring :data:`PAYS`.

    Example:
        Speeds 10, 19, 25, 26 on 1, 2, 4, 8 devices: the sweet spot is 4.
    """
    spot = curve[0]
    for point in curve[1:]:
        needed = PAYS ** math.log2(point.devices / spot.devices)
        if point.speed >= spot.speed * needed:
            spot = point
    return spot


def _unmet(question: Question, ranked: list[Candidate]) -> str:
    least_tpot = min(ranked, key=lambda c: c.service.tpot)
    least_ttft = min(ranked, key=lambda c: c.service.ttft)
    return (
        f"the limits cannot be met on {question.cluster.name}: {ranked[0].layout}: "
        f"{ranked[0].missed}. The best TPOT is {least_tpot.service.tpot * 1e3:.3g} ms "
        f"({least_tpot.layout}), the best TTFT {least_ttft.service.ttft * 1e3:.3g} ms "
        f"({least_ttft.layout})"
    )


def _miss(question: Question, search: Search, refused: list[Refused]) -> str:
    if not refused:
        raise UsageError(
            f"no layout of {question.model.name} on {question.cluster.count} devices has the TP, "
            "PP and replicas that were asked for"
        )
    least = min(refused, key=lambda r: (r.total_short, r.layout.devices))
    model, cluster = question.model, question.cluster
    weights = model.weight_bytes(question.precision.weights) / 1e9
    memory = memory_of(model, cluster.device, least.layout, question.precision, 1)
    text = (
        f"{model.name} with {question.precision.weights} weights ({weights:.0f} GB) and one "
        f"request does not fit on {cluster.name}: {least.layout} is {least.short / 1e9:.1f} GB "
        f"short on each device, {least.total_short / 1e9:.0f} GB short in all "
        f"({memory.usable / 1e9:.1f} GB of each can be used; what fills it is known to "
        f"{errors()['memory'].p80:.0%})"
    )
    return text + _would_fit(question, search)


def _would_fit(question: Question, search: Search) -> str:
    found = fewest_devices(search, max(ANY_COUNT, 2 * question.cluster.count))
    parts = []
    if found:
        host = question.cluster.device.host
        hosts = -(-found.devices // host)
        parts.append(
            f"{found.devices} such devices hold it, as {found}"
            + (f"; in hosts of {host}, {hosts} hosts" if hosts > 1 else "")
        )
    for dtype in ("fp8", "int4"):
        other = replace(question, precision=Precision(dtype, question.precision.kv))
        layout = fewest_devices(other.search(), question.cluster.count)
        if layout is not None and dtype != question.precision.weights:
            parts.append(f"with {dtype} weights it fits here, as {layout}")
            break
    return ". " + ". ".join(part[0].upper() + part[1:] for part in parts) + "." if parts else "."

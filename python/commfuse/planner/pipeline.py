"""Steps of a whole replica: stages one after the other, groups of requests that keep them busy."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from commfuse.planner.layout import Layout, Stage, stages
from commfuse.planner.step import Setting, Terms, stage_decode, stage_prefill

_SPREAD = 0.1  # standard deviation of the time of a group's pass, in passes


@dataclass(frozen=True)
class Pass:
    """One pass of all requests, or of one prompt, through a replica.

    Attributes:
        terms: seconds from its beginning to its end, by where they go.
        occupied: seconds for which it keeps the busiest stage from other work.
        groups: of requests (decoding), or chunks of a prompt, that follow each other.
        idle: part of the time in which a stage waits, on average.
    """

    terms: Terms
    occupied: float
    groups: int
    idle: float

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        return self.terms.total


def _stages(setting: Setting, layout: Layout) -> tuple[Stage, ...]:
    return stages(setting.model, setting.cluster, layout, setting.precision.weights)


@functools.lru_cache(maxsize=4096)
def _boundary_counts(setting: Setting, layout: Layout) -> tuple[tuple[int, int], ...]:
    """(a stage whose boundary stands for others like it, how many they are)."""
    found: dict[str, list[int]] = {}
    for stage in range(layout.pp - 1):
        level = setting.cluster.level_between(stage * layout.tp, (stage + 1) * layout.tp)
        found.setdefault(level.name, []).append(stage)
    return tuple((members[0], len(members)) for members in found.values())


def send_seconds(setting: Setting, layout: Layout, rows: float) -> tuple[float, float]:
    """Seconds of all send/recv of a pass, and of the slowest; each rank sends its part of a row."""
    tp, each = layout.tp, rows * setting.model.hidden_size * 2.0 / layout.tp
    total = slowest = 0.0
    for stage, count in _boundary_counts(setting, layout):
        seconds = setting.cluster.send_seconds(stage * tp, (stage + 1) * tp, each, tp)
        total, slowest = total + count * seconds, max(slowest, seconds)
    return total, slowest


@functools.lru_cache(maxsize=200_000)
def decode(
    setting: Setting, layout: Layout, requests: float, context: float, tokens: int = 1
) -> Pass:
    """A decoding step of ``requests``; with stages, in as many groups as finish it first.

    Args:
        setting, layout: what runs where; replicas do not matter.
        requests: in this replica.
        context: tokens that each has, on average.
        tokens: computed for each request: more than one when drafts are verified.
    """
    options = {1, min(layout.pp, max(1, int(requests)))}
    passes = [_decode_in(setting, layout, requests, context, tokens, n) for n in options]
    return min(passes, key=lambda found: found.seconds)


def _decode_in(
    setting: Setting, layout: Layout, requests: float, context: float, tokens: int, groups: int
) -> Pass:
    each = requests / groups
    path, busiest = Terms(), 0.0
    for stage in _stages(setting, layout):
        found = stage_decode(setting, stage, each, context, each * tokens)
        path += found.scaled(stage.count)
        busiest = max(busiest, found.total)
    sending, slowest = send_seconds(setting, layout, each * tokens)
    path += Terms(send_recv=sending)
    # Groups differ in their contexts and prefills; the slowest of them sets the pace.
    uneven = 1 + _SPREAD * math.sqrt(2 * math.log(groups))
    cycle = max(path.total, groups * (busiest + slowest) * uneven)
    idle = 1 - groups * (path.total - sending) / (layout.pp * cycle)
    return Pass(path + Terms(bubble=cycle - path.total), cycle, groups, max(0.0, idle))


@functools.lru_cache(maxsize=200_000)
def prefill(setting: Setting, layout: Layout, prompt: float, chunk: int) -> Pass:
    """A prompt's way through a replica, in chunks that follow each other through the stages."""
    chunks = max(1, -(-int(prompt) // chunk))
    each = prompt / chunks
    path, busiest = Terms(), 0.0
    for stage in _stages(setting, layout):
        found = stage_prefill(setting, stage, each, (prompt - each) / 2)
        path += found.scaled(stage.count)
        busiest = max(busiest, found.total)
    sending, slowest = send_seconds(setting, layout, each)
    path += Terms(send_recv=sending)
    occupied = chunks * (busiest + slowest)
    total = path.total + (chunks - 1) * (busiest + slowest)
    # Stages that worked without pause would share the work; what it takes longer is the bubble.
    shared = path.scaled(chunks / layout.pp)
    bubble = max(0.0, total - shared.total)
    return Pass(shared + Terms(bubble=bubble), occupied, chunks, bubble / total)

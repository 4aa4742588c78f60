"""Speculative decoding: how many tokens a step yields, what it costs, from when on it pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from commfuse.errors import UsageError
from commfuse.planner import pipeline
from commfuse.planner.layout import Layout
from commfuse.planner.model import Model
from commfuse.planner.step import Setting, Terms

MOST_DRAFTS = 8
_NGRAM_SECONDS = 3e-5  # of the host, to look up drafts in the text so far


@dataclass(frozen=True)
class Acceptance:
    """How well drafts are taken, and what they cost.

    Attributes:
        rate: of one draft token, given that all before it were accepted; or
        lengths: tokens that a step yields, measured, for 1, 2, … draft tokens.
        draft: the model that drafts; None: n-grams of the text so far.

    Raises:
        UsageError: neither or both; a rate outside 0 … 1; a length that is impossible.

    Example:
        >>> Acceptance(rate=0.5).tokens(2)
        1.75
    """

    rate: float | None = None
    lengths: tuple[float, ...] = ()
    draft: Model | None = None

    def __post_init__(self):
        if (self.rate is None) == (not self.lengths):
            raise UsageError("--acceptance: give one rate, or a length for each number of drafts")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise UsageError(f"--acceptance {self.rate:g}: a rate lies between 0 and 1")
        for drafts, length in enumerate(self.lengths, 1):
            if not 1 <= length <= drafts + 1:
                raise UsageError(
                    f"--acceptance: {drafts} drafts yield 1 to {drafts + 1} tokens, not {length:g}"
                )

    def tokens(self, drafts: int) -> float:
        """Expected tokens of a step that verifies so many drafts: accepted ones and one more."""
        if self.rate is None:
            return self.lengths[drafts - 1]
        return sum(self.rate**length for length in range(drafts + 1))

    @property
    def most(self) -> int:
        """The most drafts to consider."""
        return min(MOST_DRAFTS, len(self.lengths)) if self.lengths else MOST_DRAFTS


def parse_acceptance(text: str, draft: Model | None = None) -> Acceptance:
    """From ``0.7``, or a measured series as in ``1.84,2.51,3.01``.

    Raises:
        UsageError: neither.

    Example:
        >>> parse_acceptance("1.84,2.51").lengths
        (1.84, 2.51)
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--acceptance {text}: a rate, as in 0.7, or lengths for 1, 2, … drafts, as in 1.8,2.5"
        ) from None
    if len(values) == 1 and values[0] <= 1:
        return Acceptance(rate=values[0], draft=draft)
    return Acceptance(lengths=values, draft=draft)


@dataclass(frozen=True)
class Speculation:
    """Drafts in one layout.

    Attributes:
        drafts: tokens drafted a step.
        tokens: that a step yields, expected.
        speedup: over plain decoding; below 1 it does not pay.
        break_even: the acceptance rate from which on so many drafts pay; above 1: never.
        per_token: seconds per token by where they go; replaces a plain step's.
    """

    Acceptance: ClassVar = Acceptance

    drafts: int
    tokens: float
    speedup: float
    break_even: float
    per_token: Terms


def speculate(
    setting: Setting,
    layout: Layout,
    requests: float,
    context: float,
    acceptance: Acceptance,
    drafts: int,
) -> Speculation:
    """A step that verifies ``drafts`` tokens of every request, drafts included."""
    plain = pipeline.decode(setting, layout, requests, context).terms
    verify = pipeline.decode(setting, layout, requests, context, drafts + 1).terms
    drafting = drafts * draft_seconds(setting, layout, requests, context, acceptance.draft)
    step = verify + Terms(draft=drafting)
    tokens = acceptance.tokens(drafts)
    return Speculation(
        drafts=drafts,
        tokens=tokens,
        speedup=tokens * plain.total / step.total,
        break_even=break_even(step.total / plain.total, drafts),
        per_token=step.scaled(1 / tokens),
    )


def draft_seconds(
    setting: Setting, layout: Layout, requests: float, context: float, draft: Model | None
) -> float:
    """Seconds of one draft token of every request; a draft model is split like the target's stage.

    It runs where the next step begins, on the ranks of one stage, with its own all-reduces.
    """
    if draft is None:
        return _NGRAM_SECONDS / MOST_DRAFTS
    own = Setting(draft, setting.cluster, setting.precision, setting.calibration, setting.fused)
    ways = {1, min(layout.tp, draft.num_heads)}
    return min(pipeline.decode(own, Layout(tp), requests, context).seconds for tp in ways)


def best_speculation(
    setting: Setting, layout: Layout, requests: float, context: float, acceptance: Acceptance
) -> Speculation | None:
    """The number of drafts with the least time per token; None: plain decoding is no slower."""
    found = [
        speculate(setting, layout, requests, context, acceptance, drafts)
        for drafts in range(1, acceptance.most + 1)
    ]
    best = max(found, key=lambda option: option.speedup)
    return best if best.speedup > 1 else None


def break_even(cost: float, drafts: int) -> float:
    """The acceptance rate at which ``drafts`` drafts yield ``cost`` tokens a step; 2: none does.

    Args:
        cost: of a speculative step, in plain steps.
        drafts: verified in it.

    Example:
        >>> round(break_even(1.5, 1), 3)
        0.5
    """
    if cost > drafts + 1:
        return 2.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if Acceptance(rate=middle).tokens(drafts) < cost:
            low = middle
        else:
            high = middle
    return high

"""What is explored: the protocol as it is, and the controls that break one rule each.

`python -m tests.protocol.configurations [--long]` from the root of the repository prints the tables
of docs/protocol.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .calls import (
    Direct,
    Flagged,
    Gather,
    OneShot,
    Protocol,
    Receive,
    Send,
    Sliced,
    TwoShot,
    Zero,
)
from .failures import DIED, MISMATCHED, TIMED_OUT, Failures
from .model import (
    DEADLOCK,
    FALSE_MISMATCH,
    OVERWRITTEN,
    STALE,
    WRONG_DESCRIPTOR,
    Result,
    System,
    explore,
)
from .programs import build

ONE, TWO, ZERO, OTHER, FLAGGED = OneShot(), TwoShot(), Zero(), OneShot(name="other"), Flagged()
WIDE, NARROW = OneShot(parts=2, grid=2), OneShot(parts=2, grid=1)
PULL, PUSH, SWAPPED = Protocol(), Protocol(push=True), Protocol(swap_slots=True)
MIXED = [ONE, TWO, ZERO, ONE, TWO]
GRIDS = [WIDE, NARROW, WIDE, NARROW]
ONE_AHEAD = [Sliced(slices, ahead=1) for slices in (3, 1, 4, 2)]
TWO_SHOT_GRIDS = [TwoShot(grid=2), NARROW, TwoShot(grid=2), WIDE]
STREAM = [[Send(1)] * 5, [Receive(0)] * 5]
BLOCKS = [[Send(1, n) for n in (2, 1, 3, 2)], [Receive(0, n) for n in (2, 1, 3, 2)]]
PIPELINE = [[Send(1)] * 4, [Receive(0), Send(2)] * 4, [Receive(1)] * 4]
STAGES = [
    [ONE, Send(1), TWO, Send(1), ONE, Send(1)],
    [ONE, Receive(0), TWO, Receive(0), ONE, Receive(0)],
]


@dataclass(frozen=True)
class Configuration:
    """`fault` is what must be found: None for the protocol as it is."""

    name: str
    world: int
    programs: Sequence
    protocol: Protocol = PULL
    failures: Failures | None = None
    fault: str | None = None
    reduce: bool = False
    long: bool = False

    def __str__(self) -> str:
        side = "push" if self.protocol.push else "pull"
        return f"{self.name}, W={self.world}, {side}{', reduced' if self.reduce else ''}"

    def system(self) -> System:
        return build(self.world, self.programs, self.protocol, self.failures)

    def explore(self) -> Result:
        return explore(self.system(), reduce=self.reduce)


def only(*reports: str) -> Failures:
    """Every rank must end with one of these reports."""
    return Failures(lambda outcome: set(outcome) <= set(reports))


def same(*reports: str, timeouts: int) -> Failures:
    """All ranks must end with the same report."""
    return Failures(lambda o: len(set(o)) == 1 and o[0] in reports, timeouts=timeouts)


def with_death(*reports: str) -> Failures:
    return Failures(lambda outcome: set(outcome) <= {"killed", *reports}, deaths=1)


def sound() -> list[Configuration]:
    """The protocol as it is: every run must end well."""
    found = []

    def add(*arguments, **more) -> None:
        found.append(Configuration(*arguments, **more))

    for way in (PULL, PUSH):
        for world, one, two in ((2, 6, 5), (3, 3, 3)):
            slow = world == 3 and way.push
            add(f"one-shot x{one}", world, [ONE] * one, way)
            add(f"two-shot x{two}", world, [TWO] * two, way, long=slow)
            add("one, two, zero, one, two", world, MIXED, way)
            add("two-shot with an empty slice x3", world, [TwoShot(empty=(1,))] * 3, way)
            add("gather with an empty part x4", world, [Gather(empty=(1,))] * 4, way)
            add("tensor read in place, trailing barrier x3", world, [Direct()] * 3, way)
        add("slices 2, 1, 3, 2", 2, [Sliced(2), Sliced(1), Sliced(3), Sliced(2)], way)
        add("slices 3, 1, 4, 2, one ahead", 2, ONE_AHEAD, way)
        add("grids 2, 1, 2, 1", 2, GRIDS, way)
        add("two-shot grids 2, 1, 2, 2", 2, TWO_SHOT_GRIDS, way)
    add("one-shot x6, slots swapped", 2, [ONE] * 6, SWAPPED)
    add("one, two, zero, one, two, slots swapped", 2, MIXED, SWAPPED)
    add("slices 3, 1, 4, 2, one ahead, slots swapped", 2, ONE_AHEAD, SWAPPED)
    add("one-shot x5", 3, [ONE] * 5, PUSH, long=True)
    add("slices 2, 1, 2, at once", 3, [Sliced(s, ahead=0) for s in (2, 1, 2)], PULL)
    add("slices 2, 1", 3, [Sliced(2), Sliced(1)], PULL, long=True)
    for lines, calls in ((1, 8), (2, 5)):
        add(f"flag-in-data, {lines} line x{calls}", 2, [Flagged(lines)] * calls, PUSH)
    add("flag-in-data among others", 2, [FLAGGED, FLAGGED, ONE, FLAGGED, TWO, FLAGGED], PUSH)
    add("send x5, 2 slots", 2, STREAM)
    add("send x5, 1 slot", 2, STREAM, Protocol(channel_slots=1))
    add("send in blocks 2, 1, 3, 2", 2, BLOCKS)
    add("send and receive, both ways", 2, [[Send(1), Receive(1)] * 4, [Send(0), Receive(0)] * 4])
    add("pipeline of three stages x4", 3, PIPELINE)
    add("all-reduce and send mixed", 2, STAGES)
    add("all-reduce and send mixed", 3, [STAGES[0][:5], STAGES[1][:5], [ONE, TWO, ONE]])
    # Too many states for the full search.
    for way in (PULL, PUSH):
        add("one, two, zero, one, two", 4, MIXED, way, reduce=True)
        add("slices 2, 1, 3, 2", 3, [Sliced(2), Sliced(1), Sliced(3), Sliced(2)], way, reduce=True)
        add("grids 2, 1, 2, 1", 3, GRIDS, way, reduce=True)
        add("two-shot grids 2, 1, 2, 2", 3, TWO_SHOT_GRIDS, way, reduce=True)
    add("one, two, zero, one", 8, MIXED[:4], PULL, reduce=True)
    add("flag-in-data x8", 3, [FLAGGED] * 8, PUSH, reduce=True)
    return found


def failing_calls() -> list[Configuration]:
    """Mismatch, time-out and death at any moment: every rank must be told the right reason."""
    found = []

    def add(*arguments, **more) -> None:
        found.append(Configuration(*arguments, **more))

    told, died = only(MISMATCHED), with_death(DIED)
    either = with_death(DIED, MISMATCHED)
    late = same("done", TIMED_OUT, timeouts=1)
    for way in (PULL, PUSH):
        add("mismatch in call 3", 2, [[ONE] * 3, [ONE, ONE, OTHER]], way, told)
        add("mismatch, one-shot against two-shot", 2, [[ONE] * 3, [ONE, TWO, ONE]], way, told)
        add("mismatch, zero against two-shot", 2, [[ONE, ZERO, ONE], [ONE, TWO, ONE]], way, told)
        add("mismatch, grid 2 against 1", 2, [[ONE, WIDE, ONE], [ONE, NARROW, ONE]], way, told)
        add("mismatch, 2 against 1", 3, [[ONE], [ONE], [OTHER]], way, told, long=way.push)
        add("mismatch, all different", 3, [[ONE], [TWO], [OTHER]], way, told, long=way.push)
        add("mismatch in call 2, 2 against 1", 3, [[ZERO] * 2, [ZERO] * 2, [ZERO, ONE]], way, told)
        add("a rank is killed", 2, [ONE, TWO, ONE], way, died)
        add("a rank is killed in a mismatch", 2, [[ONE, ONE], [ONE, OTHER]], way, either)
        add("a deadline passes", 2, [ONE, TWO, ONE], way, late)
    add(
        "mismatch in call 2, 2 against 1",
        3,
        [[ONE] * 2, [ONE] * 2, [ONE, OTHER]],
        PULL,
        told,
        long=True,
    )
    add("mismatch, flag-in-data", 2, [[FLAGGED] * 3, [FLAGGED, FLAGGED, ONE]], PUSH, told)
    add("a rank is killed", 3, [ONE], PULL, died)
    add("a rank is killed", 3, [TWO], PULL, died, long=True)
    add("a rank is killed in a mismatch", 3, [[ZERO], [ZERO], [ONE]], PULL, either)
    add("a rank is killed in a mismatch", 3, [[ONE], [ONE], [OTHER]], PULL, either, long=True)
    add("a deadline passes", 3, [ONE], PULL, late)
    add("a deadline passes", 3, [TWO], PULL, late, long=True)
    add("sender or receiver is killed", 2, STREAM, PULL, died)
    # A channel has counters of its own: no word shows a mismatch, both ranks meet the deadline.
    add("all-reduce against recv", 2, [[ONE], [Receive(0)]], PULL, same(TIMED_OUT, timeouts=1))
    return found


def controls() -> list[Configuration]:
    """One broken rule each: the checker must find the fault."""
    gather = [Gather(empty=(1,))] * 3
    wrapped = [FLAGGED, FLAGGED, ONE, ONE, ONE, ONE, FLAGGED]
    crossed = [[Send(1)] * 3 + [Receive(1)] * 3, [Send(0)] * 3 + [Receive(0)] * 3]
    late_word = {"exact": False, "word_parity": False}
    compared = {"compare_descriptors": True, "descriptor_halves": 1}
    both = [
        ("one payload half", [ONE] * 3, {"halves": 1}, OVERWRITTEN),
        ("words without parity", [ONE] * 3, {"word_parity": False}, DEADLOCK),
        ("words without phase", [TWO] * 2, {"word_phase": False}, STALE),
        ("payload without phase", [TWO, ONE], {"payload_phase": False}, OVERWRITTEN),
        ("waiting for >=, no parity", [ONE, OTHER, ONE], late_word, FALSE_MISMATCH),
        ("no acquire", [ONE] * 2, {"acquire": False}, STALE),
        ("no release", [ONE] * 2, {"release": False}, STALE),
        ("zero-size call skips its peers", [ONE, ZERO, ONE], {"skip_empty": True}, OVERWRITTEN),
        ("rank with an empty part is skipped", gather, {"skip_empty": True}, OVERWRITTEN),
        ("generations per block", GRIDS, {"block_generations": True}, OVERWRITTEN),
        ("kernels overlap", GRIDS, {"kernel_boundary": False}, OVERWRITTEN),
        ("tensor read in place, no trailing barrier", [Direct(False)] * 2, {}, OVERWRITTEN),
        ("one descriptor half, compared in every call", [ONE] * 2, compared, OVERWRITTEN),
        ("one generation skipped for flag 0", [ONE] * 5, {"flags": "skip"}, OVERWRITTEN),
    ]
    channels = [
        ("send without credits", STREAM, {"credit_slack": None}, OVERWRITTEN),
        ("send, credits off by one", STREAM, {"credit_slack": 1}, OVERWRITTEN),
        ("send in blocks, credits off by one", BLOCKS, {"credit_slack": 1}, OVERWRITTEN),
        ("send in blocks, one word for all", BLOCKS, {"block_words": False}, STALE),
        ("more sends than slots, both ways", crossed, {}, DEADLOCK),
    ]
    lines = [
        ("lines never zeroed", wrapped, {"zero_lines": False}, STALE),
        ("flag 0 is used", [FLAGGED] * 4, {"flags": "low bits"}, STALE),
        ("no fence behind zeroing", [FLAGGED] * 3, {"fence_after_zeroing": False}, DEADLOCK),
    ]
    found = []
    for push, table in ((False, both), (True, both), (False, channels), (True, lines)):
        for name, programs, rules, fault in table:
            protocol = Protocol(push=push, **rules)
            found.append(Configuration(name, 2, programs, protocol, fault=fault))
    swapped = Protocol(swap_slots=True, halves=1)
    name = "one payload half, slots swapped"
    found.append(Configuration(name, 2, [ONE] * 3, swapped, fault=OVERWRITTEN))
    one_half = Protocol(halves=1)
    found.append(Configuration("one payload half", 3, [ONE] * 3, one_half, fault=OVERWRITTEN))
    plain = Failures(lambda outcome: True, validated=False)
    programs = [[FLAGGED] * 2, [FLAGGED, ONE]]
    name = "descriptor of flag-in-data not validated"
    found.append(Configuration(name, 2, programs, PUSH, plain, fault=WRONG_DESCRIPTOR))
    return found


def main() -> None:
    every = "--long" in sys.argv[1:]
    for title, group in (
        ("sound", sound()),
        ("failures", failing_calls()),
        ("controls", controls()),
    ):
        print(f"{title}\n\n| configuration | states | steps | found |\n|---|---:|---:|---|")
        total = 0
        for configuration in group:
            if configuration.long and not every:
                continue
            result = configuration.explore()
            total += result.states
            found = (
                f"{result.fault.kind} after {len(result.fault.trace)} steps"
                if result.fault
                else "nothing"
            )
            print(
                f"| {configuration} | {result.states:,} | {result.steps:,} | {found} |", flush=True
            )
        print(f"\n{total:,} states\n")


if __name__ == "__main__":
    main()

"""The signalling protocol, explored over all orders: what must hold, and what must be found broken.

The model and its memory order are described in model.py, the protocol in docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import pytest

from .calls import OneShot, Protocol, TwoShot
from .configurations import MIXED, Configuration, controls, failing_calls, sound
from .model import DEADLOCK, FALSE_MISMATCH, WRONG_DESCRIPTOR, WRONG_REPORT, LimitExceeded, explore
from .programs import build


def _cases(configurations: Iterable[Configuration]) -> list:
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.long] if case.long else [])
        for case in configurations
    ]


@pytest.mark.parametrize("configuration", _cases(sound()))
def test_protocol_is_sound(configuration: Configuration) -> None:
    result = configuration.explore()
    assert result.fault is None, str(result.fault)
    assert result.outcomes == {("done",) * configuration.world}


@pytest.mark.parametrize("configuration", _cases(failing_calls()))
def test_failure_is_reported_on_every_rank(configuration: Configuration) -> None:
    result = configuration.explore()
    assert result.fault is None, str(result.fault)
    assert result.outcomes


@pytest.mark.parametrize("configuration", _cases(controls()))
def test_broken_rule_is_found(configuration: Configuration) -> None:
    """Each control must end in its own fault, with a trace that can be followed by hand."""
    result = configuration.explore()
    assert result.fault is not None, f"{result.states} states, and no fault"
    assert result.fault.kind == configuration.fault, str(result.fault)
    *steps, last = result.fault.trace
    assert f"<-- {configuration.fault}: " in last
    assert all(step and "<--" not in step for step in steps)
    assert len(str(result.fault).splitlines()) == len(result.fault.trace) + 1
    if configuration.fault == DEADLOCK:
        assert "wait for" in last
    elif configuration.fault not in (FALSE_MISMATCH, WRONG_DESCRIPTOR, WRONG_REPORT):
        assert "load" in last or "wait for flag" in last
        assert "it holds " in last


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(case, id=str(case))
        for case in sound() + controls()
        if case.failures is None and not case.reduce and not case.long and case.world == 2
    ],
)
def test_reduced_search_agrees_with_full_search(configuration: Configuration) -> None:
    """The reduction may not lose a fault, nor invent one."""
    system = configuration.system()
    full, reduced = explore(system, first=False), explore(system, reduce=True, first=False)
    assert full.kinds == reduced.kinds
    assert reduced.states <= full.states
    assert configuration.fault is None or configuration.fault in full.kinds


@pytest.mark.parametrize("push", [False, True])
def test_order_comes_from_each_pair_of_ranks(push: bool) -> None:
    """What two ranks do to one location is ordered by their own words, without a third rank.

    The model lets a store become visible to everybody at once. Where order arises pair by pair,
    that makes no difference: rank 2 need not see what rank 0 published through rank 1.
    """
    for world, calls in ((3, MIXED), (4, MIXED[:3]), (3, [TwoShot(empty=(1, 2)), OneShot()] * 2)):
        system = build(world, calls, Protocol(push=push))
        for pair in combinations(range(world), 2):
            assert system.unordered(pair) == []


def test_skipping_empty_slices_would_order_through_a_third_rank() -> None:
    """With one element, ranks 1 and 2 would signal rank 0 alone: sound, but not by pairs."""
    calls = [TwoShot(empty=(1, 2)), OneShot()] * 2
    system = build(3, calls, Protocol(skip_empty=True))
    assert explore(system).fault is None
    assert system.unordered((1, 2))
    assert not system.unordered(range(3))


@pytest.mark.parametrize("world", [2, 3])
def test_exact_wait_matters_only_together_with_other_faults(world: int) -> None:
    """With the complete word table >= passes too; without parity it does not (see controls)."""
    result = explore(build(world, MIXED[:4], Protocol(exact=False)))
    assert result.fault is None, str(result.fault)


def test_search_that_is_cut_short_is_not_a_pass() -> None:
    with pytest.raises(LimitExceeded):
        explore(build(2, [OneShot()] * 3), limit=20)

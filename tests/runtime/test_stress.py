"""Random ops, sizes and delays; and a broken exchange, to show that this finds races."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

STRESS = str(Path(__file__).parents[1] / "workers" / "stress.py")


@pytest.mark.parametrize(("world_size", "calls"), [(2, 800), (3, 700), (4, 500)])
def test_2000_calls(world_size, calls):
    failures = run_ranks(f"{STRESS}:run", world_size, args=(calls, 1), timeout=120)
    assert failures == [[]] * world_size


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_20000_calls(world_size):
    assert run_ranks(f"{STRESS}:run", world_size, args=(20000, 2), timeout=280) == [[]] * world_size


def test_an_exchange_with_one_payload_half_is_caught():
    """The same with two halves passes: it is the missing half that the checks find."""
    for wrong in run_ranks(f"{STRESS}:controls", 3, args=(500, 1), timeout=120):
        assert wrong[2] == 0
        assert wrong[1] > 0

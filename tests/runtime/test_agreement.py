"""A rank that fails while communicators are made: an error on every rank, at once, and no wait."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

AGREEMENT = str(Path(__file__).parents[1] / "workers" / "agreement.py")
VICTIM = 2
DEADLINE = 30  # seconds, of a communicator: nobody has waited for it


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    args = (VICTIM, str(tmp_path_factory.mktemp("deaths")))
    found = run_ranks(f"{AGREEMENT}:failures", 4, args=args, check=False)
    assert found.pop(VICTIM).status == 3, found
    return found  # of ranks 0, 1, 3


def test_everybody_has_every_rank_s_value(ranks):
    assert [rank["values"] for rank in ranks] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("case", "failing", "kind", "text"),
    [
        ("options", 0, "UsageError", "payload_bytes and timeout must be positive"),
        ("connecting", 1, "CommunicatorError", "RuntimeError: no memory can be mapped"),
        ("connecting inside", 1, "CommunicatorError", "RuntimeError: no memory can be mapped"),
        ("a stage", 0, "UsageError", "too little shared memory: a communicator of 2 ranks"),
        ("defect", 2, "CommunicatorError", "ZeroDivisionError: division by zero"),
        ("channel", 3, "UsageError", "slots=1: use 2 to 64"),
    ],
)
def test_one_rank_s_failure_is_that_of_all(ranks, case, failing, kind, text):
    for index, rank in zip((0, 1, 3), ranks, strict=True):
        found, said, seconds = rank[case]
        assert seconds < DEADLINE
        if index == failing:  # it has its own
            assert text.removeprefix(f"{found}: ") in said
        else:
            assert found == kind and f"rank {failing}: " in said and text in said


def test_a_communicator_serves_after_a_channel_that_could_not_be_had(ranks):
    assert [rank["channel again"][:2] for rank in ranks] == [("", "")] * 3


def test_a_rank_that_ends_meanwhile_is_named_by_all_others(ranks):
    for rank in ranks:
        kind, text, seconds = rank["killed"]
        assert kind == "PeerDied" and f"rank {VICTIM} is gone" in text
        assert seconds < DEADLINE

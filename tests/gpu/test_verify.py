"""On GPUs, 1, 2, 3, 4 and 8 ranks: drawing from vocabulary shards gives the CPU's tokens.

Without a GPU these fail; `make test` leaves them out, `make gpu-test` runs them.
"""

import re
from pathlib import Path

import pytest

from commfuse.testing import run_ranks

pytestmark = pytest.mark.gpu
WORKER = str(Path(__file__).parents[1] / "workers" / "gpu_verify.py")
CHECKS = {
    "verified": "verify_chain",
    "sampled": "vocab_parallel_sample and vocab_parallel_argmax",
    "impossible": "rows without a token are named",
    "replays": "a graph's lengths, options and logits change",
    "stragglers": "late ranks harm nothing",
    "local": "a rank's own winner is found wrong",
    "opcheck": "opcheck",
}


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 8])
def found(request, lab):
    return run_ranks(f"{WORKER}:run", request.param, timeout=280, lab=lab)


@pytest.mark.parametrize("check", [pytest.param(name, id=text) for name, text in CHECKS.items()])
def test_results(found, check):
    assert [rank[check] for rank in found] == [[]] * len(found)


@pytest.fixture(scope="module", params=[2, 3, 8])
def failures(request, lab):
    return run_ranks(f"{WORKER}:failures", request.param, timeout=120, lab=lab)


def final(rank: dict) -> bool:
    """Whether every later call raised the first error again."""
    return all(rank[later][:2] == rank["first"][:2] for later in ("second", "check"))


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("drafts", "verify_chain float32[5, 2, 3]"),
        ("logs", "verify_chain float32[5, 2, 2] (variant"),
        ("distributions", "verify_chain float32[5, 2, 2] (variant"),
        ("ops", "vocab_parallel_sample float32[5]"),
    ],
)
def test_calls_that_differ_are_both_named_on_every_rank(failures, case, other):
    last = len(failures) - 1
    for rank in failures:
        kind, text, seconds = rank[case]["first"]
        assert kind == "PeerMismatch", text
        assert f"rank {last} called {other}" in text
        assert re.search(rf"rank [0-{last - 1}] called verify_chain float32\[5, 2, 2\]", text)
        assert seconds < 5  # a disagreement is no matter of waiting
        assert final(rank[case])


def test_a_rank_that_leaves_a_call_out_is_named_after_the_deadline(failures):
    last = len(failures) - 1
    for index, rank in enumerate(failures):
        kind, text, seconds = rank["absent"]["first"]
        assert kind == "PeerTimeout", text
        assert re.search(rf"rank [0-{last - 1}] waited 2 s for rank {last} ", text)
        assert index == last or seconds >= 2
        assert final(rank["absent"])


def test_draft_lengths_that_differ_end_at_the_deadline(failures):
    for rank in failures:
        kind, text, _ = rank["lengths"]
        assert kind == "PeerTimeout" and "rank 0 waited 2 s for rank " in text, text


@pytest.mark.parametrize("after", ["mismatches", "time-out", "lengths"])
def test_the_context_and_new_communicators_work_afterwards(failures, after):
    assert all(rank[f"alive after {after}"] for rank in failures)

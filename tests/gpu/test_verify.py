"""On GPUs, 1, 2, 3, 4 and 8 ranks: drawing from vocabulary shards gives the CPU's tokens.

Without a GPU these fail; `make test` leaves them out, `make gpu-test` runs them.
"""

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


@pytest.fixture(scope="module", params=[2, 3])
def mismatches(request, lab):
    return run_ranks(f"{WORKER}:mismatches", request.param, timeout=120, lab=lab)


@pytest.mark.parametrize(
    ("case", "common", "other"),
    [("requests", ", 4, 2]", ", 5, 2]"), ("drafts", "verify_chain bfloat16[4, 4, 0]", ", 4, 2]")],
)
def test_calls_that_differ_are_both_named_on_every_rank(mismatches, case, common, other):
    for rank in mismatches:
        kind, text, seconds = rank[case]
        assert kind == "PeerMismatch", text
        assert common in text and other in text and seconds < 5


def test_a_rank_that_leaves_a_call_out_is_named_after_the_deadline(mismatches):
    for rank in mismatches:
        kind, text, _ = rank["absent"]
        assert kind == "PeerTimeout" and f"for rank {len(mismatches) - 1} " in text, text

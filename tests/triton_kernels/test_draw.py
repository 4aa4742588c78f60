"""The kernel that draws from vocabulary shards: ranks as processes, in Triton's interpreter."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

WORKER = str(Path(__file__).with_name("draw_worker.py"))


@pytest.fixture(scope="module")
def ranks():
    """What the ranks found, by their number; run by the first test that asks."""
    found = {}

    def get(world_size: int) -> list[dict]:
        if world_size not in found:
            found[world_size] = run_ranks(
                f"{WORKER}:run", world_size, timeout=120, env={"TRITON_INTERPRET": "1"}
            )
        return found[world_size]

    return get


@pytest.mark.parametrize("world_size", [2, 3])
def test_tokens_are_those_of_the_cpu(ranks, world_size):
    assert [rank["correctness"] for rank in ranks(world_size)] == [[]] * world_size


def test_tokens_of_one_rank_are_those_of_the_cpu(ranks):
    assert ranks(2)[0]["alone"] == []


def test_late_ranks_harm_nothing_unless_nobody_waits_for_them(ranks):
    assert [rank["stragglers"]["sound"] for rank in ranks(2)] == [0, 0]
    assert sum(rank["stragglers"]["skipped"] for rank in ranks(2)) > 0
    assert [rank["stragglers"]["apart"] for rank in ranks(2)] == [0, 0]


def test_as_a_backend(ranks):
    for rank in ranks(2):
        said = rank["backend"]
        for op in ("verify_chain", "truncated", "vocab_parallel_sample", "vocab_parallel_argmax"):
            assert said[op] == ("", "")
        assert said["q"][0] == "UsageError"
        assert "draft_probabilities is not a contiguous float32 [3, " in said["q"][1]
        text = "the draft probabilities of request 0, row 0 are NaN"
        assert said["q NaN"] == ("CommfuseError", text)
        assert said["lengths"] == ("UsageError", "draft_lengths[0] is 3, not in 0..2")
        assert said["NaN"][0] == "CommfuseError"
        assert "request 2, row 0 are NaN: no token can be chosen" in said["NaN"][1]

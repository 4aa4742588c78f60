"""matmul_all_reduce: what a row depends on, and that communication overlaps with computation."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

FUSED = str(Path(__file__).parents[1] / "workers" / "fused.py")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    return run_ranks(f"{FUSED}:run", request.param, timeout=120)


def test_a_row_does_not_depend_on_its_batch(ranks):
    assert [rank["batches"] for rank in ranks] == [[]] * len(ranks)


def test_a_slice_is_published_before_the_last_is_computed(ranks):
    for rank in ranks:
        events = rank["trace"]["events"]
        times = {(kind, block): time for time, kind, block in events}
        slices = sorted(block for kind, block in times if kind == "computed")
        assert slices == list(range(len(slices))) and len(slices) > 1
        assert times["published", 0] < times["computed", slices[-1]]
        for block in slices:
            assert times["computed", block] <= times["published", block] <= times["reduced", block]
            if block:
                # The one before is on its way when this one is finished.
                assert times["published", block - 1] <= times["computed", block]
        assert [time for time, _, _ in events] == sorted(time for time, _, _ in events)


def test_nothing_is_traced_unless_asked(ranks):
    for rank in ranks:
        assert rank["trace"]["before"] == rank["trace"]["after"] == []


def test_a_row_above_the_payload_says_what_would_work(ranks):
    for message, after in (rank["too large"] for rank in ranks):
        assert "4100 bytes" in message and "payload_bytes=4100" in message
        assert after == [len(ranks)] * 3

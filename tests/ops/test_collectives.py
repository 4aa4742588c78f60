"""The collectives on 1 to 4 ranks: exact, in rank order, equal everywhere."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

WORKERS = Path(__file__).parents[1] / "workers"


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request):
    return run_ranks(f"{WORKERS}/collectives.py:run", request.param, timeout=120)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("exact", id="small integers are summed exactly"),
        pytest.param("order", id="float32 in rank order, rounded once: bit for bit"),
        pytest.param("repeat", id="the same bits again"),
        pytest.param("norm", id="rms_norm errs at most twice as much as torch"),
        pytest.param("inputs", id="inputs are left alone"),
        pytest.param("in place", id="in place, the same bits"),
        pytest.param("bits", id="all_gather copies every bit, those of NaN too"),
        pytest.param("traffic", id="calls and bytes are those of the message"),
        pytest.param("refusal", id="rows that ranks cannot share are refused at once"),
        pytest.param("shapes", id="shape-only calls know the outputs"),
    ],
)
def test_results(ranks, kind):
    assert [rank["found"][kind] for rank in ranks] == [[]] * len(ranks)


def test_every_rank_has_the_same_bits(ranks):
    assert len(ranks[0]["digests"]) > 150
    assert all(rank["digests"] == ranks[0]["digests"] for rank in ranks)

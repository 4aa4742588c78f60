"""On GPUs, 2, 3, 4 and 8 ranks: results, graphs, late ranks, and failures that are named.

Without a GPU these fail; `make test` leaves them out, `make gpu-test` runs them.
"""

import re
from pathlib import Path

import pytest

from commfuse.testing import run_ranks

pytestmark = pytest.mark.gpu
WORKERS = Path(__file__).parents[1] / "workers"
WORLD_SIZES = (2, 3, 4, 8)
RESULTS = {
    "corridor": "shared cases err at most twice as much as torch",
    "sums": "all_reduce is exact and in rank order, at any address and in place",
    "norms": "all_reduce_rms_norm sums in rank order",
    "scattered_and_gathered": "reduce_scatter and all_gather",
    "uneven": "matmul_all_reduce with uneven parts of K",
    "shapes_in_turn": "GEMMs of different shapes in turn",
    "batches": "a row's bits do not depend on its batch",
    "layers": "layers in a row, fused and not, eagerly and in graphs",
    "replays": "8192 graph replays give the eager bits",
    "stragglers": "late ranks harm nothing",
    "control": "the checks of late ranks find an exchange without signals",
}


def named(checks: dict[str, str]) -> list:
    return [pytest.param(name, id=text) for name, text in checks.items()]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def results(request, lab):
    # Triton compiles a kernel for a second or more, and another one for every dtype and number of
    # ranks: the collectives have one dtype each time.
    dtype = {3: "float32", 4: "float16"}.get(request.param, "bfloat16")
    return run_ranks(
        f"{WORKERS}/gpu_results.py:results", request.param, ([dtype],), timeout=240, lab=lab
    )


@pytest.mark.parametrize("check", named(RESULTS))
def test_results(results, check):
    found = {rank: result[check] for rank, result in enumerate(results) if result[check]}
    assert not found, "\n".join(f"rank {rank}: {text}" for rank in found for text in found[rank])


@pytest.mark.parametrize("results", [2], indirect=True)
@pytest.mark.parametrize(
    "check", named({"opcheck": "opcheck", "compiled": "torch.compile of a block"})
)
def test_registration(results, check):
    assert [rank[check] for rank in results] == [[], []]


@pytest.fixture(scope="module", params=[2, 3])
def failures(request, lab):
    return run_ranks(f"{WORKERS}/gpu_failures.py:failures", request.param, timeout=120, lab=lab)


def final(rank: dict) -> bool:
    """Whether every later call raised the first error again."""
    return all(rank[later][:2] == rank["first"][:2] for later in ("second", "check"))


@pytest.mark.parametrize(
    ("case", "common", "other"),
    [
        ("shapes", "all_reduce float32[2, 4]", "all_reduce float32[4, 2]"),
        ("sizes", "all_reduce float32[2, 4]", "all_reduce float32[0, 4]"),
        ("dtypes", "all_reduce float32[2, 4]", "all_reduce float16[2, 4]"),
        ("ops", "all_reduce_rms_norm bfloat16[2, 8]", "matmul_all_reduce bfloat16[2, 8]"),
        (
            "options",
            "matmul_all_reduce bfloat16[2, 8]",
            "matmul_all_reduce bfloat16[2, 8] (variant",
        ),
        ("large", "all_reduce float32[3000000]", "all_reduce float32[5]"),
        (
            "places",
            "all_reduce float32[64] (variant 1)",
            "all_reduce float32[64] (variant 257)",
        ),
    ],
)
def test_calls_that_differ_are_both_named_on_every_rank(failures, case, common, other):
    last = len(failures) - 1
    for rank in failures:
        kind, text, seconds = rank[case]["first"]
        assert kind == "PeerMismatch", text
        assert f"rank {last} called {other}" in text
        assert re.search(rf"rank [0-{last - 1}] called {re.escape(common)}", text)
        assert seconds < 5  # a disagreement is no matter of waiting
        assert final(rank[case])


def test_a_rank_that_leaves_a_call_out_is_named_after_the_deadline(failures):
    last = len(failures) - 1
    for index, rank in enumerate(failures):
        kind, text, seconds = rank["absent"]["first"]
        assert kind == "PeerTimeout", text
        assert re.search(rf"rank [0-{last - 1}] waited 1 s for rank {last} ", text)
        assert "all_reduce bfloat16[2, 8]" in text
        assert seconds < 8 and (index == last or seconds >= 1)
        assert final(rank["absent"])


@pytest.mark.parametrize("after", ["mismatches", "time-out"])
def test_the_context_and_new_communicators_work_afterwards(failures, after):
    assert all(rank[f"alive after {after}"] for rank in failures)


def test_a_second_stream_is_refused_and_harms_nothing(failures):
    for rank in failures:
        for op, (kind, text, _) in zip(
            ("matmul_all_reduce", "all_reduce"), rank["second stream"]["errors"], strict=True
        ):
            assert kind == "ConcurrentUse", text
            assert f"stream of calls on one communicator: {op} bfloat16" in text
        assert rank["second stream"]["results"] == [128 * len(failures)] * 4


@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_million_small_all_reduces(lab, world_size):
    soak = f"{WORKERS}/gpu_order.py:soak"
    found = run_ranks(soak, world_size, (1_000_000,), timeout=240, lab=lab)
    assert found == [[]] * world_size

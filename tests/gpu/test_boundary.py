"""On GPUs, 2 and 3 ranks: send, recv, matmul_send and recv_matmul.

Without a GPU these fail; `make test` leaves them out, `make gpu-test` runs them.
"""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

pytestmark = pytest.mark.gpu
WORKER = str(Path(__file__).parents[1] / "workers" / "gpu_boundary.py")
CHECKS = {
    "exact": "every bit arrives",
    "fused": "GEMMs that send and receive",
    "ring": "late ranks harm nothing, and a ring without signals is found wrong",
    "replays": "graphs among eager messages",
    "beside": "messages beside collectives on another stream",
}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, lab):
    return run_ranks(f"{WORKER}:results", request.param, timeout=200, lab=lab)


@pytest.mark.parametrize("check", [pytest.param(name, id=text) for name, text in CHECKS.items()])
def test_results(found, check):
    assert [rank[check] for rank in found] == [[]] * len(found)


@pytest.fixture(scope="module", params=[2, 3])
def failures(request, lab):
    return run_ranks(f"{WORKER}:failures", request.param, timeout=120, lab=lab)


@pytest.mark.parametrize(
    ("case", "kind", "parts"),
    [
        (
            "overrun",
            "PeerTimeout",
            [
                "rank 0 waited 1 s for rank 1 in send float32[2, 8], message 4: every slot holds",
                "the last one received is 0",
            ],
        ),
        (
            "nothing sent",
            "PeerTimeout",
            ["rank 1 waited 1 s for rank 0 in recv float32[3, 8], message 1 (block 0)", "seen 0"],
        ),
        (
            "rows",
            "PeerMismatch",
            ["rank 0 called send float32[2, 8] while rank 1 called recv float32[3, 8] (message 1)"],
        ),
        ("declared rows", "PeerMismatch", ["[4, 8]", "[5, 8]"]),
        ("declared slots", "PeerMismatch", ["2 slots", "3 slots"]),
    ],
)
def test_what_goes_wrong_is_named_on_every_rank(failures, case, kind, parts):
    for rank in failures:
        for error in rank[case].values():
            assert error[0] == kind, error[1]
            assert all(part in error[1] for part in parts), error[1]


def test_the_wrong_end_is_refused(failures):
    for rank in failures[:2]:
        assert "this is rank" in rank["wrong end"]["first"][1]


def test_a_new_communicator_works_afterwards(failures):
    assert failures[1]["alive"]

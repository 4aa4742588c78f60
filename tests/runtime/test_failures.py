"""Ranks that disagree, hang, leave or die: a clear error on every rank, soon, and nothing left."""

import os
import re
import time
from pathlib import Path

import pytest

from commfuse.testing import run_ranks

FAILURES = str(Path(__file__).parents[1] / "workers" / "failures.py")


def own_processes() -> list[str]:
    """Processes that the launcher has started for this one and that still run."""
    found = []
    mark = f"COMMFUSE_PARENT={os.getpid()}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"{folder.name}: {(folder / 'cmdline').read_bytes()!r}")
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = set(os.listdir("/dev/shm"))
    yield
    assert set(os.listdir("/dev/shm")) <= before
    assert own_processes() == []


@pytest.fixture(scope="module", params=[2, 3])
def jobs(request):
    return run_ranks(f"{FAILURES}:run", request.param, timeout=120)


@pytest.fixture
def mismatches(jobs):
    return [rank["mismatches"] for rank in jobs]


@pytest.fixture
def absence(jobs):
    return [rank["absence"] for rank in jobs]


@pytest.mark.parametrize(
    ("case", "common", "other"),
    [
        ("shapes", "all_reduce float32[2, 4]", "all_reduce float32[4, 2]"),
        ("sizes", "all_reduce float32[2, 4]", "all_reduce float32[0]"),
        ("dtypes", "all_reduce float32[2, 4]", "all_reduce float16[2, 4]"),
        ("ops", "all_reduce_rms_norm float32[2, 4]", "matmul_all_reduce float32[2, 4]"),
        ("options", "matmul_all_reduce float32[2, 4]", "matmul_all_reduce float32[2, 4] (variant"),
        ("parts", "all_gather float32[2, 4]", "all_gather float32[1, 4]"),
        ("directions", "all_gather float32[6, 4]", "reduce_scatter float32[6, 4]"),
        ("barrier", "all_reduce float32[2, 4]", "barrier"),
        ("messages", "hand_over of 512 bytes", "hand_over of 64 bytes"),
        ("large", "all_reduce float32[3000000]", "all_reduce float32[5]"),
    ],
)
def test_calls_that_differ_are_both_named_on_every_rank(mismatches, case, common, other):
    last = len(mismatches) - 1
    for rank in mismatches:
        kind, text, seconds = rank[case]["first"]
        assert kind == "PeerMismatch", text
        assert f"rank {last} called {other}" in text
        assert re.search(rf"rank [0-{last - 1}] called {re.escape(common)}", text)
        assert "call 2" in text
        assert seconds < 10  # a disagreement is no matter of waiting


def final(rank: dict) -> bool:
    """Whether every later call raised the first error again."""
    return all(rank[later][:2] == rank["first"][:2] for later in ("second", "check", "barrier"))


def test_a_mismatch_is_final_and_the_same_everywhere(mismatches):
    for case in mismatches[0]:
        assert all(final(rank[case]) for rank in mismatches), case
        assert len({rank[case]["first"][1] for rank in mismatches}) == 1, case


def test_a_rank_that_never_calls_is_named_after_the_deadline(absence):
    last = len(absence) - 1
    for index, rank in enumerate(absence):
        kind, text, seconds = rank["never calls"]["first"]
        assert kind == "PeerTimeout", text
        assert re.search(rf"rank [0-{last - 1}] waited 1 s for rank {last} ", text)
        for part in ("all_reduce float32[3, 5]", "call 2", "expected generation 2", "seen 1"):
            assert part in text
        # The late rank learns of it at once.
        assert seconds < 10 and (index == last or seconds >= 1)
        assert final(rank["never calls"])


@pytest.mark.parametrize("case", ["closes", "closes while others wait"])
def test_a_rank_that_leaves_in_order_is_named(absence, case):
    last = len(absence) - 1
    for rank in absence[:-1]:
        kind, text, seconds = rank[case]["first"]
        assert kind == "CommunicatorClosed", text
        assert f"rank {last} has closed its communicator" in text
        assert "all_reduce float32[3]" in text
        assert seconds < 10
        assert final(rank[case])


@pytest.mark.parametrize("case", ["closes", "torch, closed"])
def test_use_after_close(absence, case):
    kind, text, _ = absence[-1][case]["first"]
    assert (kind, final(absence[-1][case])) == ("CommunicatorClosed", True)
    assert "this communicator is closed; make a new Communicator" in text


def test_a_second_thread_is_refused_and_harms_nothing():
    (error, first, after), (_, *others) = run_ranks(f"{FAILURES}:second_thread", 2)
    assert error[0] == "ConcurrentUse"
    assert "all_reduce float32[2]" in error[1] and "second Communicator" in error[1]
    assert first == after == [2, 2]
    assert others == [[2, 2]] * 2


@pytest.fixture(scope="module")
def refusals():
    return run_ranks(f"{FAILURES}:refusals", 2, timeout=120)


@pytest.mark.parametrize(
    ("case", "kind", "parts"),
    [
        ("payload", "UsageError", ["too little shared memory", "105553118408704 bytes"]),
        ("workspace", "UsageError", ["too little shared memory", "35184397299712 bytes"]),
        ("beyond 64 bits", "UsageError", ["too little shared memory", str(1 << 63)]),
        ("file size limit", "UsageError", ["too little shared memory", "27308032 bytes"]),
        ("no payload", "UsageError", ["payload_bytes", "positive"]),
        ("transport", "UsageError", ["'pigeons'", "'shared memory'", "'torch.distributed'"]),
        ("two dimensions", "UsageError", ["2 dimensions ('pp', 'tp')", "Communicator(mesh['tp'])"]),
        ("float64", "BackendUnavailable", ["'cpu' cannot", "not torch.float64", "torch: availab"]),
        ("unpacked", "BackendUnavailable", ["pack_weight", "torch: available"]),
        ("unknown", "BackendUnavailable", ["'nccl'", "cpu: available", "torch: available"]),
        ("triton", "BackendUnavailable", ["TRITON_INTERPRET=1", "cpu: available"]),
        ("no shared memory", "BackendUnavailable", ["needs shared memory", "torch: available"]),
        ("handle", "BackendUnavailable", ["'torch.distributed' has no shared memory"]),
        ("workspace of torch", "BackendUnavailable", ["'torch.distributed' shares no memory"]),
        ("hand over", "UsageError", ["4194305 bytes do not fit", "use 0 to 4194304"]),
        ("hand over of torch", "BackendUnavailable", ["'torch.distributed' shares no memory"]),
        ("auto over torch", "", ["[[2.0, 2.0], [2.0, 2.0]]"]),
    ],
)
def test_what_cannot_be_had_is_explained_on_every_rank(refusals, case, kind, parts):
    for rank in refusals:
        found, text, seconds = rank[case]
        assert found == kind, text
        assert all(part in text for part in parts), text
        assert seconds < 10


def test_a_communicator_leaves_no_trace():
    for rank in run_ranks(f"{FAILURES}:footprint", 2):
        descriptors, segments, shm, threads = rank["during"]
        assert segments == 1 and descriptors > rank["before"][0]
        assert not shm and threads == rank["before"][3]
        assert rank["listening"] == []  # the rendezvous is over, its socket gone
        assert rank["after"] == rank["before"] and rank["threads"] == 0


@pytest.mark.parametrize(("world_size", "victim", "in_call"), [(2, 0, False), (3, 1, True)])
def test_a_killed_rank_is_named_by_all_others(world_size, victim, in_call, tmp_path):
    begin = time.monotonic()
    results = run_ranks(
        f"{FAILURES}:dying", world_size, args=(victim, in_call, str(tmp_path)), timeout=60,
        check=False,
    )  # fmt: skip
    assert results[victim].status == -9
    assert time.monotonic() - begin < 45  # processes have started and all are gone
    for rank in set(range(world_size)) - {victim}:
        (kind, text, seconds), again = results[rank]
        assert kind == "PeerDied", text
        assert f"rank {victim} is gone" in text
        assert seconds < 10
        assert again[:2] == (kind, text)

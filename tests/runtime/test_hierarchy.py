"""Sums over ranks of several hosts: exact, the same bits everywhere, and failing together."""

import json
import re
import time
from pathlib import Path

import pytest

from commfuse.runtime.hierarchy import Piece, cut_pieces
from commfuse.testing import run_ranks
from commfuse.testing.hosts import TwoHosts

PROGRAM = str(Path(__file__).parents[1] / "workers" / "hierarchy.py")
# The host of each rank.
EVEN, UNEVEN, THREE = [0, 0, 1, 1], [0, 0, 1], [0, 1, 0, 2, 1]
VICTIM = 2


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What the ranks of one job found: by name, of each; and of each, who was killed."""
    folder = str(tmp_path_factory.mktemp("deaths"))
    args = (EVEN, UNEVEN, VICTIM, folder)
    ranks = run_ranks(f"{PROGRAM}:everything", 4, args=args, check=False, timeout=120)
    assert [getattr(rank, "status", 0) for rank in ranks] == [0, 0, -9, 0], ranks
    every = ranks[0]["every"]
    found = {name: [rank[name] for rank in every if name in rank] for name in every[0]}
    return found | {"killed": [rank["killed"] for rank in ranks if isinstance(rank, dict)]}


@pytest.fixture(params=["even", "uneven"])
def job(request, jobs):
    return (EVEN if request.param == "even" else UNEVEN), jobs[request.param]


def check_sums(ranks: list[dict]) -> None:
    assert [rank["wrong"] for rank in ranks] == [[]] * len(ranks)
    assert all(rank["digests"] == ranks[0]["digests"] for rank in ranks)
    for name, found in ranks[0]["digests"].items():
        if name.endswith(" 0"):
            assert found == ranks[0]["digests"][f"{name[:-1]}1"], name  # and again


def test_sums_are_those_of_the_hosts_sums_in_order_on_every_rank(job):
    check_sums(job[1])


@pytest.mark.long
def test_sums_over_three_hosts():
    check_sums(run_ranks(f"{PROGRAM}:many_hosts", 5, args=(THREE,), timeout=120))


def test_the_transport_is_chosen_by_the_hosts(job):
    hosts, ranks = job
    together = [[a for a, host in enumerate(hosts) if host == name] for name in sorted(set(hosts))]
    for rank in ranks:
        assert rank["transport"] == "hierarchical"
        assert rank["reason"] == f"the ranks run on {len(together)} hosts"
        assert rank["hosts"] == together
        for a, row in enumerate(rank["pairs"]):
            for b, found in enumerate(row):
                shared = "shared memory" if hosts[a] == hosts[b] else "torch.distributed"
                assert found == ("local" if a == b else shared)
        sums = ("all_reduce", "matmul_all_reduce", "reduce_scatter", "transformer_blocks")
        assert {rank["backends"][name] for name in sums} == {"hierarchical"}
        assert rank["backends"]["all_gather"] == "torch"
        assert "transport is hierarchical" in rank["why"]["cpu"]


def test_between_hosts_a_rank_sends_its_slice_alone(job):
    hosts, ranks = job
    for index, rank in enumerate(ranks):
        here = hosts.count(hosts[index])
        slice_bytes = 840 * 4 // here
        within, across = 2 * (here - 1) * slice_bytes, (len(set(hosts)) - 1) * slice_bytes
        assert (rank["calls"], rank["bytes"]) == (1, within + across)


def test_pieces_cover_a_message_and_every_host_holds_each_once():
    assert cut_pieces([[0, 1], [2]]) == (2, [Piece(0, 1, (0, 2)), Piece(1, 2, (1, 2))])
    for sizes in ([2, 2], [3, 2], [1, 4, 6], [8, 3]):
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        hosts = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        parts, pieces = cut_pieces(hosts)
        assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
        assert pieces[-1].end == parts
        for host, size in zip(hosts, sizes, strict=True):
            for rank in host:
                held = sum(piece.end - piece.begin for piece in pieces if rank in piece.owners)
                assert held * size == parts


def test_links_between_hosts_and_within_them(jobs):
    ranks = jobs["links"]
    for rank in ranks:
        assert rank["across emulated"] and rank["inside emulated"]
        assert min(rank["across"]) >= 3e-3
    # A reduce-scatter and an all-gather, of which a rank may see the end of the first at once.
    assert max(min(rank["inside"]) for rank in ranks[::2]) >= 2 * 3e-3


@pytest.fixture(params=["even", "uneven"])
def failures(request, jobs):
    """Who notices a rank that errs: the one beside it, or those of the other host."""
    return (EVEN if request.param == "even" else UNEVEN), jobs[f"{request.param} failures"]


def test_a_failure_is_the_same_on_every_rank_and_final(failures):
    _, ranks = failures
    for name in ("shapes", "dtypes", "late", "closes"):
        erring = name in ("late", "closes")
        texts = {rank[name][0][:2] for rank in (ranks[:-1] if erring else ranks)}
        assert len(texts) == 1, name
        for rank in ranks[:-1]:
            assert rank[name][1][:2] == rank[name][2][:2] == rank[name][0][:2]
            assert rank[name][0][2] < 10


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("shapes", ["float32[6]", "float32[8, 6]"]),
        ("dtypes", ["float32[6]", "float16[6]"]),
    ],
)
def test_calls_that_differ_are_both_named(failures, name, calls):
    hosts, ranks = failures
    kind, text, _ = ranks[0][name][0]
    assert kind == "PeerMismatch"
    assert all(call in text for call in calls), text
    assert f"rank {len(hosts) - 1} called" in text


def test_shapes_that_differ_within_hosts_alone_are_both_named(jobs):
    shapes_of_case = (("float32[5]", "float32[6]"), ("float32[4, 2]", "float32[2, 4]"))
    for case, shapes in enumerate(shapes_of_case):
        found = [rank[case][:2] for rank in jobs["padded"]]
        kind, text = found[0]
        assert kind == "PeerMismatch" and found == [found[0]] * 4
        assert all(f"reduce_scatter {shape}" in text for shape in shapes), text


@pytest.mark.parametrize(("way", "through"), [("across", 1), ("within", 2)])
def test_who_holds_up_all_others_is_named_not_who_waits_for_it(jobs, way, through):
    kind, text, _ = jobs["held up"][0][way][0]
    assert kind == "PeerTimeout"
    assert f"rank 0 waited 0.5 s for rank 3, for which rank {through} waits, in" in text
    assert [rank[way][1][:2] for rank in jobs["held up"]] == [(kind, text)] * 4


def test_a_second_thread_is_refused_and_harms_nothing(jobs):
    (kind, text, _), _ = jobs["second thread"][0]
    assert kind == "ConcurrentUse"
    assert "all_reduce float32[2]" in text and "make a second Communicator" in text
    assert [sums for _, sums in jobs["second thread"]] == [[4.0] * 4] * 4


def test_who_is_late_or_leaves_is_named(failures):
    hosts, ranks = failures
    last = len(hosts) - 1
    kind, text, _ = ranks[0]["late"][0]
    assert kind == "PeerTimeout" and "among the testers, rank" in text
    assert f"waited 0.5 s for rank {last} in" in text
    kind, text, _ = ranks[0]["closes"][0]
    assert kind == "CommunicatorClosed"
    assert f"rank {last} has closed its communicator" in text


def test_a_killed_rank_is_named_by_all_others(jobs):
    for kind, text, seconds in jobs["killed"]:
        assert (kind, seconds < 10) == ("PeerDied", True), text
        assert f"rank {VICTIM} is gone" in text


def test_hierarchies_that_cannot_be_had(jobs):
    for rank in jobs["refusals"]:
        assert rank["one host"][:2] == ("BackendUnavailable", "all ranks share one host")
        assert rank["two hosts"][:2] == ("BackendUnavailable", "no two ranks share a host")
        kind, text, _ = rank["shared"]
        assert kind == "BackendUnavailable" and "use transport='torch.distributed'" in text


@pytest.mark.skipif(bool(TwoHosts.obstacle()), reason=f"two hosts: {TwoHosts.obstacle()}")
def test_two_ranks_on_each_of_two_hosts(tmp_path):
    with TwoHosts() as hosts:
        jobs = hosts.start_torchrun([PROGRAM, str(tmp_path)], 2)
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("*.json"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
    said = [job.stdout.read() for job in jobs]
    found = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(found) == [0, 1, 2, 3], said
    check_sums([found[rank] for rank in range(4)])
    for rank in found.values():
        assert (rank["transport"], rank["hosts"]) == ("hierarchical", [[0, 1], [2, 3]])
    for rank in (0, 1):
        kind, text, seconds = found[rank]["killed"]
        assert (kind, seconds < 10) == ("PeerDied", True), text
        assert re.search("rank [23] is gone", text)  # one was killed, and torchrun ends the other

"""Emulated links: parsing, delays on both transports; and several communicators at once."""

from pathlib import Path

import pytest

from commfuse.errors import UsageError
from commfuse.runtime.link import PRESETS, Link, parse_link, parse_links
from commfuse.testing import run_ranks

LINKS = str(Path(__file__).parents[1] / "workers" / "links.py")


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    link = parse_link(name)
    assert link.name == name
    assert link.seconds(2, 1e9) == pytest.approx(
        2e-6 * link.latency_us + 1 / link.gigabytes_per_second
    )


def test_own_links():
    assert parse_link("5:25") == Link("5:25", 5.0, 25.0)
    assert parse_link("0:0.5").latency_us == 0
    assert parse_links(["tp=pcie4"]) == parse_links(["pcie4"]) == {"tp": PRESETS["pcie4"]}
    assert parse_links([]) == {}


@pytest.mark.parametrize("text", ["", "nvlink9", "5", ":", "5:", ":5", "a:b", "5:0", "-1:5",
                                  "5:-5", "nan:5", "5:nan", "5:25:1"])  # fmt: skip
def test_what_is_no_link(text):
    with pytest.raises(UsageError, match=f"unknown link '{text}'.*latency_us:GB/s.*nvlink4"):
        parse_link(text)


def test_what_is_no_dimension():
    with pytest.raises(UsageError, match="'dp' is no dimension of the mesh; use tp=LINK or pp"):
        parse_links(["dp=nvlink4"])


@pytest.fixture(scope="module")
def measured():
    return run_ranks(f"{LINKS}:links", 2, timeout=120)


def slowest(measured, case):
    """The slowest rank's seconds of every call: who begins first waits longest."""
    return [max(times) for times in zip(*(rank[case]["times"] for rank in measured), strict=True)]


@pytest.mark.parametrize(
    ("case", "least"),
    [
        ("2000:1 cpu", 2e-3),  # latency
        ("0:0.01 cpu", 10e-3),  # 100 kB at 10 MB/s
        ("2000:1 torch", 4e-3),  # a ring of two: two messages
        ("0:0.01 torch", 10e-3),  # of half the bytes each
        ("fused", 2e-3),
        ("hand over", 2e-3),
        ("argmax", 2e-3),
    ],
)
def test_messages_are_held_back(measured, case, least):
    assert min(slowest(measured, case)) >= least
    assert all(rank[case]["right"] for rank in measured)


def test_without_a_link_they_are_not(measured):
    assert min(slowest(measured, "None cpu")) < 2e-3
    assert not any(rank["None cpu"]["emulated"] for rank in measured)


@pytest.mark.parametrize("case", ["2000:1 cpu", "2000:1 torch"])
def test_it_is_said(measured, case):
    for rank in measured:
        assert rank[case]["emulated"]
        assert "emulated 2000:1" in rank[case]["text"]


@pytest.mark.parametrize(("case", "bytes_sent"), [("2000:1 cpu", 5 * 64), ("0:0.01 torch", 5e5)])
def test_statistics(measured, case, bytes_sent):
    for rank in measured:
        assert (rank[case]["calls"], rank[case]["bytes"]) == (5, bytes_sent)
    assert min(rank["0:0.01 torch"]["communication"] for rank in measured) >= 5 * 10e-3


def test_communicators_of_a_mesh_are_used_in_turns():
    assert run_ranks(f"{LINKS}:composed", 4, args=(2,), timeout=120) == [[]] * 4

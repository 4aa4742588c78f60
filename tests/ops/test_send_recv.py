"""send, recv, matmul_send and recv_matmul: exact, in order, never overrun; failures are named."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

CHANNELS = str(Path(__file__).parents[1] / "workers" / "channels.py")


# Seconds: latency, bandwidth. So long that a busy machine does not come near 5% of them.
LINKS = {("60000:10", 8192): 0.060, ("30:0.02", 1 << 20): 0.0524}


@pytest.fixture(scope="module", params=[(2, 2), (3, 5)], ids=lambda of: f"{of[0]}")
def ranks(request):
    world_size, slots = request.param
    return run_ranks(f"{CHANNELS}:run", world_size, args=(slots, list(LINKS)), timeout=120)


def test_every_bit_arrives(ranks):
    for rank in ranks:
        assert rank["exact"] == {"failures": [], "traffic": []}


def test_gemms_that_send_and_receive(ranks):
    assert [rank["fused"] for rank in ranks] == [[]] * len(ranks)


def test_nothing_is_left_behind(ranks):
    assert not any(rank["left behind"] for rank in ranks)


def test_a_ring_with_stragglers(ranks):
    assert [rank["ring"] for rank in ranks] == [[]] * len(ranks)


def test_a_sender_that_is_slow_to_signal(ranks):
    assert [rank["delayed"] for rank in ranks] == [[]] * len(ranks)


def test_an_emulated_link_delivers_when_it_should(ranks):
    for (link, nbytes, transport), times in ranks[1]["links"].items():
        asked = LINKS[link, nbytes]
        # Other processes may delay some, nothing may hasten one.
        assert asked <= min(times) <= 1.05 * asked, transport


@pytest.mark.long
def test_a_long_ring_with_stragglers():
    args = (5000, 2, True)
    assert run_ranks(f"{CHANNELS}:stream", 3, args=args, timeout=280) == [[]] * 3


@pytest.fixture(scope="module")
def failures():
    return run_ranks(f"{CHANNELS}:failures", 2, timeout=120)


OVERRUN = [
    "rank 0 waited 1 s for rank 1 in send float32[2, 8], message 4: every slot holds a message",
    "the last one received is 0",
    "leave out a recv?",
]


@pytest.mark.parametrize(
    ("case", "kinds", "parts"),
    [
        ("overrun", ("PeerTimeout", "PeerTimeout"), OVERRUN),
        ("after", ("PeerTimeout", None), OVERRUN),
        (
            "nothing sent",
            (None, "PeerTimeout"),
            ["rank 1 waited 1 s for rank 0 in recv float32[3, 8], message 1 (block 0)", "seen 0"],
        ),
        (
            "rows",
            ("PeerMismatch", "PeerMismatch"),
            ["rank 0 called send float32[2, 8] while rank 1 called recv float32[3, 8] (message 1)"],
        ),
        (
            "closed",
            (None, "CommunicatorClosed"),
            ["rank 0 has closed its communicator while rank 1 was waiting", "recv float32[3, 8]"],
        ),
        ("declared rows", ("PeerMismatch",) * 2, ["[4, 8]", "[5, 8]", "rank 1 has declared"]),
        ("declared dtype", ("PeerMismatch",) * 2, ["bfloat16", "float16", "rank 1 has declared"]),
        ("declared slots", ("PeerMismatch",) * 2, ["2 slots", "3 slots", "rank 1 has declared"]),
        ("too many rows", ("ValueError",) * 2, ["5 rows", "slots take 0 to 4", "more rows"]),
        ("columns", ("ValueError", None), ["7 columns, the channel 8"]),
        ("dtype", ("ValueError", None), ["x is Half, the channel Float"]),
        ("strided", ("ValueError", None), ["not contiguous"]),
        ("wrong end", ("ValueError",) * 2, ["this is rank"]),
        ("one rank", ("UsageError",) * 2, ["two different ranks, 0 to 1"]),
        ("no such rank", ("UsageError",) * 2, ["two different ranks, 0 to 1"]),
        ("one slot", ("UsageError",) * 2, ["slots=1: use 2 to 64"]),
        ("no rows", ("UsageError",) * 2, ["must be at least 1"]),
        ("float64", ("UsageError",) * 2, ["torch.float64", "torch.bfloat16"]),
        ("transport", ("UsageError",) * 2, ["'pigeons'", "'shared memory'", "'torch.distributed'"]),
        ("memory", ("UsageError",) * 2, ["too little shared memory: a channel needs", "slots"]),
        ("beyond 64 bits", ("UsageError",) * 2, ["a channel needs", "fewer rows or slots"]),
        ("still works", ("", ""), []),
        ("two threads", (None, "ConcurrentUse"), ["recv float32[1, 8] began while another"]),
        (
            "torch, nothing sent",
            (None, "PeerTimeout"),
            ["rank 1 waited 1 s for rank 0 in recv of 96 bytes"],
        ),
        (
            "torch, after",
            (None, "PeerTimeout"),
            ["rank 1 waited 1 s for rank 0 in recv of 96 bytes"],
        ),
    ],
)
def test_what_goes_wrong_is_named(failures, case, kinds, parts):
    for rank, kind in zip(failures, kinds, strict=True):
        if kind is None:
            assert case not in rank
            continue
        found, text, seconds = rank[case]
        assert found == kind, text
        assert all(part in text for part in parts), text
        assert seconds < 10


@pytest.mark.parametrize(
    ("world_size", "transport"), [(3, "shared memory"), (2, "torch.distributed")]
)
def test_a_killed_sender_is_named_by_all_others(world_size, transport, tmp_path):
    results = run_ranks(
        f"{CHANNELS}:dying", world_size, args=(transport, str(tmp_path)), check=False
    )
    assert results[0].status == -9
    for kind, text, seconds in results[1:]:
        assert kind == "PeerDied", text
        assert "rank 0 is gone" in text
        assert seconds < 10

"""The one-shot all-reduce: ranks as processes over shared memory, in Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commfuse.errors import BackendUnavailable, UsageError
from commfuse.testing import run_ranks
from commfuse.triton_kernels.all_reduce import all_reduce
from commfuse.triton_kernels.workspace import Layout, Workspace

ROOT = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("worker.py"))
INTERPRETER = {"TRITON_INTERPRET": "1"}
KINDS = ("integers", "random")
SIZES = ("empty", "one", "odd", "block-1", "block", "block+1", "blocks", "capacity+1", "chunks")
FEW = [*((size, "random") for size in ("empty", "one", "block+1", "chunks")), ("special",) * 2]
ALL = [*((size, kind) for size in SIZES for kind in KINDS), ("special",) * 2]
CASES = {1: FEW, 2: ALL, 3: FEW}  # interpreted, three ranks on two cores take their time


def run(function: str, world_size: int, *args):
    return run_ranks(f"{WORKER}:{function}", world_size, args=args, timeout=120, env=INTERPRETER)


@pytest.fixture(scope="module")
def correctness():
    """The results of a world size: run by the first case that asks, failed for all if it fails."""
    results = {}

    def get(world_size: int):
        if world_size not in results:
            results[world_size] = None
            results[world_size] = run("correctness", world_size, CASES[world_size])
        assert results[world_size] is not None, f"the ranks of world size {world_size} failed"
        return results[world_size]

    return get


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("world_size", "size", "kind"),
    [(world_size, *case) for world_size, cases in CASES.items() for case in cases],
)
def test_sum_is_exact_and_equal_on_all_ranks(correctness, world_size, dtype, size, kind):
    results = correctness(world_size)
    right, data = zip(*(rank[dtype, size, kind] for rank in results), strict=True)
    assert all(right), f"per rank: {right}"
    assert all(bits == data[0] for bits in data)


@pytest.mark.parametrize(("world_size", "calls"), [(2, 40), (3, 15)])
def test_stragglers_at_every_step(world_size, calls):
    assert run("stragglers", world_size, "all_reduce", calls) == [0] * world_size


@pytest.fixture(scope="module")
def controls():
    return run("controls", 2, "all_reduce")


def test_delays_of_the_negative_controls_do_no_harm(controls):
    assert [rank["sound"] for rank in controls] == [0, 0]


@pytest.mark.parametrize("case", ["one half", "skipped wait"])
def test_broken_protocol_is_caught(controls, case):
    assert sum(rank[case] for rank in controls) > 0


@pytest.fixture(scope="module")
def failures():
    return run("failures", 2, "all_reduce")


def test_absent_peer_gives_a_bounded_error(failures):
    kind, text, seconds = failures[0]["absent peer"]
    assert kind == "PeerTimeout"
    for part in ("rank 0", "rank 1", "all_reduce float32[1, 3]", "call 2", "generation 2, seen 1"):
        assert part in text
    assert seconds < 20


def test_failure_is_final_on_every_rank(failures):
    for rank in failures:
        kind, text, seconds = rank["after the failure"]
        assert kind == "PeerTimeout", text
        assert "rank 0 waited in vain for rank 1" in text
        assert seconds < 10


def test_different_shapes_are_named(failures):
    for rank in failures:
        kind, text, _ = rank["shapes"]
        assert kind == "PeerMismatch", text
        assert "float32[1, 3]" in text and "float32[2, 1024]" in text


def test_different_dtypes_are_named(failures):
    for rank in failures:
        kind, text, _ = rank["dtypes"]
        assert kind == "PeerMismatch", text
        assert "float32[1, 3]" in text and "bfloat16[1, 3]" in text


def test_host_abort_ends_a_wait(failures):
    kind, text, seconds = failures[0]["host abort"]
    assert kind == "CommunicatorError" and "rank 1" in text
    assert seconds < 20


# ---- in this process ---------------------------------------------------------------------------


def local_workspace() -> Workspace:
    return Workspace.create(0, [torch.zeros(1 << 20, dtype=torch.uint8)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("max_blocks", [1, 32])
def test_layout_has_no_overlap(world_size, max_blocks):
    nbytes = 1 << 20
    layout = Layout.fit(nbytes, world_size, max_blocks)
    descriptors_end = 256 + 2 * layout.padded * 64
    assert world_size <= layout.padded < 2 * world_size
    assert descriptors_end <= layout.generations
    assert layout.generations + 8 * max_blocks <= layout.words
    assert layout.words + 8 * 2 * 2 * max_blocks * layout.padded <= layout.arrivals
    assert layout.arrivals + 8 * max_blocks <= layout.squares
    assert layout.squares + 4 * max_blocks * 64 <= layout.payload
    assert layout.payload % 16 == layout.slot_bytes % 4096 == 0
    assert layout.payload + 2 * layout.half_stride == layout.nbytes <= nbytes
    assert layout.nbytes + 2 * world_size * 4096 > nbytes  # a larger slot would not fit


def test_too_small_workspace_says_how_much_is_needed():
    needed = Layout(1, 4096).nbytes
    with pytest.raises(UsageError, match=f"at least {needed} bytes"):
        Workspace.create(0, [torch.zeros(needed - 1, dtype=torch.uint8)])
    assert Workspace.create(0, [torch.zeros(needed, dtype=torch.uint8)]).layout.slot_bytes == 4096


@pytest.mark.parametrize(
    ("rank", "buffers", "message"),
    [
        (1, [torch.zeros(1 << 20, dtype=torch.uint8)], "rank 1 does not exist"),
        (0, [torch.zeros(n << 20, dtype=torch.uint8) for n in (1, 2)], "differ in size"),
        (0, [torch.zeros(1 << 20)], "uint8"),
        (0, [torch.zeros((1 << 20) + 1, dtype=torch.uint8)[1:]], "aligned"),
    ],
)
def test_buffers_that_do_not_fit(rank, buffers, message):
    with pytest.raises(UsageError, match=message):
        Workspace.create(rank, buffers)


def test_grid_must_be_a_power_of_two():
    with pytest.raises(UsageError, match="power of two"):
        Layout(2, 4096, 3)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), "dtype"),
        (torch.ones(4), torch.ones(5), "out is"),
        (torch.ones(4), torch.ones(4, dtype=torch.float16), "out is"),
        (torch.ones(4, 4).t(), torch.ones(4, 4), "contiguous"),
        (torch.ones(4, device="meta"), torch.ones(4, device="meta"), "the workspace on cpu"),
    ],
)
def test_tensors_that_do_not_fit(x, out, message):
    with pytest.raises(UsageError, match=message):
        all_reduce(x, out, local_workspace())


def test_cpu_without_the_interpreter_says_why():
    x = torch.ones(4)
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        all_reduce(x, x, local_workspace())


def test_bare_name_is_refused():
    command = [sys.executable, "-c", "import triton_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "commfuse.triton_kernels" in done.stderr

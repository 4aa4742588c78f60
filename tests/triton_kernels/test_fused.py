"""all_reduce_rms_norm and matmul_all_reduce: ranks as processes, in Triton's interpreter."""

import re
from pathlib import Path

import pytest
import torch

from commfuse.errors import BackendUnavailable, UsageError
from commfuse.testing import run_ranks
from commfuse.triton_kernels.all_reduce_rms_norm import all_reduce_rms_norm
from commfuse.triton_kernels.arguments import aligned
from commfuse.triton_kernels.matmul_all_reduce import (
    compile_constants,
    matmul_all_reduce,
    tile_columns,
)
from commfuse.triton_kernels.workspace import Layout, Workspace

WORKER = str(Path(__file__).with_name("worker.py"))


@pytest.fixture(scope="module")
def results():
    """What the ranks found: run by the first test that asks, failed for all if it fails."""
    found = {}

    def get(op: str, world_size: int) -> list[dict]:
        key = (op, world_size)
        if key not in found:
            found[key] = None
            found[key] = run_ranks(
                f"{WORKER}:fused", world_size, args=(op, world_size == 2), timeout=200,
                env={"TRITON_INTERPRET": "1"},
            )  # fmt: skip
        assert found[key] is not None, f"the ranks of {op} failed"
        return found[key]

    return get


@pytest.mark.parametrize("op", ["all_reduce_rms_norm", "matmul_all_reduce"])
class TestEveryOp:
    @pytest.mark.parametrize("world_size", [2, 3])
    def test_results_are_accurate_and_equal_on_all_ranks(self, results, op, world_size):
        ranks = [rank["correctness"] for rank in results(op, world_size)]
        for cases in zip(*ranks, strict=True):
            names, complaints, bits = zip(*cases, strict=True)
            assert not any(complaints), (names[0], complaints)
            assert len(set(bits)) == 1, names[0]

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_stragglers_at_every_step(self, results, op, world_size):
        assert [rank["stragglers"] for rank in results(op, world_size)] == [0] * world_size

    def test_a_row_does_not_depend_on_its_batch(self, results, op):
        assert [rank["batches"] for rank in results(op, 2)] == [[], []]

    def test_a_broken_protocol_is_caught(self, results, op):
        ranks = [rank["controls"] for rank in results(op, 2)]
        assert [rank["sound"] for rank in ranks] == [0, 0]
        for case in ("one half", "skipped wait"):
            assert sum(rank[case] for rank in ranks) > 0, case

    def test_absent_peer_gives_a_bounded_error(self, results, op):
        first, second = (rank["failures"] for rank in results(op, 2))
        assert first["sound"] == second["sound"] == ("none", "", 0.0)
        kind, text, seconds = first["absent peer"]
        assert kind == "PeerTimeout", text
        for part in ("rank 0", "rank 1", f"{op} float32[1, 3]", "call 2", "generation 2, seen 1"):
            assert part in text
        assert seconds < 20
        for rank in (first, second):
            kind, text, seconds = rank["after the failure"]
            assert kind == "PeerTimeout", text
            assert "rank 0 waited in vain for rank 1" in text
            assert seconds < 10

    @pytest.mark.parametrize(
        ("case", "calls"),
        [
            ("shapes", ("float32[1, 3]", {"all_reduce_rms_norm": "[3, 50] with residual",
                                          "matmul_all_reduce": "[2, 33] with bias, norm_weight"})),
            ("dtypes", ("float32[1, 3]", "bfloat16[1, 3]")),
            ("options", ("float32[1, 3] with residual", "float32[1, 3]")),
        ],
    )  # fmt: skip
    def test_different_calls_are_named(self, results, op, case, calls):
        of_ranks = [call if isinstance(call, str) else call[op] for call in calls]
        for rank in results(op, 2):
            kind, text, _ = rank["failures"][case]
            assert kind == "PeerMismatch", text
            for number, call in enumerate(of_ranks):
                says = re.search(rf"rank {number} called {op} (.*?)(?: while| \(call|$)", text)
                assert says and says[1].endswith(call), text

    def test_host_abort_ends_a_wait(self, results, op):
        kind, text, seconds = results(op, 2)[0]["failures"]["host abort"]
        assert kind == "CommunicatorError" and "rank 1" in text
        assert seconds < 20


PUBLIC = {
    "all_reduce_rms_norm": {
        "served": ("complaints", "[]"),
        "row above a slot": ("BackendUnavailable", r"1200000 bytes.*workspace_bytes=\d+"),
    },
    "matmul_all_reduce": {
        "served": ("complaints", "[]"),
        "packed": ("BackendUnavailable", "packed for the CPU"),
        "rows": ("BackendUnavailable", "up to 64 rows, not 65"),
        "output above a slot": ("BackendUnavailable", r"5120000 bytes.*workspace_bytes=\d+"),
    },
}


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in PUBLIC for case in PUBLIC[op]])
def test_as_a_backend(results, op, case):
    kind, message = PUBLIC[op][case]
    for rank in results(op, 2):
        got, text = rank["public"][case]
        assert got == kind, text
        assert text == message if kind == "complaints" else re.search(message, text), text


def test_blocks_meet_before_they_normalise(results):
    for rank in results("matmul_all_reduce", 2):
        assert rank["meeting"]["sound"] == [[], []]
        skipped = rank["meeting"]["skipped"]
        assert any("norm" in problem for call in skipped for problem in call)
        kind, text = rank["meeting"]["absent"]
        assert kind == "PeerTimeout", text
        assert "blocks of its own in matmul_all_reduce float32[18, 200]" in text


# ---- in this process ---------------------------------------------------------------------------


def local_workspace() -> Workspace:
    return Workspace.create(0, [torch.zeros(1 << 20, dtype=torch.uint8)])


def norm(rows=2, columns=3, **changed):
    arguments = {
        "x": torch.ones(rows, columns),
        "residual": torch.ones(rows, columns),
        "weight": torch.ones(columns),
        "eps": 1e-5,
        "summed": torch.ones(rows, columns),
        "normalised": torch.ones(rows, columns),
        "workspace": local_workspace(),
    }
    all_reduce_rms_norm(**(arguments | changed))


def matmul(rows=2, columns=3, k=4, **changed):
    arguments = {
        "x": torch.ones(rows, k),
        "w": torch.ones(columns, k),
        "summed": torch.ones(rows, columns),
        "workspace": local_workspace(),
    }
    matmul_all_reduce(**(arguments | changed))


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (norm, {"x": torch.ones(2, 3, dtype=torch.float64)}, "dtype"),
        (norm, {"x": torch.ones(3)}, "must be .rows, columns."),
        (norm, {"x": torch.ones(3, 2).t()}, "x must be contiguous"),
        (norm, {"residual": torch.ones(2, 4)}, r"residual is torch.float32\[2, 4\]"),
        (norm, {"residual": torch.ones(3, 2).t()}, "residual must be contiguous"),
        (norm, {"weight": torch.ones(3, dtype=torch.float16)}, "weight is"),
        (norm, {"summed": torch.ones(2, 2)}, "summed is"),
        (norm, {"normalised": torch.ones(2, 3, device="meta")}, "normalised is"),
        (norm, {"summed": torch.ones(7)[1:].view(2, 3)}, "summed must begin at a multiple of 16"),
        (matmul, {"summed": torch.ones(7)[1:].view(2, 3)}, "summed must begin at a multiple of 16"),
        (matmul, {"w": torch.ones(3, 5)}, r"w is .* it must be torch.float32\[3, 4\]"),
        (matmul, {"w": torch.ones(3)}, "they have the shapes"),
        (matmul, {"w": torch.ones(4, 3).t()}, "w must be contiguous"),
        (matmul, {"bias": torch.ones(4)}, "bias is"),
        (matmul, {"residual": torch.ones(3, 3)}, "residual is"),
        (matmul, {"norm_weight": torch.ones(3)}, "given together"),
        (matmul, {"normalised": torch.ones(2, 3)}, "given together"),
    ],
)
def test_tensors_that_do_not_fit(call, changed, message):
    with pytest.raises(UsageError, match=message):
        call(**changed)


@pytest.mark.parametrize("call", [norm, matmul])
def test_cpu_without_the_interpreter_says_why(call):
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        call()


def test_inputs_of_sums_are_copied_where_they_are_not_aligned():
    memory = torch.arange(9.0)
    assert aligned(None) is None
    assert aligned(memory) is memory
    moved = aligned(memory[1:])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, memory[1:])


def test_tiles_share_the_work_out():
    assert tile_columns(8192, 128) == 64  # one for each block
    assert tile_columns(4096, 128) == 32
    assert tile_columns(5120, 64) == 32  # 80 tiles of 64 would take two rounds
    assert tile_columns(1, 128) == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [1, 16, 2048, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("max_blocks", [16, 32, 64, 128])
def test_only_padding_and_stages_depend_on_the_rows(dtype, columns, max_blocks):
    layout = Layout(2, 1 << 20, max_blocks)
    of_rows = [compile_constants(rows, columns, dtype, layout) for rows in range(65)]
    for constants in of_rows:
        padded, stages = constants.pop("PADDED_ROWS"), constants.pop("STAGES")
        stage = (constants["TILE"] + padded) * constants["STEP"] * dtype.itemsize
        assert stages >= 3 and stages * stage <= 96 * 1024
        assert constants == of_rows[0]

"""What is made of rows of GPU benchmarks, on rows made by hand: ratios, tables, plots."""

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from commfuse.bench import plot, runner, selection
from commfuse.bench.gpu_peers import GPU_PEERS
from commfuse.bench.provenance import setting
from commfuse.bench.table import print_summary, print_table, read_rows
from commfuse.bench.timing import Times
from commfuse.errors import UsageError
from commfuse.testing.cases import MORE, QUICK
from commfuse.testing.gpu_cases import gpu_cases_of


def row(op: str, backend: str, ranks: int, shape: dict, us: float, **fields) -> dict:
    """A row of one GPU, with what tables and plots read."""
    return {
        "op": op, "backend": backend, "device": "cuda", "gpus": 1, "ranks": ranks,
        "emulated": False, "dtype": "bfloat16", "shape": shape,
        "bytes": 2 * shape["m"] * shape["n"], "p20_us": us, "p50_us": us, "p80_us": us,
        "exposed": None, "exposed_own": None,
        "of_baseline": None, "times_faster_than_torch": None, "streamed_bytes": 0,
        "streamed_gb_per_s": None, "fraction_of_read": None, "transport": "symmetric memory",
        "gpu": "NVIDIA H100", "setting": setting(ranks, 1), "driver": "580", "cuda": "13.0",
        "torch": "2.11.0", "triton": "3.6.0", "date_utc": "2026-11-24T03:45:00+00:00", **fields,
    }  # fmt: skip


def all_reduces(ranks: int) -> list[dict]:
    return [
        row("all_reduce", backend, ranks, {"m": m, "n": 4096}, factor * (4 + m / 8))
        for m in (1, 8, 128, 1024)
        for backend, factor in (("cuda", 1.0), ("torch_one_shot", 1.5), ("torch_two_shot", 1.3))
    ]


def layers(ranks: int) -> list[dict]:
    return [
        row(
            "matmul_all_reduce", backend, ranks, {"m": m, "k": k, "n": 8192, **options}, us,
            streamed_bytes=2 * k * 8192, exposed=exposed, exposed_own=exposed and exposed + 0.1,
        )
        for k in (4096, 14336)
        for options in ({}, {"residual": True, "norm": True})
        for m in (1, 8, 32, 64)
        for backend, us, exposed in (
            ("cuda", 48.0, 0.1 + m / 400), ("triton", 55.0, 0.5), ("cublas", 46.0, None),
        )
    ]  # fmt: skip


def test_settings():
    assert setting(4, 1) == "one GPU, 4 ranks"
    assert setting(4, 4) == "one GPU a rank"
    assert setting(4, 2) == "2 GPUs, 4 ranks"


def times(**medians: float) -> dict[str, Times]:
    return {name: Times.of(np.full(20, float(us)), 40) for name, us in medians.items()}


def test_exposed_communication_counts_against_the_faster_all_reduce():
    measured = times(cublas=40, gemm=38, cuda=44, torch=70)
    measured |= times(**{"cublas+one_shot": 60, "cublas+two_shot": 56, "gemm+all_reduce": 50})
    options = selection.Options("matmul_all_reduce", 2, device="cuda")
    assert runner._exposed(measured, "cuda", options) == {
        "exposed": pytest.approx((44 - 40) / (56 - 40)),
        "exposed_own": pytest.approx((44 - 38) / (50 - 38)),
    }
    assert runner._exposed(measured, "cublas", options) == {"exposed": None, "exposed_own": None}
    del measured["cublas+one_shot"], measured["cublas+two_shot"]
    assert runner._exposed(measured, "cuda", options)["exposed"] is None


def test_peers_stand_beside_our_backend_and_the_baselines_are_torchs():
    for op, peers in GPU_PEERS.items():
        assert {peer.beside for peer in peers} == {"cuda"}
        names = [peer.name for peer in peers if peer.baseline]
        assert names and not {peer.name for peer in peers if peer.partial} & set(names)
        selection.check_options(
            [selection.Options(op, 2, ("auto", "torch", *names), device="cuda")]
        )


@pytest.mark.parametrize(("op", "text"), [("attention", "not measured on GPUs"), ("nccl", "unkno")])
def test_ops_that_are_not_measured_on_gpus(op, text):
    with pytest.raises(UsageError, match=text):
        selection.check_options([selection.Options(op, 2, device="cuda")])


def test_verification_is_measured_in_every_size_that_was_promised():
    cases = gpu_cases_of("verify_chain", 1, (QUICK, MORE))
    assert len(set(cases)) == len(cases)
    for options in ((), ("sampled",), ("sampled", "truncated"), ("sampled", "distributions")):
        sizes = {tuple(case.shape.values())[:3] for case in cases if case.options == options}
        assert sizes == set(product((1, 8, 32, 128), (1, 4, 7), (32000, 128256, 151936)))
    words = selection.Options(
        "verify_chain", 1, device="cuda", cases="all", only=("batch=8", "drafts=7", "+truncated")
    )
    assert [case["vocabulary"] for case in selection.cases(words)] == [128256, 32000, 151936]


def test_a_layer_is_divided_by_the_number_of_ranks():
    for ranks in (2, 4, 8):
        cases = gpu_cases_of("matmul_all_reduce", ranks)
        assert {case["k"] * ranks for case in cases} == {8192, 28672}
        assert {case["n"] for case in cases} == {8192}


def test_a_size_that_a_backend_refuses_is_told_from_one_that_it_serves():
    comm = SimpleNamespace(world_size=1, check=lambda: None)

    def refuse(inputs):
        raise runner.BackendUnavailable("at most 64 rows")

    assert runner._first_call(refuse, {}, comm) == ((), "at most 64 rows")
    assert runner._first_call(lambda inputs: (1,), {}, comm) == ((1,), None)


def test_tables_name_the_device_and_how_ranks_share_it(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in all_reduces(2) + layers(2)))
    rows = read_rows([path])
    print_summary(rows)
    shown = capsys.readouterr().out
    assert "all_reduce bfloat16, NVIDIA H100, one GPU, 2 ranks" in shown
    assert "m=1 k=4096 n=8192 +residual +norm" in shown and "0.10" in shown
    assert "driver 580, CUDA 13.0, torch 2.11.0, triton 3.6.0" in shown
    print_table(all_reduces(4))
    assert "one GPU, 4 ranks" in capsys.readouterr().out


def test_plots_of_every_op_and_number_of_ranks(tmp_path):
    rows = [*all_reduces(2), *all_reduces(4), *layers(2), *layers(4)]
    found = plot.draw(rows, tmp_path / "plots")
    assert sorted(path.name for path in found) == [
        "exposed_matmul_all_reduce_w2.png",
        "exposed_matmul_all_reduce_w4.png",
        "latency_all_reduce_w2.png",
        "latency_all_reduce_w4.png",
    ]
    for path in found:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_titles_say_device_setting_and_date():
    assert plot.place(all_reduces(2)[0]) == "NVIDIA H100, one GPU, 2 ranks, 2026-11-24"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        plot.draw([{"device": "cpu"}], tmp_path)

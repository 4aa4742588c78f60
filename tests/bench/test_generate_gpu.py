"""``bench generate --device cuda``: its processes on CPU ranks, with a small model; its rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from commfuse.bench import generate_gpu
from commfuse.bench.generate_gpu_worker import Job
from commfuse.bench.table import print_gpu_generate_table
from commfuse.cli.demo import gpu_verdict
from commfuse.errors import UsageError

LAB = SimpleNamespace(environment=lambda ranks: {"OMP_NUM_THREADS": "1"})
SMALL = {
    **generate_gpu.LLAMA_3_8B, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
JOB = Job(SMALL, "cpu", "bfloat16", ("cuda", "torch"), prompt_tokens=20, new_tokens=4, runs=2)
GPU = {"gpus": 1, "gpu": "NVIDIA H100", "driver": "580", "cuda": "13.0"}


def test_both_backends_in_the_same_processes():
    report = generate_gpu.run_job(JOB, JOB.backends, 2, LAB)
    rows = generate_gpu.make_rows(report, JOB, [])
    assert [(row["backend"], row["ranks"]) for row in rows] == [("cuda", 2), ("torch", 2)]
    layer = 64 * (4 + 2 * 2 + 4) * 16 + 3 * 64 * 96
    cache = 2 * 22 * 16 * 2 * 2  # K and V, positions, head_dim, layers, bytes; one head a rank
    for row in rows:
        assert row["floor_us"] > 0 and row["times_floor"] == row["p50_us"] / row["floor_us"]
        assert 0 <= row["logits_error"] < 0.05
        # The first rank has 256 of the 300 entries.
        assert row["step_bytes"] == 2 * (2 * layer // 2 + 256 * 64) + cache
    assert rows[0]["times_faster_than_torch"] == rows[1]["p50_us"] / rows[0]["p50_us"]
    assert rows[1]["times_faster_than_torch"] is None


@pytest.mark.long
def test_transformers():
    report = generate_gpu.run_job(JOB, ("transformers",), 1, LAB)
    (row,) = generate_gpu.make_rows(report, JOB, [])
    assert row["backend"] == "transformers" and row["p50_us"] > 0 and row["floor_us"] is None


def report(backends: dict[str, float], ranks: int = 1, needed: int | None = 2_000_000) -> dict:
    """Of rank 0, with microseconds a step."""
    return {
        "ranks": ranks,
        "runs": {n: [{"step_us": us, "ttft_ms": 1.0}] * 3 for n, us in backends.items()},
        "step_bytes": [needed] * ranks if needed else [],
        "copy_bytes_per_s": [1e12] * ranks if needed else [],
        "logits_error": None,
        "provenance": GPU,
    }


def test_rows_and_their_table(capsys):
    job = replace(JOB, device="cuda")
    rows = generate_gpu.make_rows(report({"transformers": 6.0}, needed=None), job, [])
    rows += generate_gpu.make_rows(report({"cuda": 2.5, "torch": 5.0}), job, rows)
    theirs, ours, torchs = rows
    assert (ours["floor_us"], ours["times_floor"], ours["vs_transformers"]) == (2.0, 1.25, 2.4)
    assert ours["times_faster_than_torch"] == 2.0 and torchs["vs_transformers"] == 1.2
    assert theirs["floor_us"] is None
    print_gpu_generate_table(rows)
    printed = capsys.readouterr().out
    assert "1.25" in printed and "2.40x" in printed and "NVIDIA H100" in printed


def test_the_demo_says_what_rows_show():
    rows = generate_gpu.make_rows(report({"transformers": 6000.0}, needed=None), JOB, [])
    for ranks, ours, torchs in ((1, 2500.0, 5000.0), (2, 2000.0, 3000.0)):
        made = report({"cuda": ours, "torch": torchs}, ranks, 2_000_000_000)
        rows += generate_gpu.make_rows(made, JOB, rows)
    text = gpu_verdict(rows, 2)
    assert "2.50 ms, 1.25 times what copying its bytes would; transformers' takes 2.40" in text
    assert "On 2 ranks it takes 2.00 ms" in text and "1.50 times as long" in text
    assert "2 ranks share 1 GPU (MPS)" in text
    assert gpu_verdict(rows[:3], 1).endswith("as long.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1,), None, "smollm2"), "the model is llama-3-8b"),
        (((1,), ("cpu",), None), "unknown backend 'cpu' for generate: use cuda, torch"),
        (((64,), None, None), "64 ranks is impossible for a model with 32"),
    ],
)
def test_what_cannot_be_had(arguments, message):
    with pytest.raises(UsageError, match=message):
        generate_gpu.run_generate(*arguments, "bfloat16", None, True, LAB)


def test_the_library_is_not_needed_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(generate_gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="it is not installed"):
        generate_gpu.run_generate((1,), ("transformers",), None, "bfloat16", 1, True, LAB)

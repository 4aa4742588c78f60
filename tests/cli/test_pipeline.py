"""``commfuse generate --pp`` and the benchmarks of a pipeline, from the command line."""

import json
import subprocess
import sys

import pytest

PROMPTS = ["--prompt", "The capital of France is", "--prompt", "1, 2, 3,"]


def commfuse(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "commfuse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def found(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_stages_of_smollm2_and_their_timeline(tmp_path):
    path = tmp_path / "trace.json"
    options = ["--max-new-tokens", 8, "--json", *PROMPTS]
    (whole,) = found(commfuse("generate", *options))
    staged = commfuse("generate", *options, "--pp", 2, "--link", "pp=100:10", "--trace", path)
    (result,) = found(staged)
    assert result["outputs"] == whole["outputs"]
    stats = result["stats"]
    assert (stats["tp"], stats["pp"], stats["emulated"]) == (1, 2, True)
    assert stats["backends"]["send"] == stats["backends"]["recv"] == "cpu"
    assert sum(stats["pipeline"]["layers"]) == 30
    assert all(cost > 0 for cost in stats["pipeline"]["costs"].values())
    assert stats["pipeline"]["groups"] == 2 and stats["steps"] == 14
    assert stats["pipeline"]["prefill_bubble"] == 0.5
    assert len(stats["pipeline"]["decode_idle"]) == 2

    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for rank in (0, 1):
        mine = [event for event in spans if event["pid"] == rank]
        assert sum(event["name"] == "decode" for event in mine) == 14
        passes = [event for event in mine if event["tid"] == 0]
        for message in (event for event in mine if event["name"] == "message"):
            assert any(
                one["ts"] <= message["ts"]
                and message["ts"] + message["dur"] <= one["ts"] + one["dur"]
                for one in passes
            )  # what a rank waits for is part of what it does


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--pp", 31], "use 1 to 30"),
        (["generate", "--pp", 2, "--pp-split", "10,10"], "does not cut 30 layers into 2 stages"),
        (["generate", "--pp", 2, "--pp-split", "a"], "as in 19,11"),
        (["generate", "--pp", 0], "--pp 0: at least 1"),
        (["generate", "--pp", 2, "--floors"], "those of one stage"),
        (["generate", "--trace", "/nowhere/trace.json"], "no such folder"),
        (["bench", "send_recv", "--ranks", 3], "use --ranks 2"),
        (["bench", "send_recv", "--backends", "nccl"], "unknown backend 'nccl'"),
        (["bench", "send_recv", "--device", "cuda", "--ranks", 3], "use --ranks 2 or 4"),
        (["bench", "send_recv", "--device", "cuda", "--backends", "cpu"], "on GPUs: use cuda, "),
        (["bench", "pipeline", "--ranks", 1], "use --ranks 2 or more"),
        (["bench", "pipeline", "--compute", "none"], "use real or emulated"),
        (["bench", "wall", "--compute", "real"], "use --compute emulated"),
        (["bench", "wall", "--model", "llama-9"], "llama"),
        (["bench", "wall", "--link", "pp=string"], "unknown link 'string'"),
    ],
)
def test_what_cannot_be(arguments, message, monkeypatch, capsys):
    from commfuse.cli import main

    prompt = ["--prompt", "x"] if arguments[0] == "generate" else []
    monkeypatch.setattr(sys, "argv", ["commfuse", *map(str, arguments), *prompt])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_send_recv():
    rows = found(commfuse("bench", "send_recv", "--iterations", 20, "--json", "--link", "pp=50:1"))
    assert [(row["backend"], row["bytes"]) for row in rows] == [
        (backend, size) for size in (8192, 65536, 262144, 1048576) for backend in ("cpu", "torch")
    ]
    for row in rows:
        assert row["emulated"] == "50:1"
        assert row["p20_us"] >= 50 + row["bytes"] / 1e3
        assert row["transport"] in ("shared memory", "torch.distributed")


@pytest.mark.long
def test_rows_of_a_pipeline():
    rows = found(commfuse("bench", "pipeline", "--compute", "emulated", "--ranks", 3, "--json"))
    assert [row["what"] for row in rows] == ["idle"] * 4 + ["boundary"]
    assert [row["formula"] for row in rows[:4]] == [0.6667, 0.5, 0.3333, 0.2]
    assert all(len(row["idle_of_stage"]) == 3 for row in rows[:4])


@pytest.mark.long
@pytest.mark.timeout(900)  # eight ranks, slowed down, on cores that others may use
def test_the_wall():
    rows = found(commfuse("bench", "wall", "--json"))
    ours = {row["layout"]: row for row in rows if row["backend"] == "commfuse"}
    assert len(ours) == len(rows) / 2 == 8
    for row in rows:
        parts = ("compute_ms", "all_reduce_ms", "send_recv_ms", "idle_ms")
        assert sum(row[part] for part in parts) == pytest.approx(row["total_ms"], rel=0.01)
        assert row["emulated"] == "compute and links"
    gain = {name: row["times_one_device"] for name, row in ours.items()}
    assert gain["TP8 across hosts"] < gain["TP4"] < gain["TP4 inside x PP2 across hosts"]

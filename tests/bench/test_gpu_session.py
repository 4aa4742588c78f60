"""``make gpu-bench``: the order of its parts, their time, and what is left of them in the end. The
commands are stand-ins; GPUs run the true ones.
"""

import json
import subprocess
import sys
import time
import zipfile

import pytest

from commfuse.bench import gpu_session
from commfuse.bench.gpu_session import MAIN, OTHERS, Part, parts_of, run
from commfuse.errors import UsageError
from commfuse.testing.gpu_cases import gpu_cases_of

ROW = {
    "op": "all_reduce", "backend": "cuda", "device": "cuda", "gpus": 1, "ranks": 2,
    "emulated": False, "dtype": "bfloat16", "p20_us": 2.0, "p50_us": 2.5, "p80_us": 3.0,
    "exposed": None, "exposed_own": None, "of_baseline": 0.5, "times_faster_than_torch": None,
    "streamed_bytes": 0, "streamed_gb_per_s": None, "fraction_of_read": None, "gpu": "NVIDIA H100",
    "transport": "symmetric memory", "setting": "one GPU, 2 ranks", "driver": "580", "cuda": "13.0",
    "torch": "2.11.0", "triton": "3.6.0", "date_utc": "2026-11-24T03:45:00+00:00",
}  # fmt: skip


def printing(name: str, *sizes: int, then: str = "", seconds: float = 300.0) -> Part:
    """A part that prints rows, and then does what a line of Python says."""
    rows = [{**ROW, "shape": {"m": m, "n": 4096}, "bytes": 8192 * m} for m in sizes]
    lines = [f"print({json.dumps(json.dumps(row))}, flush=True)" for row in rows]
    return Part(name, [sys.executable, "-c", "\n".join([*lines, then])], seconds)


def test_the_most_important_comes_first():
    names = [part.name for part in parts_of([2, 4, 8])]
    assert names[:9] == ["tune"] + [f"{op}, {ranks} ranks" for op in MAIN for ranks in (2, 4)]
    assert names[9:13] == [f"{op}, 8 ranks" for op in MAIN]
    assert "matmul, 1 rank" in names and len(names) == 1 + 4 * 3 + 1 + 4 * 3
    tune, *rest = parts_of([2, 4, 8], arguments=["--iterations", "5"])
    assert list(tune.command[-3:]) == ["tune", "--ranks", "2,4,8"] and not tune.prints_rows
    assert all(list(part.command[-2:]) == ["--iterations", "5"] for part in rest)


def test_parts_are_ops_that_are_measured_on_gpus():
    for op in MAIN | OTHERS:
        assert gpu_cases_of(op, 2)
    assert [part.name for part in parts_of([4], ["all_gather"])] == ["tune", "all_gather, 4 ranks"]
    with pytest.raises(UsageError, match=r"--ops attention: use matmul_all_reduce, "):
        parts_of([2], ["attention"])


def test_rows_of_all_parts_are_kept_with_tables_and_plots(tmp_path, capfd):
    table = "import os; open(os.environ['COMMFUSE_CACHE'] + '/tune-x.json', 'w').write('{}')"
    (tmp_path / "tune-old.json").write_text("{}")
    tune = Part("tune", [sys.executable, "-c", f"print('crossovers'); {table}"], 300.0, False)
    parts = [tune, printing("one", 1, 8), printing("other", 64)]
    assert run(parts, tmp_path, time.time() + 3600)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["shape"]["m"] for row in rows] == [1, 8, 64]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.txt", "plots.zip", "rows.jsonl", "summary.txt", "tune-x.json",
    ]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "plots.zip") as plots:
        assert plots.namelist() == ["latency_all_reduce_w2.png"]
    said = capfd.readouterr().out
    assert "crossovers" in said and "of 300.0 s\n" in said and "m=64 n=4096" in said


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path, capfd, monkeypatch):
    ready = tmp_path / "ready"
    endless = (
        "import time; print('{\"op\": ', end='', flush=True); "
        f"open({str(ready)!r}, 'w'); time.sleep(3600)"
    )

    class Popen(subprocess.Popen):
        """The time of the endless part is over when it has come so far."""

        def wait(self, timeout=None):
            if timeout != 3.0:
                return super().wait(timeout)
            while not ready.exists():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(gpu_session, "GRACE_SECONDS", 300)
    parts = [
        printing("endless", 1, then=endless, seconds=3.0),
        printing("failing", then="import sys; sys.exit('no GPU here')"),
        printing("next", 8),
    ]
    assert not run(parts, tmp_path, time.time() + 3600)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["shape"]["m"] for row in rows] == [1, 8]
    said = capfd.readouterr().out
    assert "of 3.0 s, stopped: see log.txt" in said
    assert "of 300.0 s, failed with status 1: see log.txt" in said
    log = (tmp_path / "log.txt").read_text()
    assert "== failing\nno GPU here" in log and "KeyboardInterrupt" in log


def test_no_part_begins_that_may_not_end_in_time(tmp_path, capfd):
    parts = [printing("long", 1, seconds=2000.0), printing("short", 8)]
    assert run(parts, tmp_path, time.time() + 1000)
    (row,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert json.loads(row)["shape"]["m"] == 8
    assert "long: left out, it may take 2000.0 s" in capfd.readouterr().out


def test_without_rows_there_is_nothing_to_show(tmp_path, capfd):
    assert run([], tmp_path / "new", 0)
    assert capfd.readouterr().out == "no rows\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "two"], "--ranks two: numbers, as in 2,4,8"),
        (["--ops", "attention"], "--ops attention: use"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_session.main(["--out", str(tmp_path), "--until", "0", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err

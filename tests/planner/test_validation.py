"""Predictions against measured rows, and the command line."""

import json
import sys
from collections import namedtuple

import pytest
from typer.testing import CliRunner

from commfuse.cli import app, main
from commfuse.errors import UsageError
from commfuse.planner.validation import COLUMNS, validate

Row = namedtuple("Row", "model engine precision isl osl concurrency tp ttft tpot")
# Of the serving measurements on H100 SXM in ai-dynamo/aiconfigurator (silicon_sample.csv,
# Apache-2.0), rounded: ms.
ROWS = [
    Row("Qwen/Qwen3-32B", "sglang", "", 1024, 128, 16, 2, 840.8, 16.54),
    Row("Qwen/Qwen3-32B", "sglang", "", 1024, 128, 16, 4, 492.8, 10.55),
    Row("Qwen/Qwen3-32B", "vllm", "", 1024, 512, 64, 4, 267, 18.52),
    Row("Qwen/Qwen3-32B", "vllm", "", 1024, 512, 64, 8, 192, 14.25),
    Row("Qwen/Qwen3-32B", "trtllm", "fp8", 2048, 256, 32, 1, 652.5, 38.0),
    Row("Qwen/Qwen3-32B", "trtllm", "fp8", 2048, 256, 32, 2, 487.1, 23.26),
    Row("Qwen/Qwen3-32B", "trtllm", "fp8", 2048, 256, 32, 4, 310.4, 15.67),
    Row("Qwen/Qwen3-32B", "trtllm", "fp8", 2048, 256, 32, 8, 244.0, 12.69),
    Row("meta-llama/Llama-3.1-8B-Instruct", "trtllm", "", 1024, 256, 32, 1, 159.9, 10.92),
    Row("meta-llama/Llama-3.1-8B-Instruct", "trtllm", "", 1024, 256, 32, 2, 112.9, 7.35),
    Row("meta-llama/Llama-3.1-70B", "vllm", "fp8", 1024, 1024, 16, 4, 121.4, 13.19),
    Row("meta-llama/Llama-3.1-70B", "vllm", "fp8", 1024, 1024, 16, 8, 93.0, 11.39),
]


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def table(tmp_path):
    def write(rows):
        path = tmp_path / "rows.csv"
        lines = [",".join((*COLUMNS, "precision"))]
        lines += [
            f"{r.model},h100_sxm,{r.engine},{r.isl},{r.osl},{r.concurrency},{r.tp},{r.ttft},{r.tpot},"
            f"{r.precision}"
            for r in rows
        ]
        path.write_text("\n".join(lines))
        return str(path)

    return write


def test_measured_rows_are_met(table):
    report = validate(table(ROWS))
    assert report.total.rows == len(ROWS)
    assert report.total.tpot < 0.12
    assert report.speedups[0] == 5
    assert report.speedups[1] < 0.1


def test_constants_that_are_wrong_are_noticed(table):
    halved = [row._replace(tpot=row.tpot / 2) for row in ROWS]
    assert validate(table(halved)).total.tpot > 0.5


def test_a_fit_on_other_rows_helps(table):
    slower = [row._replace(tpot=row.tpot * 1.6) for row in ROWS]
    before = validate(table(slower)).total.tpot
    after = validate(table(slower), "thirds")
    assert after.fitted == 5
    assert after.total.tpot < before


def test_rows_that_cannot_be_used_are_counted(table):
    others = [{"model": "x/Mixtral-8x7B"}, {"ttft": ""}, {"tpot": "nan"}, {"precision": "int3"}]
    others += [{"tp": 128}]
    report = validate(table([*ROWS, *(ROWS[0]._replace(**changes) for changes in others)]))
    assert report.total.rows == len(ROWS)
    assert sum(report.left_out.values()) == len(others)


def test_the_command_validates(table):
    done = run("--validate", table(ROWS), "--json")
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert {group["engine"] for group in content["groups"]} == {"sglang", "vllm", "trtllm"}
    assert "TP speed-ups" in run("--validate", table(ROWS)).stdout


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="column model_path"):
        validate(str(path))
    with pytest.raises(UsageError, match="No such file"):
        validate(str(tmp_path / "nothing.csv"))


def test_the_command_plans(tmp_path):
    page = tmp_path / "page.html"
    question = ("--model", "llama-3.1-405b", "--cluster", "2x8:a100-80g-sxm,ib-hdr")
    done = run(*question, "--html", str(page))
    assert done.exit_code == 0
    assert "TP8 x PP2" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(run(*question, "--json").stdout)["best"]["layout"]["devices"] == 16


def test_nothing_fits():
    done = run("--model", "llama-3.1-405b", "--cluster", "8:a100-80g-sxm")
    assert done.exit_code == 3
    assert "does not fit" in done.stderr
    done = run("--model", "llama-3.1-405b", "--cluster", "8:a100-80g-sxm", "--json")
    assert (done.exit_code, json.loads(done.stdout)["status"]) == (3, "does not fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs --model and --cluster"),
        (("--model", "lama-3.1-8b", "--cluster", "1:h100-sxm"), "did you mean"),
        (("--model", "llama-3.1-8b", "--cluster", "h100"), "--cluster takes"),
        (("--model", "llama-3.1-8b", "--cluster", "8:h101-sxm"), "did you mean h100-sxm"),
        (("--model", "no/config.json", "--cluster", "1:h100-sxm"), "no such file"),
        (("--model", "mixtral-8x7b", "--cluster", "1:h100-sxm"), "mixture of experts"),
        (("--model", "llama-3.1-8b", "--cluster", "1:h100-sxm", "--weights", "fp5"), "use bf16"),
        (("--model", "llama-3.1-8b", "--cluster", "1:h100-sxm", "--objective", "fun"), "latency"),
        (("--model", "llama-3.1-8b", "--cluster", "1:h100-sxm", "--acceptance", "3"), "drafts"),
        (("--model", "llama-3.1-8b", "--cluster", "1:h100-sxm", "--tpot", "0.1"), "best TPOT"),
        (("--model", "llama-3.1-8b", "--cluster", "1:h100-sxm", "--tp", "2"), "no layout"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["commfuse", "plan", *arguments])
        main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ")
    assert message in said.err

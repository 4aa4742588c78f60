"""``commfuse doctor``: what it reports, also of an installation that lacks the extension."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commfuse import _extension, ops
from commfuse.cli.doctor import ISA_FEATURES
from commfuse.cli.probe import explain_all

CLONE = Path(__file__).resolve().parent.parent.parent


def doctor(*arguments: object, cwd: Path = CLONE, **environment: str):
    command = [sys.executable, "-m", "commfuse", "doctor", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def test_reports_on_three_ranks():
    done = doctor("--ranks", 3, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] and report["extension"]["usable"]
    assert report["cpu"]["variants"][report["cpu"]["variant_used"]] == "runs"
    assert report["cpu"]["variants"]["plain"] == "runs"
    job = report["job"]
    assert len({rank["process"] for rank in job["ranks"]}) == 3
    shared, local = "shared memory", "local"
    assert job["transports"] == [[local if a == b else shared for b in range(3)] for a in range(3)]
    assert job["sums_are_right"] and job["transport"] == shared
    assert {name: found["backend"] for name, found in job["backends"].items()} == dict.fromkeys(
        (*ops.OP_NAMES, *ops.CHANNEL_OP_NAMES), "cpu"
    )
    assert set(report["determinism"]) >= {"cpu", "torch", "triton"}


def test_the_text_says_what_is_missing_and_why():
    done = doctor("--ranks", 1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"no GPU: \S+|\d+: .*sm_\d+", done.stdout)
    assert "triton: needs two ranks or more" in done.stdout
    assert "kernels in use: " in done.stdout and "same bits on every rank" in done.stdout


def test_without_the_extension_it_says_how_to_build_it(tmp_path):
    ignored = shutil.ignore_patterns("*.so", _extension._RECORD, "__pycache__")
    shutil.copytree(CLONE / "python" / "commfuse", tmp_path / "commfuse", ignore=ignored)
    done = doctor("--ranks", 2, "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["extension"]["usable"] and "it is not built" in report["extension"]["summary"]
    assert report["cpu"]["variant_used"] is None
    assert report["job"]["transports"][0][1] == "torch.distributed"
    found = report["job"]["backends"]["all_reduce"]
    assert found["backend"] == "torch" and "it is not built" in found["reasons"]["cpu"]


def test_ranks_that_cannot_start_are_a_finding():
    done = doctor("--ranks", 2, COMMFUSE_CPU_ISA="mmx")
    assert done.returncode == 1
    assert "they cannot communicate: rank" in done.stdout and "Traceback" not in done.stderr
    assert "kernels in use: COMMFUSE_CPU_ISA=mmx: this processor cannot run it" in done.stdout


def test_no_ranks_are_refused():
    done = doctor("--ranks", 0)
    assert done.returncode == 2 and done.stderr == "error: --ranks 0: at least 1\n"


def test_every_op_is_explained():
    assert list(explain_all(None)) == [*ops.OP_NAMES, *ops.CHANNEL_OP_NAMES]


@pytest.mark.parametrize("variant", [name for name in ISA_FEATURES if name != "plain"])
def test_the_features_asked_for_are_those_of_the_source(variant):
    source = (CLONE / "csrc" / "cpu" / "kernel_table.cpp").read_text()
    _, _, body = source.partition(f'if (name == "{variant}")')
    statement = body.partition(";")[0]
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', statement))
    asked = {name.replace("512bf16", "512_bf16") for name in asked}
    for other in re.findall(r'runs\("(\w+)"\)', statement):
        asked |= set(ISA_FEATURES[other])
    if "tiles_granted()" in statement:
        asked |= {"amx_tile", "amx_bf16"}
    assert asked == set(ISA_FEATURES[variant])

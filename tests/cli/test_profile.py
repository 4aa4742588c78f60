"""``commfuse profile``: what it makes of measured times, and what bad input gets."""

from pathlib import Path

import pytest

from commfuse.bench.profile import ascending
from commfuse.cli.profile import profile
from commfuse.errors import UsageError
from commfuse.planner.calibration import PRIOR
from commfuse.planner.cluster import parse_cluster
from commfuse.planner.cluster_file import write_cluster
from commfuse.planner.layout import Layout
from commfuse.planner.model import load_model
from commfuse.planner.plan import Question, plan
from commfuse.planner.search import Limits

MEASURED = {  # as written on two cores, rounded
    "name": "2x-cpu",
    "device": {
        "name": "cpu",
        "title": "a core",
        "memory_gb": 12.6,
        "bandwidth_gb_per_s": 10.0,
        "host_bandwidth_gb_per_s": 15.0,
        "tflops": {"bf16": 0.066},
        "achievable": 1.0,
    },
    "levels": [
        {
            "name": "host",
            "size": 2,
            "link": {
                "latency_us": 400.0,
                "gb_per_s": 1.7,
                "mapped": True,
                "all_reduce_us": {2: [[1024, 5.3], [65536, 27.6], [4194304, 1039.0]]},
                "send_us": [[1024, 400.0], [4194304, 2470.0]],
            },
        }
    ],
    "calibration": {"memory": 1.0, "gemm": 1.0, "kernel": 2.7e-6, "step": 9e-4, "load": 1.0},
}


def test_noise_does_not_make_larger_messages_faster():
    assert ascending({1: 3.0, 2: 2.5, 4: 5.0}) == [[1, 3.0], [2, 3.0], [4, 5.0]]


def test_a_measured_machine_is_planned_for(tmp_path):
    path = tmp_path / "cluster.yaml"
    write_cluster(path, MEASURED)
    cluster = parse_cluster(str(path))
    assert set(dict(cluster.calibration)) <= set(PRIOR.as_dict())
    times = {}
    for tp in (1, 2):
        question = Question(load_model("llama-3.2-1b"), cluster, limits=Limits(tp=tp, pp=1))
        found = plan(question).best
        assert found.layout == Layout(tp)
        times[tp] = found.service.per_token.weights
    # Two cores share 15 GB/s, of which one alone draws 10: half the weights at 7.5 GB/s each.
    assert times[1] / times[2] == pytest.approx(1.5, rel=0.02)


def test_measured_times_are_taken_as_they_are(tmp_path):
    path = tmp_path / "cluster.yaml"
    fast = {**MEASURED["levels"][0]["link"], "gb_per_s": 1000.0, "latency_us": 0.1}
    write_cluster(path, {**MEASURED, "levels": [{**MEASURED["levels"][0], "link": fast}]})
    cluster = parse_cluster(str(path))
    for nbytes, us in fast["all_reduce_us"][2]:
        assert cluster.all_reduce_seconds(0, 2, nbytes) == pytest.approx(us * 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "--device tpu: use cpu or cuda"),
        ({"ranks": "1"}, "at least 2"),
        ({"ranks": "2,4"}, "one number"),
        ({"out": Path("cluster.json")}, "must end in .yaml"),
        ({"device": "cuda"}, "--device cuda"),
    ],
)
def test_bad_input_is_refused(options, message, monkeypatch):
    # A machine with a GPU is one without, here.
    monkeypatch.setattr("commfuse.testing.gpu_lab.gpu_count", lambda: 0)
    with pytest.raises(UsageError, match=message):
        profile(**{"device": "cpu", "ranks": None, "out": Path("cluster.yaml"), **options})

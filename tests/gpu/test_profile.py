"""``commfuse profile --device cuda``: a plan can be made with what it writes."""

import pytest

from commfuse.planner.cluster import parse_cluster
from commfuse.planner.model import load_model
from commfuse.planner.plan import Question, plan
from commfuse.runtime import launch

pytestmark = pytest.mark.gpu


def test_a_measured_gpu_is_planned_for(lab, tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "cluster.yaml"
    command = launch.own_command(
        "profile", "--device", "cuda", "--ranks", "2", "--out", str(path)
    )  # fmt: skip
    results = launch.run_ranks(command, 2, environment=lab.environment(2), timeout=300)
    assert [result.status for result in results] == [0, 0], results[0].stderr
    cluster = parse_cluster(str(path))
    device, link = cluster.device, cluster.levels[0].link
    assert device.is_gpu and link.measured and link.mapped
    # Of any GPU that runs these kernels: an A100's memory reads 2000 GB/s, half of it shared.
    assert device.bandwidth_gb_per_s > 200 and device.tflops["bf16"] > 20
    assert cluster.all_reduce_seconds(0, 2, 1024) < 1e-3
    assert plan(Question(load_model("llama-3.1-8b"), cluster)).best.layout.devices <= 2

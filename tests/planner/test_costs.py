"""Costs of steps: properties that must hold, and published measurements."""

import random
from dataclasses import replace

import pytest

from commfuse.planner.calibration import shipped
from commfuse.planner.cluster import parse_cluster
from commfuse.planner.layout import Layout, stage_layers
from commfuse.planner.memory import Precision, memory_of
from commfuse.planner.model import load_model, presets
from commfuse.planner.serving import Work, serve
from commfuse.planner.speculation import Acceptance, best_speculation, break_even, speculate
from commfuse.planner.step import Setting

LAYOUTS = [Layout(1), Layout(2), Layout(3), Layout(8), Layout(2, 2), Layout(4, 4), Layout(16)]


def setting(model="llama-3.1-8b", cluster="2x8:h100-sxm,ib-ndr", weights="bf16", kv="bf16", **more):
    precision = Precision(weights, kv)
    return Setting(load_model(model), parse_cluster(cluster), precision, shipped(), **more)


def most(s, layout, work, requests=2048):
    """Output tokens/s under full load."""
    room = memory_of(s.model, s.cluster.device, layout, s.precision, 1000).requests(work.tokens)
    loads = {min(1 << n, room, requests) for n in range(12)}
    return max(serve(s, layout, work, load, 1000).throughput for load in loads)


CLUSTERS = ["8:h100-sxm", "2x8:a100-80g-sxm,ib-hdr", "8:l40s", "8:a100-80g-pcie", "4:rtx-4090",
            "3x4:b200,25gbe", "8:l40s,ib-ndr,pcie4-host", "4x8:h100-sxm,100gbe"]  # fmt: skip


def random_case(draw):
    """A setting, a layout, and what is asked of it."""
    s = setting(
        draw.choice(sorted(presets())),
        draw.choice(CLUSTERS),
        draw.choice(["bf16", "fp8", "int4"]),
        draw.choice(["bf16", "fp8"]),
        fused=draw.random() < 0.5,
    )
    tp = draw.randint(1, min(s.cluster.count, s.model.num_heads))
    pp = draw.randint(1, min(s.cluster.count // tp, s.model.num_layers))
    work = Work(draw.choice([100, 1000, 3000]), draw.choice([10, 200, 900]))
    return s, Layout(tp, pp), work, draw.choice([1, 2, 7, 32, 200])


@pytest.mark.parametrize("seed", range(8))
def test_more_bandwidth_or_arithmetic_is_never_slower(seed):
    draw = random.Random(seed)
    for _ in range(25):
        s, *asked = random_case(draw)
        factor, device = draw.choice([1.1, 2.0, 5.0]), s.cluster.device
        tflops = {dtype: value * factor for dtype, value in device.tflops.items()}
        before = serve(s, *asked, 512)
        for cluster in (
            s.cluster.faster(factor),
            replace(s.cluster, device=device.with_changes(tflops=tflops)),
            replace(
                s.cluster,
                device=device.with_changes(bandwidth_gb_per_s=device.bandwidth_gb_per_s * factor),
            ),
        ):
            after = serve(replace(s, cluster=cluster), *asked, 512)
            assert after.tpot <= before.tpot * (1 + 1e-9)
            assert after.ttft <= before.ttft * (1 + 1e-9)
            assert after.throughput >= before.throughput * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_what_fits_also_fits_into_more_memory(seed):
    draw = random.Random(seed)
    for _ in range(100):
        s, layout, work, _ = random_case(draw)
        short = [
            memory_of(s.model, device, layout, s.precision, 512).short(work.tokens)
            for memory in (20, 40, 80, 160)
            for device in (s.cluster.device.with_changes(memory_gb=memory),)
        ]
        assert short == sorted(short, reverse=True)


@pytest.mark.parametrize("model", sorted(presets()))
def test_one_device_communicates_with_nobody(model):
    found = serve(setting(model), Layout(1), Work(1024, 256), 4, 512)
    assert found.per_token.communication == found.first_token.communication == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hosts_that_are_not_used_change_nothing(layout):
    a = serve(setting(cluster="2x8:h100-sxm,ib-ndr"), layout, Work(1024, 256), 8, 512)
    b = serve(setting(cluster="4x8:h100-sxm,ib-ndr"), layout, Work(1024, 256), 8, 512)
    assert a == b


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_add_up(layout):
    found = serve(setting(), layout, Work(1024, 256), 8, 512)
    assert sum(found.per_token.as_dict().values()) == pytest.approx(found.tpot)
    assert min(found.per_token.as_dict().values()) >= 0


@pytest.mark.parametrize("pp", [1, 2, 3, 5, 8])
def test_stages_hold_every_layer(pp):
    model = load_model("llama-3.1-70b")
    layers = stage_layers(model, pp)
    assert sum(layers) == model.num_layers
    assert max(layers) - min(layers) <= 3


# Output tokens/s, 1000 tokens in and out, under full load: TensorRT-LLM v0.14 perf-overview.
SERVED = [
    ("8:h200", "fp8", {1: 2585, 2: 4601, 4: 7608, 8: 13081}),
    ("8:h100-sxm", "fp8", {2: 4116, 4: 6933, 8: 10730}),
    ("8:a100-80g-sxm", "bf16", {4: 1763, 8: 3190}),
    ("8:a100-80g-pcie", "bf16", {4: 989, 8: 960}),
    ("8:l40s", "fp8", {4: 1161, 8: 1188}),
]


@pytest.mark.parametrize(("cluster", "weights", "measured"), SERVED)
def test_throughput_of_measured_systems(cluster, weights, measured):
    s = setting("llama-3.1-70b", cluster, weights, weights, fused=False)
    for tp, tokens in measured.items():
        assert most(s, Layout(tp), Work(1000, 1000)) == pytest.approx(tokens, rel=0.3)


@pytest.mark.parametrize(
    ("cluster", "weights", "wall"),
    [("8:a100-80g-pcie", "bf16", True), ("8:l40s", "fp8", True), ("8:a100-80g-sxm", "bf16", False)],
)
def test_walls_stand_where_they_were_measured(cluster, weights, wall):
    s = setting("llama-3.1-70b", cluster, weights, weights, fused=False)
    four, eight = (most(s, Layout(tp), Work(1000, 1000)) for tp in (4, 8))
    assert (eight < 1.2 * four) == wall


# Output tokens/s under full load with 1, 2, 4, 8 stages: TensorRT-LLM v1.0 perf-overview.
def test_throughput_of_a_measured_pipeline():
    s = setting("llama-3.3-70b", "8:rtx-pro-6000", "fp4", "fp8", fused=False)
    for pp, tokens in {1: 1787, 2: 3707, 4: 5961, 8: 8166}.items():
        assert most(s, Layout(1, pp), Work(1000, 1000)) == pytest.approx(tokens, rel=0.3)


def test_stages_beat_ranks_on_eight_l4():
    # Llama-3.1-70B in fp8 on 8 L4: PP4 x TP2 was measured ahead of PP2 x TP4 (substratus.ai).
    s = setting("llama-3.1-70b", "8:l4", "fp8", "fp8", fused=False)
    assert most(s, Layout(2, 4), Work(250, 250)) > most(s, Layout(4, 2), Work(250, 250))


# Decoding of one request, tokens/s: the README of gpt-fast, A100 SXM.
@pytest.mark.parametrize(
    ("model", "measured"),
    [
        ("llama-2-70b", {2: 21.3, 4: 38.0, 8: 62.5}),
        ("llama-3.1-8b", {1: 93.8, 2: 149.1, 4: 217.2, 8: 276.0}),
    ],
)
def test_latency_of_measured_systems(model, measured):
    s = setting(model, "8:a100-80g-sxm", fused=False)
    for tp, tokens in measured.items():
        found = serve(s, Layout(tp), Work(100, 200), 1, 512)
        assert 1 / found.tpot == pytest.approx(tokens, rel=0.2)


def test_what_a_bridge_gains_two_geforce_cards():
    # A 27B model in int4 on two RTX 3090: NVLink was 25% faster than PCIe (a user's report).
    speeds = [
        1 / serve(setting("qwen2.5-32b", f"2:rtx-3090,25gbe,{link}", "int4", fused=False),
                  Layout(2), Work(1000, 250), 1, 512).tpot
        for link in ("nvlink-bridge", "pcie4-geforce")
    ]  # fmt: skip
    assert speeds[0] / speeds[1] == pytest.approx(1.25, rel=0.1)


def test_drafts_by_hand():
    assert Acceptance(rate=0.5).tokens(3) == 1 + 0.5 + 0.25 + 0.125
    assert break_even(1.75, 2) == pytest.approx(0.5, abs=1e-6)
    assert break_even(3.5, 2) > 1  # two drafts never yield so many


def test_a_measured_series_has_an_optimum_within():
    series = (1.84, 2.51, 3.01, 3.36, 3.61, 3.77, 3.73, 3.47)
    best = best_speculation(
        setting("llama-3.1-70b"), Layout(8), 1, 1000.0, Acceptance(lengths=series)
    )
    assert best.drafts == 6
    assert 1 < best.speedup < 4


def test_speculation_pays_less_with_many_requests():
    s, acceptance = setting("llama-3.1-8b"), Acceptance(rate=0.7)
    gains = [speculate(s, Layout(1), n, 1000.0, acceptance, 4).speedup for n in (1, 32, 256)]
    assert gains == sorted(gains, reverse=True)
    assert best_speculation(s, Layout(1), 512, 100.0, Acceptance(rate=0.1)) is None


def test_a_large_draft_model_does_not_pay():
    s = setting("llama-3.1-8b")
    slow = Acceptance(rate=0.7, draft=load_model("llama-3.1-8b"))
    assert best_speculation(s, Layout(1), 1, 1000.0, slow) is None

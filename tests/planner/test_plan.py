"""Answers: what is chosen, what does not fit, what is said about it, in which form."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from commfuse.errors import UsageError
from commfuse.models.run_plan import RunPlan, read_run_plan
from commfuse.planner.cluster import parse_cluster
from commfuse.planner.document import document, does_not_fit, run_plan, schema
from commfuse.planner.explanation import explain
from commfuse.planner.layout import Layout
from commfuse.planner.memory import Precision
from commfuse.planner.model import load_model
from commfuse.planner.page import page
from commfuse.planner.plan import DoesNotFit, Question, plan
from commfuse.planner.search import Limits
from commfuse.planner.serving import Work
from commfuse.planner.speculation import Acceptance
from commfuse.planner.uncertainty import spread


def ask(model, cluster, **more):
    return plan(Question(load_model(model), parse_cluster(cluster), **more))


def valid(value, rule, root):
    """A small JSON Schema validator: what the plan's schema uses, and nothing else."""
    if "$ref" in rule:
        return valid(value, root["$defs"][rule["$ref"].rsplit("/", 1)[-1]], root)
    if "oneOf" in rule:
        return sum(valid(value, option, root) for option in rule["oneOf"]) == 1
    kinds = rule.get("type", [])
    names = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
        "number": (int, float), "null": type(None),
    }  # fmt: skip
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if isinstance(value, names[kind]) and not (
            isinstance(value, bool) and kind in ("integer", "number")
        ):
            break
    else:
        if kinds:
            return False
    if value != rule.get("const", value) or value not in rule.get("enum", [value]):
        return False
    if isinstance(value, (int, float)) and value < rule.get("minimum", value):
        return False
    if isinstance(value, list):
        return all(valid(item, rule.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        known = rule.get("properties", {})
        if rule.get("additionalProperties") is False and set(value) - set(known):
            return False
        return set(rule.get("required", [])) <= set(value) and all(
            valid(value[name], known[name], root) for name in set(value) & set(known)
        )
    return True


def test_405b_on_one_host_is_short_and_on_two_it_fits():
    with pytest.raises(DoesNotFit, match=r"does not fit .* 30\.\d GB short on each device") as miss:
        ask("llama-3.1-405b", "8:a100-80g-sxm")
    assert "12 such devices hold it, as TP4 x PP3; in hosts of 8, 2 hosts" in str(miss.value)
    assert ask("llama-3.1-405b", "2x8:a100-80g-sxm,ib-hdr").best.layout.devices == 16


def test_405b_with_a_free_count_takes_twelve():
    found = ask("llama-3.1-405b", "any:a100-80g-sxm")
    assert found.best.layout == found.fewest == Layout(4, 3)
    assert found.best.service.memory.kv_tokens > 50_000
    assert any("hosts come with 8, so people buy 16" in text for text in explain(found))


def test_the_search_does_little():
    # 64 GPUs take 0.6 s on an idle core; the time is that of the layouts and loads that are costed.
    cluster = parse_cluster("8x8:h100-sxm,ib-ndr")
    search = Question(load_model("llama-3.1-70b"), cluster, objective="throughput").search()
    assert len(search.run()[0]) < 3000


def test_do_not_distribute():
    assert explain(ask("llama-2-7b", "1:rtx-4090"))[0].startswith("Do not distribute")
    found = ask("llama-3.1-8b", "8:h100-sxm", objective="throughput")
    assert found.best.layout == Layout(1, 1, 8)
    assert explain(found)[0].startswith("Do not split the model: 8 replicas")


def test_the_rule_and_when_it_does_not_hold():
    one = explain(ask("llama-3.1-405b", "2x8:a100-80g-sxm,ib-hdr"))
    assert any("does not hold here: TP16" in text for text in one)
    many = explain(ask("llama-3.1-405b", "2x8:a100-80g-sxm,ib-hdr", objective="throughput"))
    assert any("'TP inside the host, PP across hosts' holds" in text for text in many)


def test_the_wall_is_explained():
    limits = Limits(pp=1, replicas=1)
    found = ask("llama-3.1-70b", "8:l40s", objective="throughput", limits=limits, fused=False,
                precision=Precision("fp8", "fp8"), work=Work(1000, 1000))  # fmt: skip
    assert found.sweet_spot.devices < 8
    (text,) = [text for text in explain(found) if "sweet spot" in text]
    assert "all-reduce grows" in text


def test_more_memory_is_never_infeasible():
    question = Question(load_model("llama-3.1-70b"), parse_cluster("8:a100-80g-sxm"))
    device = question.cluster.device
    last = 0
    for memory in (30, 40, 60, 80, 160):
        cluster = replace(question.cluster, device=device.with_changes(memory_gb=memory))
        found = plan(replace(question, cluster=cluster))
        assert len(found.candidates) >= last
        last = len(found.candidates)


def test_the_lists_of_a_layer():
    content = document(ask("llama-3.1-70b", "8:h100-sxm", limits=Limits(tp=2, pp=4, replicas=1)))
    layer = content["best"]["layer"]
    assert sum(layer["layers_of_stages"]) == 80 and len(layer["layers_of_stages"]) == 4
    # 32 query heads of 128 and 4 KV heads, half of 28672 features; 8192 values of two bytes.
    assert [(g["k"], g["n"]) for g in layer["gemms"]] == [
        (8192, 40 * 128),
        (32 * 128, 8192),
        (8192, 28672),
        (14336, 8192),
    ]
    assert [one["behind"] for one in layer["all_reduces"]] == ["output", "down"]
    assert all(one["bytes_per_token"] == 16384 for one in layer["all_reduces"])
    assert layer["sent_bytes_per_token"] == 8192
    one = document(ask("llama-3.1-8b", "1:h100-sxm"))["best"]["layer"]
    assert one["all_reduces"] == [] and one["sent_bytes_per_token"] == 0


def test_every_figure_has_its_error():
    found = ask("llama-3.1-8b", "8:h100-sxm", objective="latency")
    service, off = found.best.service, found.spread(found.best)
    content = document(found)
    for given in (content["best"]["tpot_ms"], *(point["speed"] for point in content["scaling"])):
        assert given["low"] < given["value"] < given["high"]
    assert content["best"]["tpot_ms"]["high"] == pytest.approx(service.tpot * 1e3 * (1 + off.tpot))
    # A layout that was never measured is said to be less certain.
    ring = found.question.cluster.levels[0].link
    unmeasured = replace(ring, all_reduce={})
    level = replace(found.question.cluster.levels[0], link=unmeasured)
    other = replace(found.question.cluster, levels=(level,))
    assert spread(other, Layout(8)).tpot > spread(found.question.cluster, Layout(8)).tpot
    assert spread(found.question.cluster, Layout(1)).reasons == ()


def test_room_is_less_certain_where_memory_is_nearly_full():
    tight, roomy = ask("llama-3.1-70b", "2:h100-sxm"), ask("llama-3.1-8b", "2:h100-sxm")
    widths = []
    for found in (tight, roomy):
        room = found.spread(found.best).kv_tokens(found.best.service.memory)
        assert room.low < room.value < room.high
        widths.append((room.high - room.low) / room.value)
    assert widths[0] > widths[1]


def test_pruning_loses_nothing():
    # 24 devices are searched with pruning, 16 exactly; on one host both must find the same.
    exact = ask("llama-3.1-70b", "8:h100-sxm", objective="throughput")
    pruned = ask("llama-3.1-70b", "3x8:h100-sxm,10gbe", limits=Limits(replicas=1))
    alone = ask("llama-3.1-70b", "8:h100-sxm", limits=Limits(replicas=1))
    assert pruned.best == alone.best
    assert exact.best.service.throughput >= alone.best.service.throughput


def test_the_front_is_one():
    front = ask("llama-3.1-70b", "8:h100-sxm", objective="pareto").front
    speeds = [c.service.throughput / c.layout.devices for c in front]
    assert len(front) > 3
    assert speeds == sorted(speeds)


def test_limits_that_cannot_be_met_say_the_best():
    with pytest.raises(UsageError, match=r"The best TPOT is .* ms \(TP8\)"):
        ask("llama-3.1-70b", "8:h100-sxm", limits=Limits(tpot=0.001))


def test_limits_are_kept():
    found = ask("llama-3.1-70b", "8:h100-sxm", objective="cost", limits=Limits(tpot=0.02))
    assert all(candidate.service.tpot <= 0.02 for candidate in found.candidates)


@pytest.mark.parametrize("objective", ["latency", "throughput", "cost", "pareto"])
def test_documents_keep_to_the_schema(objective):
    found = document(ask("llama-3.1-8b", "2x4:h100-sxm,ib-ndr", objective=objective))
    assert valid(json.loads(json.dumps(found)), schema(), schema())
    assert valid(does_not_fit("too large"), schema(), schema())
    drafted = document(ask("llama-3.1-8b", "1:h100-sxm", acceptance=Acceptance(rate=0.8)))
    assert drafted["run"]["draft_tokens"] > 0
    assert valid(json.loads(json.dumps(drafted)), schema(), schema())
    assert not valid({**found, "version": 2}, schema(), schema())
    assert not valid({**found, "more": 1}, schema(), schema())


def test_a_plan_can_be_run(tmp_path):
    path = tmp_path / "plan.json"
    found = ask("llama-3.1-8b", "2:h100-sxm")
    path.write_text(json.dumps(document(found)))
    run = read_run_plan(path)
    assert run == run_plan(found)
    assert (run.tp, run.pp, run.dtype_for("generate")) == (2, 1, "bfloat16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (does_not_fit("too large"), "nothing fits"),
        ({"version": 2}, "not a plan of version 1"),
        ({"version": 1, "status": "ok", "run": {"tp": "2"}}, "run.tp must be an integer"),
        ({"version": 1, "status": "ok", "run": {"tp": 1}}, "run.pp must be an integer"),
    ],
)
def test_plans_that_cannot_be_run(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        read_run_plan(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 2}, "2 replicas, and generate runs one"),
        ({"weights": "fp8"}, "for fp8 .--weights., which generate does not run"),
        ({"kv": "fp8"}, "plan with --kv bf16 or fp16"),
    ],
)
def test_what_nothing_here_runs_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(RunPlan(2, 1, 1, 1, 512, True, 0, "bf16", "bf16"), **changes).dtype_for("generate")


def test_the_page_is_whole_and_needs_nothing_else():
    text = page(ask("llama-3.1-405b", "2x8:a100-80g-sxm,ib-hdr"))
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|@import', text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    points = re.findall(r'<polyline class="curve" points="([^"]+)"', text)
    assert all(len(set(found.split())) >= 3 for found in points)
    assert text.count('class="part-all_reduce"') >= 8

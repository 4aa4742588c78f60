"""The answer as JSON, for programs: versioned, described by ``data/plan.schema.json``."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from commfuse.models.run_plan import VERSION, RunPlan
from commfuse.planner.calibration import origin
from commfuse.planner.explanation import explain
from commfuse.planner.layout import stage_layers
from commfuse.planner.model import GEMMS, SUMMED
from commfuse.planner.plan import Plan
from commfuse.planner.search import Candidate
from commfuse.planner.uncertainty import Range, around

_SCHEMA = Path(__file__).parent / "data" / "plan.schema.json"
DEFINITIONS = {
    "ttft_ms": "from a request's arrival to its first token, waiting included; mean",
    "tpot_ms": "(last token - first token) / (output tokens - 1), prefills of others in between "
    "included; mean",
    "tokens_per_second": "output tokens of all requests per second while there is always a next",
    "low, high": "four in five measurements lie between them, see wider_errors; the parts of "
    "per_token_ms are as uncertain as their sum, tpot_ms, and were not measured one by one",
}


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of :func:`document`."""
    return json.loads(_SCHEMA.read_text())


def document(plan: Plan) -> dict[str, Any]:
    """The whole answer.

    Example:
        >>> document(plan(question))["best"]["layout"]
        {'tp': 8, 'pp': 1, 'replicas': 1, 'devices': 8}
    """
    question = plan.question
    cluster, device, model = question.cluster, question.cluster.device, question.model
    return {
        "version": VERSION,
        "status": "ok",
        "definitions": DEFINITIONS,
        "question": _question(plan),
        "model": {
            "name": model.name,
            "parameters": model.parameters,
            "weight_bytes": model.weight_bytes(question.precision.weights),
            "kv_bytes_per_token": model.kv_bytes_per_token(question.precision.kv),
        },
        "cluster": {
            "name": cluster.name,
            "device": device.name,
            "devices": cluster.count,
            "levels": [
                {"name": level.name, "size": level.size, "link": level.link.name}
                for level in cluster.levels
            ],
        },
        "best": _candidate(plan, plan.best),
        "candidates": [_candidate(plan, c) for c in plan.candidates],
        "refused": [{"layout": _layout(r.layout), "reason": r.reason} for r in plan.refused],
        "pareto": [_candidate(plan, c) for c in plan.front],
        "scaling": [
            {
                "devices": p.devices,
                "speed": _figure(plan.speeds(p.best)),
                "layout": _layout(p.best.layout),
            }
            for p in plan.curve
        ],
        "sweet_spot": {
            "devices": plan.sweet_spot.devices,
            "layout": _layout(plan.sweet_spot.best.layout),
        },
        "fewest_devices": _layout(plan.fewest),
        "run": asdict(run_plan(plan)),
        "explanation": explain(plan),
        "calibration": origin(),
    }


def does_not_fit(message: str) -> dict[str, Any]:
    """The document where no layout has room."""
    return {"version": VERSION, "status": "does not fit", "message": message}


def run_plan(plan: Plan) -> RunPlan:
    """What ``commfuse generate --plan`` and ``parallelize`` take from it."""
    best = plan.best
    speculation = best.service.speculation
    return RunPlan(
        tp=best.layout.tp,
        pp=best.layout.pp,
        replicas=best.layout.replicas,
        micro_batches=best.service.groups,
        prefill_chunk=best.chunk,
        fused=best.fused,
        draft_tokens=speculation.drafts if speculation else 0,
        weights=plan.question.precision.weights,
        kv=plan.question.precision.kv,
    )


def _question(plan: Plan) -> dict[str, Any]:
    question = plan.question
    return {
        "prompt": question.work.prompt,
        "output": question.work.output,
        "requests": question.in_flight,
        "objective": question.objective,
        "weights": question.precision.weights,
        "kv": question.precision.kv,
        "ttft_limit_ms": _ms(question.limits.ttft),
        "tpot_limit_ms": _ms(question.limits.tpot),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _layout(layout) -> dict[str, int]:
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "replicas": layout.replicas,
        "devices": layout.devices,
    }


def _layer(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    """What the most loaded rank computes and exchanges for each layer, and between stages."""
    model, layout = plan.question.model, candidate.layout
    row = model.hidden_size * 2.0
    return {
        "layers_of_stages": list(stage_layers(model, layout.pp, plan.question.precision.weights)),
        "gemms": [
            {"name": name, "k": k, "n": n}
            for name, (k, n) in zip(GEMMS, model.gemms(layout.tp), strict=True)
        ],
        "all_reduces": [
            {"behind": GEMMS[index], "ranks": layout.tp, "bytes_per_token": row}
            for index in (SUMMED if layout.tp > 1 else ())
        ],
        "sent_bytes_per_token": row / layout.tp if layout.pp > 1 else 0.0,
    }


def _figure(found: Range) -> dict[str, float]:
    return found._asdict()


def _candidate(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    service = candidate.service
    off = plan.spread(candidate)
    memory, speculation = service.memory, service.speculation
    return {
        "layout": _layout(candidate.layout),
        "layer": _layer(plan, candidate),
        "prefill_chunk": candidate.chunk,
        "fused": candidate.fused,
        "requests": service.requests,
        "running": service.running,
        "micro_batches": service.groups,
        "idle": service.idle,
        "ttft_ms": _figure(around(service.ttft * 1e3, off.ttft)),
        "tpot_ms": _figure(around(service.tpot * 1e3, off.tpot)),
        "tokens_per_second": _figure(around(service.throughput, off.throughput)),
        "dollars_per_million_tokens": _figure(around(candidate.dollars, off.throughput)),
        "wider_errors": list(off.reasons),
        "memory": {
            "usable_bytes": memory.usable,
            "weights_bytes": memory.weights,
            "activations_bytes": memory.activations,
            "workspace_bytes": memory.workspace,
            "kv_bytes_per_token": memory.kv_per_token,
            "filled_bytes": _figure(around(memory.usable - memory.room, off.memory)),
            "kv_tokens": _figure(off.kv_tokens(memory)),
        },
        "per_token_ms": {name: value * 1e3 for name, value in service.per_token.as_dict().items()},
        "first_token_ms": {
            name: value * 1e3 for name, value in service.first_token.as_dict().items()
        },
        "speculation": None
        if speculation is None
        else {
            "draft_tokens": speculation.drafts,
            "tokens_per_step": speculation.tokens,
            "speedup": _figure(around(speculation.speedup, off.ratio)),
            "break_even_acceptance": speculation.break_even,
        },
    }

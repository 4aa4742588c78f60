"""The answer as one page that works without a network: curves, bars, the front, the words."""

from __future__ import annotations

from html import escape

from commfuse.planner.calibration import origin
from commfuse.planner.charts import Dot, curve, stacked_bars
from commfuse.planner.document import DEFINITIONS
from commfuse.planner.explanation import explain
from commfuse.planner.names import figure
from commfuse.planner.plan import Plan
from commfuse.planner.search import Candidate
from commfuse.planner.table import TERMS
from commfuse.planner.uncertainty import Range, around, exactly

BARS, ROWS = 8, 24
_COLOURS = {
    "weights": "#3b6fb6", "kv": "#6aa7e0", "gemm": "#2f8f83", "all_reduce": "#d1495b",
    "send_recv": "#e98a4b", "bubble": "#f2c14e", "launch": "#9a8fb8", "host": "#b9b4c7",
    "prefill": "#7a9e59", "draft": "#8d6a4f",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #626b7d; --line: #dfe3ea;
  --paper: #fbfbfc; --accent: #3b6fb6; --mark: #d1495b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #9aa3b5; --line: #343b49;
  --paper: #161a21; --accent: #79aaf0; --mark: #ff7b8d; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; } h2 { font-size: 1.1rem;
  margin: 2.4rem 0 .6rem; } p.lead { color: var(--soft); margin-top: 0; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--ink); }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; } svg .name { fill: var(--soft); }
.grid { stroke: var(--line); } .curve { fill: none; stroke: var(--accent); stroke-width: 2.5; }
.band { fill: var(--accent); opacity: .16; } .whisker { stroke: var(--ink); fill: none; }
.ideal { stroke: var(--soft); stroke-dasharray: 4 5; } .dot { fill: var(--accent); }
.marked { fill: var(--mark); } table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
tr.best { font-weight: 600; } td { white-space: nowrap; } td small { display: block;
  color: var(--soft); font-weight: 400; } .legend span { display: inline-block; margin-right: 1rem;
  font-size: .88rem; } .legend i { display: inline-block; width: .8em; height: .8em;
  border-radius: 2px; margin-right: .35em; } .scroll { overflow-x: auto; } li { margin: .3rem 0; }
footer { color: var(--soft); font-size: .85rem; margin-top: 2.5rem; }
"""


def page(plan: Plan) -> str:
    """The page, complete: no script, nothing that is fetched."""
    question, words = plan.question, explain(plan)
    colours = "".join(f".part-{k} {{ fill: {c}; background: {c}; }}\n" for k, c in _COLOURS.items())
    requests = question.in_flight or "any number of"
    lead = (
        f"{question.model.name}, {question.precision.weights} weights, on "
        f"{question.cluster.count} x {question.cluster.device.title} ({question.cluster.name}); "
        f"{requests} request{'s' * (requests != 1)} of "
        f"{question.work.prompt} + {question.work.output} tokens; objective: {question.objective}"
    )
    parts = [
        f"<h1>{escape(words[0])}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in words[1:])}</ul>",
        "<h2>Speed over devices</h2>",
        _scaling(plan),
        "<h2>Where the time of a token goes</h2>",
        _bars(plan),
        "<h2>Latency against throughput</h2>",
        _front(plan),
        "<h2>Layouts</h2>",
        _table(plan),
        _footer(plan),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>commfuse plan: {escape(question.model.name)}</title>"
        '<link rel="icon" href="data:,">'
        f"<style>{_STYLE}{colours}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _scaling(plan: Plan) -> str:
    per_request = plan.question.objective in ("latency", "pareto")
    unit = "tokens/s of a request" if per_request else "tokens/s of all requests"
    dots = [
        Dot(
            exactly(point.devices),
            plan.speeds(point.best),
            f"{point.devices} devices, {point.best.layout}: {plan.speeds(point.best)} tokens/s",
            point.devices == plan.sweet_spot.devices,
        )
        for point in plan.curve
    ]
    note = (
        "<p>Red: the sweet spot, behind which more devices do not pay. Dashed: speed that grows as "
        "the number of devices does. Light: within it four in five measurements lie.</p>"
    )
    return curve(dots, "devices", unit, "Speed over the number of devices", ideal=True) + note


def _bars(plan: Plan) -> str:
    bars = [
        (
            str(candidate.layout),
            around(candidate.service.tpot * 1e3, plan.spread(candidate).tpot),
            [(n, v * 1e3) for n, v in candidate.service.per_token.as_dict().items()],
        )
        for candidate in plan.shown(BARS)
    ]
    used = {name for _, _, parts in bars for name, value in parts if value > 0}
    legend = "".join(
        f'<span><i class="part-{name}"></i>{TERMS[name]}</span>'
        for name in _COLOURS
        if name in used
    )
    note = (
        "<p>The line over a bar: the error of the sum, by measurements; the parts are the model's "
        "and were not measured one by one.</p>"
    )
    drawn = stacked_bars(bars, "ms", "Time per token by layout")
    return f'<p class="legend">{legend}</p>{drawn}{note}'


def _front(plan: Plan) -> str:
    answer = plan.best.layout, plan.best.service.requests
    dots = []
    for c in plan.front:
        off, service = plan.spread(c), c.service
        tpot = around(service.tpot * 1e3, off.tpot)
        each = around(service.throughput / c.layout.devices, off.throughput)
        title = f"{c.layout}, {service.requests} requests: {tpot} ms, {each} tokens/s and device"
        dots.append(Dot(tpot, each, title, (c.layout, service.requests) == answer))
    note = (
        "<p>Layouts and loads that no other beats in both, with their errors. Red: the answer, if "
        "it is one.</p>"
    )
    return curve(dots, "TPOT, ms", "tokens/s and device", "Pareto front") + note


def _table(plan: Plan) -> str:
    heads = (
        "layout",
        "devices",
        "requests",
        "TTFT ms",
        "TPOT ms",
        "tokens/s",
        "$/M",
        "KV tokens",
        "fused",
    )
    rows = [_row(plan, candidate) for candidate in plan.shown(ROWS)]
    refused = sorted(plan.refused, key=lambda r: r.short)[:ROWS]
    rows += [
        f"<tr><td>{r.layout}</td><td>{r.layout.devices}</td>"
        f'<td colspan="7">{escape(r.reason)}</td></tr>'
        for r in refused
    ]
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _row(plan: Plan, candidate: Candidate) -> str:
    service, off = candidate.service, plan.spread(candidate)
    cells = (
        escape(str(candidate.layout)),
        str(candidate.layout.devices),
        str(service.requests),
        _ranged(around(service.ttft * 1e3, off.ttft)),
        _ranged(around(service.tpot * 1e3, off.tpot)),
        _ranged(around(service.throughput, off.throughput)),
        _ranged(around(candidate.dollars, off.throughput)),
        _ranged(off.kv_tokens(service.memory)),
        "yes" if candidate.fused else "no",
    )
    best = ' class="best"' if candidate is plan.best else ""
    return f"<tr{best}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _ranged(found: Range) -> str:
    return f"{figure(found.value)}<small>{figure(found.low, 2)} to {figure(found.high, 2)}</small>"


def _wider(plan: Plan) -> str:
    reasons = plan.spread(plan.best).reasons
    return f"Wider for the answer: {'; '.join(reasons)}. " if reasons else ""


def _footer(plan: Plan) -> str:
    links = {level.link.name: level.link.source for level in plan.question.cluster.levels}
    said = [f"{name}: {text}" for name, text in links.items() if text]
    meant = [f"{name.removesuffix('_ms').upper()}: {text}" for name, text in DEFINITIONS.items()]
    return (
        "<footer><p>In brackets, and small: between what four in five measurements lie by the "
        f"validation: {escape(origin())}. {escape(_wider(plan))}$/M: dollars of a million output "
        "tokens.</p>"
        f"<p>{escape('. '.join(meant))}.</p><p>Links: {escape('; '.join(said))}.</p></footer>"
    )

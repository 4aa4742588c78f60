"""The answer in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from commfuse.planner.explanation import explain
from commfuse.planner.names import figure
from commfuse.planner.plan import Plan
from commfuse.planner.search import Candidate
from commfuse.planner.validation import Errors, Report

ROWS = 8
TERMS = {
    "weights": "weights",
    "kv": "KV cache",
    "gemm": "arithmetic",
    "all_reduce": "all-reduce",
    "send_recv": "send/recv",
    "bubble": "bubble",
    "launch": "launch",
    "host": "host",
    "prefill": "prefill",
    "draft": "draft",
}

_PIPE_WIDTH = 120  # columns where the output is no terminal


def console() -> Console:
    """Where answers go: as wide as the terminal, or as the table where there is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def print_plan(plan: Plan, console: Console, rows: int = ROWS) -> None:
    """Prints the best layouts, those that do not fit, and the explanation."""
    question = plan.question
    requests = question.in_flight or "any number of"
    console.print(
        f"{question.model.name} ({question.precision.weights}, KV cache {question.precision.kv}) "
        f"on {question.cluster.name}: {question.cluster.count} x {question.cluster.device.title}; "
        f"{requests} request{'s' * (requests != 1)} of {question.work.prompt} + "
        f"{question.work.output} tokens; best {question.objective} first",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layout", no_wrap=True)
    for name in ("devices", "requests", "TTFT ms", "TPOT ms", "tokens/s", "GB of", "$/M"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("a token's time", no_wrap=True)
    shown = plan.shown(rows)
    for candidate in shown:
        style = "bold green" if candidate is plan.best else None
        table.add_row(*_cells(plan, candidate), style=style)
    console.print(table)
    if len(plan.candidates) > len(shown):
        console.print(f"… and {len(plan.candidates) - len(shown)} more (--rows, --json)")
    if plan.refused:
        least = min(plan.refused, key=lambda refused: (refused.short, refused.layout))
        console.print(
            f"{len(plan.refused)} of the layouts do not fit; the closest, {least.layout}, "
            f"{least.reason}",
            soft_wrap=True,
        )
    console.print()
    for sentence in explain(plan):
        console.print(f"- {sentence}", soft_wrap=True)
    off = plan.spread(plan.best)
    console.print(
        f"\nGB (±{off.memory:.0%}): weights and buffers of what can be used, on the fullest "
        "device; the rest is for the KV cache. $/M: dollars of a million output tokens, ± as "
        "tokens/s. ±30%: four in five measurements lie within a factor of 1.3 of it, by the "
        "validation" + (f"; wider here: {'; '.join(off.reasons)}" if off.reasons else "") + ".",
        soft_wrap=True,
    )


def _cells(plan: Plan, candidate: Candidate) -> list[str]:
    service = candidate.service
    off = plan.spread(candidate)
    memory = service.memory
    return [
        str(candidate.layout) + (" fused" if candidate.fused else ""),
        str(candidate.layout.devices),
        str(service.requests),
        f"{figure(service.ttft * 1e3)}±{off.ttft:.0%}",
        f"{figure(service.tpot * 1e3)}±{off.tpot:.0%}",
        f"{figure(service.throughput)}±{off.throughput:.0%}",
        f"{(memory.usable - memory.room) / 1e9:.0f}/{memory.usable / 1e9:.0f}",
        f"{candidate.dollars:.3g}",
        split_in_words(candidate),
    ]


def split_in_words(candidate: Candidate, most: int = 2) -> str:
    """The largest parts of a token's time."""
    terms = candidate.service.per_token
    parts = sorted(terms.as_dict().items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{TERMS[n]} {v / terms.total:.0%}" for n, v in parts if v > 0)


def print_report(report: Report, console: Console) -> None:
    """Prints the errors of a validation."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rows of")
    for name in ("rows", "TPOT", "80% below", "bias", "TTFT", "80% below", "bias"):
        table.add_column(name, justify="right")
    groups = [(f"engine {name}", found) for name, found in report.by_engine.items()]
    groups += [(f"model {name}", found) for name, found in report.by_model.items()]
    groups += [(f"{e}, {m}, TP{tp}", found) for (e, m, tp), found in report.groups.items()]
    table.add_row("all", *_errors(report.total), style="bold")
    for name, found in groups:
        table.add_row(name, *_errors(found))
    console.print("Median relative errors of predictions")
    console.print(table)
    count, median, p80 = report.speedups
    if count:
        console.print(
            f"TP speed-ups (TPOT at TP2/TP4 and TP4/TP8, {count} pairs): median error "
            f"{median:.1%}, 80% below {p80:.1%}"
        )
    if report.fitted:
        console.print(f"Constants were fitted to {report.fitted} rows that are not among these:")
        console.print(
            ", ".join(f"{name} {value:.4g}" for name, value in report.calibration.as_dict().items())
        )
    for reason, rows in report.left_out.items():
        console.print(f"left out: {rows} rows: {reason}")


def _errors(found: Errors) -> list[str]:
    return [
        str(found.rows),
        f"{found.tpot:.1%}",
        f"{found.tpot_p80:.1%}",
        f"{found.tpot_bias:+.1%}",
        f"{found.ttft:.1%}",
        f"{found.ttft_p80:.1%}",
        f"{found.ttft_bias:+.1%}",
    ]

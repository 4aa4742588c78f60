"""``commfuse plan``: what to run on which devices, where the wall is, and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from commfuse.errors import UsageError


def plan(
    model: Annotated[
        str | None,
        typer.Option(help="A preset (llama-3.1-70b, …), a config.json, or the directory of one."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="[HOSTSx]DEVICES:DEVICE[,LINK], as in 2x8:h100-sxm,ib-ndr; or FILE.yaml."
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="dtype: bf16, fp16, fp8, int4 or fp4.")] = "bf16",
    kv: Annotated[str, typer.Option(help="dtype of the KV cache: bf16, fp16 or fp8.")] = "bf16",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    output: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    requests: Annotated[
        int | None,
        typer.Option(help="Requests in flight. (default: 1 for latency, else as many as pay)"),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="latency, throughput, cost or pareto.")
    ] = "latency",
    ttft: Annotated[float | None, typer.Option(help="The most TTFT, ms.")] = None,
    tpot: Annotated[float | None, typer.Option(help="The most TPOT, ms.")] = None,
    tp: Annotated[int | None, typer.Option(help="Only so many ranks a layer.")] = None,
    pp: Annotated[int | None, typer.Option(help="Only so many stages.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Only so many replicas.")] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(help="Speculation: a rate (0.7), or tokens a step for 1, 2, … drafts."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="The model that drafts. (default: n-grams)")
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused/--no-fused", help="Consider commfuse's fused kernels.")
    ] = True,
    price: Annotated[
        float | None, typer.Option(help="Dollars per device and hour. (default: a rough figure)")
    ] = None,
    rows: Annotated[int, typer.Option(help="Layouts to show.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the curves; works offline.")
    ] = None,
    validate: Annotated[
        Path | None, typer.Option(help="Hold predictions against the rows of a CSV file instead.")
    ] = None,
    fit_on: Annotated[
        str | None,
        typer.Option(
            help="With --validate: fit the constants first, to the rows of this model or to "
            "`thirds`, every third row of each."
        ),
    ] = None,
) -> None:
    """Find the sweet spot of a model on a cluster, and explain the wall.

    Exit status 3: nothing fits; it says by how many GB.
    """
    if validate is not None:
        _validate(validate, fit_on, as_json)
        return
    if model is None or cluster is None:
        raise UsageError("plan needs --model and --cluster (or --validate FILE.csv)")
    if fit_on is not None:
        raise UsageError("--fit-on belongs to --validate")
    from commfuse.planner import document
    from commfuse.planner.plan import DoesNotFit
    from commfuse.planner.plan import plan as find

    question = _question(
        model, cluster, (weights, kv), (prompt, output), requests, objective, (ttft, tpot),
        (tp, pp, replicas), (acceptance, draft), fused, price,
    )  # fmt: skip
    try:
        found = find(question)
    except DoesNotFit as error:
        if as_json:
            print(json.dumps(document.does_not_fit(str(error)), indent=2))
        else:
            typer.echo(f"does not fit: {error}", err=True)
        raise typer.Exit(3) from None
    if html is not None:
        from commfuse.planner.page import page

        try:
            html.write_text(page(found), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--html {html}: {error.strerror}") from None
    if as_json:
        print(json.dumps(document.document(found), indent=2))
        return
    from commfuse.planner.table import console, print_plan

    print_plan(found, console(), rows)
    if html is not None:
        typer.echo(f"\nwritten: {html}")


def _question(
    model, cluster, dtypes, tokens, requests, objective, limits, only, speculation, fused, price
):
    """The question that the options ask.

    Raises:
        UsageError: an option cannot be used.
    """
    from dataclasses import replace

    from commfuse.planner.cluster import parse_cluster
    from commfuse.planner.memory import Precision
    from commfuse.planner.model import KV_BYTES, WEIGHT_BYTES, load_model
    from commfuse.planner.plan import Question
    from commfuse.planner.search import Limits
    from commfuse.planner.serving import Work
    from commfuse.planner.speculation import parse_acceptance

    for option, given, known in (
        ("--weights", dtypes[0], WEIGHT_BYTES),
        ("--kv", dtypes[1], KV_BYTES),
    ):
        if given not in known:
            raise UsageError(f"{option} {given}: use {', '.join(known)}")
    for option, limit in zip(("--ttft", "--tpot"), limits, strict=True):
        if limit is not None and limit <= 0:
            raise UsageError(f"{option} {limit:g}: a positive number of milliseconds")
    for option, number in zip(("--tp", "--pp", "--replicas"), only, strict=True):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: at least 1")
    acceptance, draft = speculation
    if draft is not None and acceptance is None:
        raise UsageError("--draft needs --acceptance: how often its drafts are accepted")
    machine = parse_cluster(cluster)
    if price is not None:
        if price <= 0:
            raise UsageError(f"--price {price:g}: positive dollars per device and hour")
        machine = replace(machine, device=machine.device.with_changes(dollars_per_hour=price))
    seconds = [None if limit is None else limit * 1e-3 for limit in limits]
    return Question(
        model=load_model(model),
        cluster=machine,
        work=Work(*tokens),
        precision=Precision(*dtypes),
        limits=Limits(*seconds, *only),
        objective=objective,
        requests=requests,
        acceptance=parse_acceptance(acceptance, load_model(draft) if draft else None)
        if acceptance
        else None,
        fused=fused,
    )


def _validate(path: Path, fit_on: str | None, as_json: bool) -> None:
    from commfuse.planner.validation import validate

    report = validate(str(path), fit_on)
    if not as_json:
        from commfuse.planner.table import console, print_report

        print_report(report, console())
        return
    count, median, p80 = report.speedups
    content = {
        "version": 1,
        "total": asdict(report.total),
        "by_engine": {name: asdict(found) for name, found in report.by_engine.items()},
        "by_model": {name: asdict(found) for name, found in report.by_model.items()},
        "groups": [
            {"engine": engine, "model": model, "tp": tp, **asdict(found)}
            for (engine, model, tp), found in report.groups.items()
        ],
        "tp_speedups": {"pairs": count, "median": median, "p80": p80},
        "left_out": report.left_out,
        "fitted_rows": report.fitted,
        "calibration": report.calibration.as_dict(),
    }
    print(json.dumps(content, indent=2))

"""``commfuse bench``: measures an op, or the generation of text, against its alternatives."""

from __future__ import annotations

from typing import Annotated

import typer

from commfuse.cli.ranks import gpu_lab, rank_counts, run_again_as_ranks, started_ranks
from commfuse.errors import UsageError
from commfuse.runtime.link import Link, parse_links

DEVICES = ("cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
CASES = ("quick", "all")
LAUNCHES = ("graph", "eager")


def bench(
    op: Annotated[
        str,
        typer.Argument(
            help="An op (all_reduce, matmul_all_reduce, …); verify, the ops that draw and verify "
            "tokens; send_recv, pipeline, wall or generate."
        ),
    ],
    device: Annotated[str, typer.Option(help=f"{' or '.join(DEVICES)}.")] = "cpu",
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ranks to start; several numbers, as in 2,4,8, are measured one after the other. "
            "(default: 2, or those of torchrun)"
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(help="Backends and peers, as in cpu,torch. (default: all that can run)"),
    ] = None,
    configurations: Annotated[
        str | None,
        typer.Option(help="generate: only these of its rows, as in tp1_1t,tp2,pp2. (default: all)"),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "bfloat16",
    cases: Annotated[
        str, typer.Option(help="quick, or all: more sizes; of pipeline, text too.")
    ] = "quick",
    only: Annotated[
        str | None,
        typer.Option(help='Of an op, the cases with all these words, as in "batch=8 +sampled".'),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Calls of each row; replays of its graph on a GPU; rounds of generate. (default: "
            "a second's worth; 20; 3, on a GPU 5)"
        ),
    ] = None,
    launch: Annotated[
        str,
        typer.Option(
            help="On a GPU: graph, from a CUDA graph, or eager, from Python, call by call."
        ),
    ] = "graph",
    link: Annotated[
        list[str] | None,
        typer.Option(
            help="Emulated link: tp=nvlink4, pcie4, 100gbe, …, or latency_us:GB/s; pp=… for "
            "send_recv and pipeline, both for wall."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="generate, pipeline: smollm2, a Hugging Face directory, or a GGUF file; generate "
            "on GPUs: llama-3-8b, its shape; wall: a model that plan knows. (default: smollm2; "
            "llama-3-8b; llama-3.1-8b)"
        ),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            help="real, or emulated: every rank waits instead of computing. (default: real for "
            "pipeline, emulated for wall)"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line and nothing else.")
    ] = False,
) -> None:
    """Measure OP: results are checked first, then timed on the slowest rank.

    This command starts its ranks itself; under torchrun an op is measured on torchrun's ranks. On
    GPUs ranks are dealt out to them in turn; several on one share it under NVIDIA's MPS.
    """
    started = started_ranks()
    counts = rank_counts(ranks, started)
    if device not in DEVICES:
        raise UsageError(f"--device {device}: use {' or '.join(DEVICES)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: use {', '.join(DTYPES)}")
    if cases not in CASES:
        raise UsageError(f"--cases {cases}: use {' or '.join(CASES)}")
    if launch not in LAUNCHES:
        raise UsageError(f"--launch {launch}: use {' or '.join(LAUNCHES)}")
    if launch != "graph" and device != "cuda":
        raise UsageError(f"--launch {launch}: graphs are of GPUs; use it with --device cuda")
    if iterations is not None and iterations < 1:
        raise UsageError(f"--iterations {iterations}: at least 1")
    links = parse_links(link or [])
    if links and device == "cuda":
        raise UsageError("--link: links are emulated between ranks on the CPU only")
    names = _split("--backends", backends, "cpu,torch")
    chosen = _split("--configurations", configurations, "tp1_1t,tp2")
    if chosen is not None and op != "generate":
        raise UsageError("--configurations belongs to bench generate")
    if only and op in ("generate", "pipeline", "wall", "send_recv"):
        raise UsageError(f"--only: for the cases of an op, not for {op}")
    if op == "generate":
        if started is not None:
            raise UsageError("bench generate starts its own ranks: run it without a launcher")
        if device == "cuda":
            from commfuse.bench import generate_gpu

            with gpu_lab(device) as lab:
                generate_gpu.run_generate(counts, names, model, dtype, iterations, as_json, lab)
            return
        from commfuse.bench.generate import run_generate

        for count in counts:
            run_generate(
                model or "smollm2", count, names, chosen, dtype, iterations or 3, links, as_json
            )
        return

    if op == "pipeline":
        from commfuse.bench.pipeline import Options, run_pipeline

        if device == "cuda":
            raise UsageError("--device cuda: bench pipeline runs on the CPU in this version")
        if started is not None:
            raise UsageError("bench pipeline starts its own ranks: run it without a launcher")
        for count in counts:
            kind = compute or "real"
            run_pipeline(
                Options(count, kind, dtype, cases, links.get("pp"), as_json), model or "smollm2"
            )
        return
    if op == "wall":
        _wall(compute, started, model, link or [], as_json)
        return
    if op == "send_recv":
        _send_recv(device, counts, started, names, dtype, cases, iterations, links, as_json)
        return

    from commfuse.bench.runner import run_rank
    from commfuse.bench.selection import Options, check_options, ops_of

    by_count = [
        [
            Options(
                op=name,
                world_size=count,
                backends=names,
                device=device,
                dtype=dtype,
                cases=cases,
                only=tuple((only or "").split()),
                iterations=iterations,
                link=links.get("tp"),
                launch=launch,
                as_json=as_json,
            )
            for name in ops_of(op)
        ]
        for count in counts
    ]
    for every in by_count:
        check_options(every)
    if started is not None or (counts == [1] and device == "cpu"):
        run_rank(by_count[0])
        return
    with gpu_lab(device) as lab:
        for count in counts:
            if status := run_again_as_ranks(count, lab.environment(count) if lab else None):
                raise typer.Exit(status)


def _wall(
    compute: str | None, started: int | None, model: str | None, link: list[str], as_json: bool
) -> None:
    from commfuse.bench.wall import Options, run_wall

    if compute not in (None, "emulated"):
        raise UsageError(
            f"--compute {compute}: bench wall emulates eight devices; use --compute emulated"
        )
    if started is not None:
        raise UsageError("bench wall starts its own ranks: run it without a launcher")
    given = {"tp": "nvlink4", "pp": "100gbe"}
    for text in link:
        dimension, equals, name = text.rpartition("=")
        given[dimension if equals else "tp"] = name
    run_wall(Options(model or "llama-3.1-8b", given["tp"], given["pp"], as_json))


def _send_recv(
    device: str,
    counts: list[int],
    started: int | None,
    names: tuple[str, ...] | None,
    dtype: str,
    cases: str,
    iterations: int | None,
    links: dict[str, Link],
    as_json: bool,
) -> None:
    from commfuse.bench.send_recv import Options

    if device == "cuda":
        from commfuse.bench.boundary_gpu import check_options, run_rank
    else:
        from commfuse.bench.send_recv import check_options, run_rank
    options = Options(
        backends=names,
        dtype=dtype,
        cases=cases,
        iterations=iterations,
        link=links.get("pp"),
        as_json=as_json,
    )
    for count in counts:
        check_options(options, count)
    if started is not None:
        run_rank(options)
        return
    with gpu_lab(device) as lab:
        for count in counts:
            if status := run_again_as_ranks(count, lab.environment(count) if lab else None):
                raise typer.Exit(status)


def _split(option: str, names: str | None, example: str) -> tuple[str, ...] | None:
    """The names in a comma-separated list, each once; None for no list.

    Raises:
        UsageError: the list is empty.
    """
    if names is None:
        return None
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise UsageError(f"{option} is empty; name some, as in {example}")
    return found

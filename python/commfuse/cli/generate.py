"""``commfuse generate``: text from a model that is split over ranks."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from commfuse.cli.ranks import agree_on_mesh, cores, gpu_lab, run_again_as_ranks, started_ranks
from commfuse.errors import UsageError
from commfuse.runtime.link import Link, parse_links
from commfuse.speculative.ngram import parse_drafter

DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("auto", "torch")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class _Options:
    """The command line, checked."""

    model: str
    device: str
    prompts: list[str]
    chat: bool
    ignore_eos: bool
    tp: int
    pp: int
    pp_split: tuple[int, ...] | None
    max_new_tokens: int
    draft_length: int | None
    sampling: dict[str, list]
    logprobs: bool
    dtype: str | None
    links: dict[str, Link]
    backend: str
    threads: int
    as_json: bool
    floors: bool
    trace: Path | None


def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to continue; repeatable.")],
    model: Annotated[
        str, typer.Option(help="smollm2, a Hugging Face directory, or a GGUF file.")
    ] = "smollm2",
    device: Annotated[
        str,
        typer.Option(help="cpu, or cuda: a GPU for each rank; ranks beyond that share them (MPS)."),
    ] = "cpu",
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-sequence token.")
    ] = False,
    tp: Annotated[
        int | None, typer.Option(help="Ranks that split each layer. [default: 1]")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(help="Stages that split the layers. [default: 1]")
    ] = None,
    pp_split: Annotated[
        str | None,
        typer.Option(help="Layers of each stage, as in 19,11. [default: by measured cost]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            help="0: the most probable token. One for all prompts, or one each. [default: 0]"
        ),
    ] = None,
    top_k: Annotated[
        list[int] | None,
        typer.Option(help="Draw among the K largest logits; 0: all; also one each. [default: 0]"),
    ] = None,
    top_p: Annotated[
        list[float] | None,
        typer.Option(help="Draw among the most probable tokens that have P together. [default: 1]"),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Of what is drawn; given once, prompt i has SEED + i. [default: 0]"),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With --json: the tokens' log-probabilities too.")
    ] = False,
    speculate: Annotated[
        str, typer.Option(help="off, ngram or ngram:K (at most K draft tokens a step).")
    ] = "off",
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}. [default: the checkpoint's]")
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            help="Emulated link within stages (tp=…) or between them (pp=…): nvlink4, pcie4, "
            "100gbe, …, or latency_us:GB/s."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="auto: our kernels; torch: torch.distributed (gloo), or on GPUs torch's GEMMs and "
            "symmetric memory."
        ),
    ] = "auto",
    plan: Annotated[
        Path | None,
        typer.Option(help="A file that `commfuse plan --json` wrote: TP, PP, draft tokens, dtype."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each rank. [default: cores / ranks]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a timeline of all ranks there, for ui.perfetto.dev."),
    ] = None,
    floors: Annotated[
        bool, typer.Option("--floors", help="Measure the floors too: arithmetic, memory, exchange.")
    ] = False,
) -> None:
    """Generate text with a model split over ranks that this command starts itself.

    Under torchrun it runs on torchrun's ranks instead.
    """
    from commfuse.models.stages import parse_split

    if logprobs and not as_json:
        raise UsageError("--logprobs: they are part of what --json prints; add --json")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: use {', '.join(DTYPES)}")
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend}: use {' or '.join(BACKENDS)}")
    if device not in DEVICES:
        raise UsageError(f"--device {device}: use {' or '.join(DEVICES)}")
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: at least 1")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    if plan is not None:
        tp, pp, speculate, dtype = _from_plan(plan, tp, pp, speculate, dtype)
    tp, pp = agree_on_mesh(tp, pp)
    if trace is not None and not trace.absolute().parent.is_dir():
        raise UsageError(f"--trace {trace}: there is no such folder")
    if floors and pp > 1:
        raise UsageError("--floors: they are those of one stage; use --pp 1")
    if device == "cuda":
        _check_gpu(pp, link, floors, trace)
    options = _Options(
        model=model,
        device=device,
        prompts=prompt,
        chat=chat,
        ignore_eos=ignore_eos,
        tp=tp,
        pp=pp,
        pp_split=parse_split(pp_split),
        max_new_tokens=max_new_tokens,
        draft_length=parse_drafter(speculate),
        sampling=_sampling(len(prompt), temperature, top_k, top_p, seed),
        logprobs=logprobs,
        dtype=dtype,
        links=parse_links(link or []),
        backend=backend,
        threads=threads or max(1, cores() // (tp * pp)),
        as_json=as_json,
        floors=floors,
        trace=trace,
    )
    if started_ranks() is not None:
        _run_rank(options)
        return
    with gpu_lab(device) as lab:
        if tp * pp == 1:
            _run_rank(options)
            return
        _check_model(options)
        status = run_again_as_ranks(tp * pp, lab.environment(tp * pp) if lab else None)
    raise typer.Exit(status)


def _check_gpu(pp: int, link: list[str] | None, floors: bool, trace: Path | None) -> None:
    """Refuses what generation on a GPU does not have.

    Raises:
        UsageError: the message says what has it.
    """
    from commfuse import _extension

    if pp > 1:
        raise UsageError(f"--pp {pp}: stages run on the CPU in this version; on GPUs use --tp")
    if link:
        raise UsageError("--link: links are emulated between ranks on the CPU only")
    if floors:
        raise UsageError(
            "--floors: measured on the CPU; for a GPU see commfuse bench generate --device cuda"
        )
    if trace is not None:
        raise UsageError("--trace: drawn for ranks on the CPU; for a GPU use a profiler of its own")
    if why := _extension.why_no_cuda():
        raise UsageError(f"--device cuda: {why}")


def _sampling(
    prompts: int,
    temperature: list[float] | None,
    top_k: list[int] | None,
    top_p: list[float] | None,
    seed: list[int] | None,
) -> dict[str, list]:
    """What :meth:`commfuse.ops.Sampling.of` takes besides the number of prompts.

    Raises:
        UsageError: an option is given more than once, but not once for each prompt.
    """

    def each(name: str, given: list | None, default: float) -> list:
        values = given or [default]
        if len(values) not in (1, prompts):
            raise UsageError(
                f"--{name} is given {len(values)} times for {prompts} prompts: once, or once each"
            )
        return values * prompts if len(values) == 1 else values

    seeds = each("seed", seed, 0)
    if len(seed or [0]) == 1:
        seeds = [number + index for index, number in enumerate(seeds)]
    return {
        "temperature": each("temperature", temperature, 0.0),
        "top_k": each("top-k", top_k, 0),
        "top_p": each("top-p", top_p, 1.0),
        "seed": seeds,
    }


def _from_plan(
    path: Path, tp: int | None, pp: int | None, speculate: str, dtype: str | None
) -> tuple[int, int, str, str]:
    """The ranks, stages, drafter and dtype of a plan; what was given beside it comes first.

    Raises:
        UsageError: the plan cannot be read, or asks for what cannot run here.
    """
    from commfuse.models.run_plan import read_run_plan

    plan = read_run_plan(path)
    planned = plan.dtype_for("generate")
    if plan.draft_tokens and speculate == "off":
        speculate = f"ngram:{plan.draft_tokens}"
    return tp or plan.tp, pp or plan.pp, speculate, dtype or planned


def _model_path(model: str, as_json: bool) -> Path:
    if model != "smollm2":
        return Path(model)
    from commfuse.models.smollm2 import ensure_smollm2

    return ensure_smollm2(lambda line: typer.echo(line, err=as_json))


def _check_model(options: _Options) -> None:
    """Finds, before ranks are started, what they would all fail for."""
    from commfuse.models.checkpoint import open_checkpoint
    from commfuse.models.llama import check_parallelism
    from commfuse.models.stages import cut_stages

    with open_checkpoint(_model_path(options.model, options.as_json)) as checkpoint:
        check_parallelism(checkpoint.config, options.tp)
        cut_stages(checkpoint.config, options.pp, options.pp_split)


def _run_rank(options: _Options) -> None:
    import torch
    import torch.distributed as dist

    from commfuse.runtime.launch import join_job, use_gpu
    from commfuse.runtime.mesh import init_mesh

    torch.set_num_threads(options.threads)
    if options.tp * options.pp > 1:
        join_job()
    on_gpu = options.device == "cuda"
    device = use_gpu() if on_gpu else "cpu"
    # On a GPU the choice is the model's: both kinds of exchange go through the GPUs' memory.
    transport = "torch.distributed" if options.backend == "torch" and not on_gpu else "auto"
    try:
        with init_mesh(
            tp=options.tp,
            pp=options.pp,
            device=device,
            links=options.links,
            transport=transport,
        ) as mesh:
            _generate(options, mesh)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _generate(options: _Options, mesh) -> None:
    import torch

    from commfuse.cli.report import Report
    from commfuse.cli.trace import Trace
    from commfuse.generation import Generator, Pipeline
    from commfuse.generation.floors import measure_floors
    from commfuse.models.checkpoint import open_checkpoint
    from commfuse.models.llama import Llama
    from commfuse.models.stage_costs import measure_costs
    from commfuse.models.stages import cut_stages
    from commfuse.ops import Sampling

    with open_checkpoint(_model_path(options.model, options.as_json)) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        if options.chat:
            messages = [[{"role": "user", "content": text}] for text in options.prompts]
            prompts = [tokenizer.encode_chat(chat) for chat in messages]
        else:
            prompts = [tokenizer.encode(text) for text in options.prompts]
        dtype = getattr(torch, options.dtype) if options.dtype else None
        costs = None
        if options.pp > 1 and options.pp_split is None:
            group = -(-len(prompts) // options.pp)
            costs = measure_costs(checkpoint.config, mesh, dtype, group)
        stages = cut_stages(checkpoint.config, options.pp, options.pp_split, costs=costs)
        backend = options.backend if options.device == "cuda" else "auto"
        model = Llama(checkpoint, mesh.tp, dtype, stages[mesh.pp.rank], backend)
    generator = Generator(model, Pipeline(model, mesh.pp))
    shown = mesh.tp.rank == mesh.pp.rank == 0
    stop_ids = () if options.ignore_eos else model.config.eos_token_ids
    quiet = options.as_json or not shown
    report = Report(mesh, model, stages, costs, tokenizer, prompts, quiet)
    trace = None if options.trace is None else Trace(options.trace, mesh)
    with report, trace or contextlib.nullcontext():
        result = generator.generate(
            prompts,
            options.max_new_tokens,
            stop_ids=stop_ids,
            draft_length=options.draft_length,
            sampling=Sampling.of(len(prompts), **options.sampling),
            log_probabilities=options.logprobs,
            on_tokens=report.add,
            on_span=trace.add if trace else None,
        )
    floors = measure_floors(model) if options.floors else None
    if not shown:
        return
    if options.as_json:
        typer.echo(json.dumps(report.as_json(result, floors), ensure_ascii=False))
    else:
        report.print_summary(result.statistics, floors)

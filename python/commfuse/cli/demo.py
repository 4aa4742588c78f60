"""``commfuse demo``: the communication wall, and what commfuse does to it, in one growing table."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Annotated

import typer

from commfuse.errors import CommfuseError, UsageError
from commfuse.runtime.launch import own_command

PASSAGE = (
    "The tide came in slowly that evening, and the boats in the harbour began to lift and turn. "
    "Old Martha sat on the wall with her basket of nets, watching the lamps appear one by one "
    "along the quay. She had mended nets here for forty years, and her mother before her, and she "
    "knew every knot by touch. When the last boat was tied up, she folded the nets, blew out her "
    "own lamp, and walked home along the shore with the sound of the water beside her."
)
PROMPT = f"Repeat the following text exactly, word for word:\n\n{PASSAGE}"


@dataclass(frozen=True)
class _Row:
    """One configuration of the story."""

    name: str
    ranks: int
    arguments: tuple[str, ...]


def _rows(tp: int) -> list[_Row]:
    one = ("--threads", "1")
    return [
        _Row("one process", 1, one),
        _Row(f"TP={tp} gloo", tp, (*one, "--backend", "torch")),
        _Row(f"TP={tp} commfuse", tp, (*one, "--floors")),
        _Row("  with n-grams", tp, (*one, "--speculate", "ngram")),
    ]


def demo(
    tp: Annotated[int, typer.Option(help="Ranks that split each layer.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate in each row.")] = 64,
    link: Annotated[
        str | None, typer.Option(help="Emulated link for the rows with several ranks.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: cuda where our kernels can run]")
    ] = None,
) -> None:
    """Show the communication wall with a real model on this machine, in under a minute.

    On a GPU: a model of Llama 3 8B's shape, against its floor, torch's ops and transformers; takes
    minutes.
    """
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {device}: use cpu or cuda")
    if device == "cuda" or (device is None and link is None and _gpu_can()):
        _on_gpu(tp, max_new_tokens, link)
    else:
        _on_cpu(tp, max_new_tokens, link)


def _gpu_can() -> bool:
    """Whether there is a GPU that our kernels are built for."""
    from commfuse import _extension
    from commfuse.testing.gpu_lab import gpu_count

    return _extension.why_no_cuda() is None and gpu_count() > 0


def _on_gpu(tp: int, max_new_tokens: int, link: str | None) -> None:
    from rich.console import Console

    from commfuse.bench.generate_gpu import run_generate
    from commfuse.cli.ranks import gpu_lab
    from commfuse.models.smollm2 import ensure_smollm2

    if link:
        raise UsageError("--link: links are emulated between ranks on the CPU; add --device cpu")
    console = Console(highlight=False)
    with gpu_lab("cuda") as lab:
        rows = run_generate(sorted({1, tp}), None, None, "bfloat16", None, False, lab)
        console.print(f"\n[bold]Verdict[/]: {gpu_verdict(rows, tp)}", soft_wrap=True)
    ensure_smollm2(typer.echo)
    result = _run(
        _Row("SmolLM2", tp, ("--device", "cuda", "--speculate", "ngram")), max_new_tokens, None
    )
    console.print(f"\n[bold]A text[/] by SmolLM2-135M-Instruct, TP={tp}, with n-grams:")
    console.print(result["outputs"][0]["text"].strip(), style="italic", markup=False)


def gpu_verdict(rows: list[dict], tp: int) -> str:
    """What rows of ``bench generate --device cuda`` say, in words.

    Args:
        rows: of 1 and ``tp`` ranks.
        tp: see above.
    """
    found = {(row["backend"], row["ranks"]): row for row in rows}
    one, several = found["cuda", 1], found["cuda", tp]
    text = (
        f"on one GPU a step of commfuse takes {one['p50_us'] / 1e3:.2f} ms, "
        f"{one['times_floor']:.2f} times what copying its bytes would"
    )
    if ("transformers", 1) in found:
        text += f"; transformers' takes {one['vs_transformers']:.2f} times as long"
    if tp == 1:
        return f"{text}."
    text += (
        f". On {tp} ranks it takes {several['p50_us'] / 1e3:.2f} ms, and with torch's GEMMs and "
        f"all-reduces {several['times_faster_than_torch']:.2f} times as long."
    )
    if several["gpus"] < tp:
        gpus = f"{several['gpus']} GPU{'s' * (several['gpus'] > 1)}"
        text += (
            f" Here {tp} ranks share {gpus} (MPS): that shows what exchanging costs, and not what "
            "more GPUs bring."
        )
    return text


def _on_cpu(tp: int, max_new_tokens: int, link: str | None) -> None:
    from rich.console import Console
    from rich.live import Live

    from commfuse.models.smollm2 import ensure_smollm2

    ensure_smollm2(typer.echo)
    console = Console(highlight=False)
    console.print(
        "[bold]SmolLM2-135M-Instruct[/], bfloat16, one request, one thread a process, "
        f"{max_new_tokens} tokens.\n"
    )
    done: list[tuple[_Row, dict]] = []
    # Off a terminal the table is printed once, whole.
    with Live(_table(done, link), console=console, auto_refresh=False) as live:
        for row in _rows(tp):
            result = _run(row, max_new_tokens, link if row.ranks > 1 else None)
            done.append((row, result))
            live.update(_table(done, link), refresh=console.is_terminal)
    _print_floors(console, done, link)
    console.print("\n[bold]The text[/] (of the last row):")
    console.print(done[-1][1]["outputs"][0]["text"].strip(), style="italic", markup=False)


def _run(row: _Row, max_new_tokens: int, link: str | None) -> dict:
    """The JSON of one ``commfuse generate``."""
    command = own_command(
        "generate", "--model", "smollm2", "--prompt", PROMPT, "--chat", "--ignore-eos",
        "--tp", str(row.ranks), "--max-new-tokens", str(max_new_tokens), "--json", *row.arguments,
        *(("--link", link) if link else ()),
    )  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise CommfuseError(f"{row.name.strip()}: {process.stderr.strip() or 'failed'}")
    return json.loads(process.stdout)


def _table(done: list[tuple[_Row, dict]], link: str | None):
    from rich.table import Table

    title = f"emulated link: {link}" if link else None
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for heading in (
        "tokens\n/s", "of\nideal", "compute\nms/tok", "commun.\nms/tok", "reduces\n/tok",
        "bytes\n/tok", "tokens\n/step",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row, result in done:
        stats = result["stats"]
        rate, ideal = (
            stats["tokens_per_second"],
            row.ranks * done[0][1]["stats"]["tokens_per_second"],
        )
        table.add_row(
            row.name,
            f"{rate:.1f}",
            f"{rate / ideal:.0%}",
            f"{stats['compute_ms_per_token']:.2f}",
            f"{stats['communication_ms_per_token']:.2f}",
            f"{stats['all_reduces_per_token']:.0f}",
            f"{stats['bytes_per_token']:,.0f}",
            f"{stats['accepted_per_step']:.2f}",
        )
    return table


def _print_floors(console, done: list[tuple[_Row, dict]], link: str | None) -> None:
    one, gloo, fused, drafted = (result["stats"] for _, result in done)
    floors = fused["floors"]
    names = {
        "arithmetic": floors["arithmetic_ms"],
        "memory bandwidth": floors["memory_ms"],
        "communication": floors["communication_ms"],
    }
    binding = max(names, key=names.get)
    step = fused["compute_ms_per_token"] + fused["communication_ms_per_token"]
    console.print("\n[bold]Floors[/] of a rank's step, measured here:")
    for name, milliseconds in names.items():
        mark = "  <- binds" if name == binding else ""
        console.print(f"  {name:<17} {milliseconds:6.2f} ms{mark}")
    console.print(
        f"  a step of commfuse takes {step:.2f} ms; {names[binding] / step:.0%} of it is that floor"
    )

    base, ranks = one["tokens_per_second"], fused["tp"]
    wall = gloo["tokens_per_second"] / base
    share = gloo["communication_ms_per_token"] / (
        gloo["communication_ms_per_token"] + gloo["compute_ms_per_token"]
    )
    emulated = f" (over an emulated {link})" if link else ""
    console.print(
        f"\n[bold]Verdict[/]{emulated}: over gloo {ranks} processes run at {wall:.2f} times the "
        f"speed of one, because {share:.0%} of their time is communication: "
        f"{'that is the wall' if wall < 1 else 'no wall on this machine'}. With commfuse they run "
        f"at {fused['tokens_per_second'] / base:.2f} times, with speculation at "
        f"{drafted['tokens_per_second'] / base:.2f} times; what binds now is {binding}.",
        soft_wrap=False,
    )

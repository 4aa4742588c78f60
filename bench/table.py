"""Rows of results for people.

``python -m commfuse.bench.table ROWS.jsonl…`` shows the medians of files of rows, a line a shape.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


def ratio_text(ratio: float | None, reference: str) -> str:
    """A ratio of speeds, marked where it is a loss.

    Example:
        >>> ratio_text(0.5, "torch")
        '[red]0.50x loses[/red]'
    """
    if ratio is None:
        return ""
    if reference == "itself":
        return "1"
    text = f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"
    return f"[red]{text} loses[/red]" if ratio < 1 else text


def _time(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _optional_time(us: float | None) -> str:
    return "" if us is None else _time(us)


def _shape_text(row: dict) -> str:
    """Dimensions and options, as a case prints them."""
    return " ".join(f"+{k}" if v is True else f"{k}={v}" for k, v in row["shape"].items())


def _cells(row: dict) -> dict[str, str]:
    """A row's columns; empty where they have no meaning."""
    reference = "itself" if row["backend"] == "torch" else "torch"
    exposed, rate, fraction = (
        row[name] for name in ("exposed", "streamed_gb_per_s", "fraction_of_read")
    )
    return {
        "shape": _shape_text(row),
        "backend": row["backend"],
        "p20": _time(row["p20_us"]),
        "p50": _time(row["p50_us"]),
        "p80": _time(row["p80_us"]),
        "floor": _optional_time(row.get("floor_us")),
        "dispatch": _optional_time(row.get("dispatch_us")),
        "to torch": ratio_text(row["times_faster_than_torch"], reference),
        "exposed": _loss_text(exposed),
        "GB/s": "" if rate is None else f"{rate:.1f}",
        "of read": "" if fraction is None else f"{fraction:.0%}",
        "exposed, own": _loss_text(row.get("exposed_own")),
        "of baseline": _loss_text(row.get("of_baseline")),
        "of GEMMs": "" if row.get("of_gemms") is None else f"{row['of_gemms']:.2f}",
    }


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    return Console(highlight=False, width=None if Console().is_terminal else 180)


def show_rows(rows: Iterable[dict], as_json: bool, quiet: bool) -> None:
    """Takes rows as they are measured, which all ranks must do, and prints them: each at once as a
    JSON object of its own, or all as a table in the end.

    Args:
        rows: of one op.
        as_json: the former.
        quiet: print nothing; every rank but one.
    """
    measured = []
    for row in rows:
        measured.append(row)
        if as_json and not quiet:
            print(json.dumps(row), flush=True)
    if not as_json and not quiet:
        print_table(measured)


def print_table(rows: list[dict]) -> None:
    """Prints the rows of one op; a line above says what holds for all of them."""
    first = rows[0]
    table = Table(
        title=(
            f"{first['op']} {first['dtype']}, {_place(first)}, {first['transport']}; "
            "us per call, slowest rank"
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    cells = [_cells(row) for row in rows]
    columns = [name for name in cells[0] if any(cell[name] for cell in cells)]
    for name in columns:
        left = name in ("shape", "backend")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    previous = None
    for cell in cells:
        repeated = cell["shape"] == previous
        if previous is not None and not repeated:
            table.add_section()
        previous = cell["shape"]
        table.add_row(*("" if n == "shape" and repeated else cell[n] for n in columns))
    output = console()
    output.print(table)
    print_provenance(first, output)


def _place(row: dict) -> str:
    if row["device"] == "cuda":
        return f"{row['gpu']}, {row['setting']}"
    emulated = f", emulated link {row['emulated']}" if row["emulated"] else ""
    return f"{row['ranks']} ranks on {row['cores']} cores{emulated}"


def print_provenance(row: dict, output: Console) -> None:
    """The machine and the versions, on one line."""
    if row["device"] == "cuda":
        output.print(
            f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}, torch {row['torch']}, "
            f"triton {row['triton']}, {row['date_utc']}"
        )
        return
    output.print(
        f"{row['cpu_model']} ({row['cpu_isa']}), torch {row['torch']}, "
        f"load {row['load_average_1min']:.1f}, {row['date_utc']}"
    )


def _loss_text(ratio: float | None) -> str:
    """A ratio of times, marked where it is a loss."""
    if ratio is None:
        return ""
    return f"[red]{ratio:.2f} loses[/red]" if ratio > 1 else f"{ratio:.2f}"


def print_generate_table(rows: list[dict]) -> None:
    """Prints the rows of ``bench generate``."""
    first = rows[0]
    emulated = next((f", emulated link {r['emulated']}" for r in rows if r["emulated"]), "")
    table = Table(
        title=(
            f"decoding, batch 1, greedy, {first['dtype']}, {first['cores']} cores{emulated}; "
            "HF: transformers' best"
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("configuration", "task"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "accepted", "gain", "to HF", "to tp1_1t", "of floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("MB/rank", justify="right", no_wrap=True)
    for row in rows:
        fraction, memory = row.get("of_floor"), row.get("memory_pss_bytes")
        accepted = row["accepted_per_step"]
        table.add_row(
            row["configuration"],
            row["task"],
            f"{row['tokens_per_second']:.1f}",
            "" if accepted is None or row["speculate"] == "off" else f"{accepted:.2f}",
            ratio_text(row["speculation_gain"], "plain decoding"),
            ratio_text(row["vs_transformers"], "transformers"),
            "1"
            if row["configuration"] == "tp1_1t"
            else ratio_text(row["vs_tp1_one_thread"], "tp1_1t"),
            "" if fraction is None else f"{fraction:.0%}",
            "" if memory is None else f"{memory / 1e6:.0f}",
        )
    output = console()
    output.print(table)
    print_provenance(first, output)


def print_gpu_generate_table(rows: list[dict]) -> None:
    """Prints the rows of ``bench generate --device cuda``."""
    first, shape = rows[0], rows[0]["shape"]
    table = Table(
        title=(
            f"decoding, {first['model']} with made-up weights, {first['dtype']}, batch 1, greedy, "
            f"{shape['prompt_tokens']} + {shape['new_tokens']} tokens"
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("backend", no_wrap=True)
    for name in ("ranks", "ms a step", "floor", "times floor", "to torch", "to HF", "TTFT ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        floor = row["floor_us"]
        table.add_row(
            row["backend"],
            str(row["ranks"]),
            f"{row['p50_us'] / 1e3:.2f}",
            "" if floor is None else f"{floor / 1e3:.2f}",
            "" if floor is None else f"{row['times_floor']:.2f}",
            ratio_text(row["times_faster_than_torch"], "torch"),
            ratio_text(row["vs_transformers"], "transformers"),
            f"{row['ttft_ms']:.1f}",
        )
    output = console()
    output.print(table)
    print_provenance(first, output)


def read_rows(paths: Iterable[str | Path]) -> list[dict]:
    """The rows in files of JSON lines, in order."""
    lines = (line for path in paths for line in Path(path).read_text().splitlines())
    return [json.loads(line) for line in lines if line.strip()]


def print_summary(rows: list[dict]) -> None:
    """Prints the medians of ops' rows: a table for each op and number of ranks, a line a shape."""

    output = console()
    for (op, dtype, place), group in groupby(rows, lambda r: (r["op"], r["dtype"], _place(r))):
        measured = list(group)
        names = list(dict.fromkeys(row["backend"] for row in measured))
        ours = next((name for name in ("cuda", "cpu") if name in names), names[0])
        output.print(f"{op} {dtype}, {place}; median us per call, slowest rank; ratios of {ours}")
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("shape", no_wrap=True)
        titles = {"exposed": "exposed", "exposed_own": "own", "of_baseline": "of baseline"}
        ratios = {
            key: title
            for key, title in titles.items()
            if any(row.get(key) is not None for row in measured if row["backend"] == ours)
        }
        for name in (*names, *ratios.values()):
            head = name.replace("+", "\n+").replace("_", "\n_", name.count("_") > 1)
            table.add_column(head, justify="right", no_wrap=True)
        for text in dict.fromkeys(map(_shape_text, measured)):
            found = {row["backend"]: row for row in measured if _shape_text(row) == text}
            own = found.get(ours, {})
            table.add_row(
                text,
                *(_time(found[name]["p50_us"]) if name in found else "" for name in names),
                *(_loss_text(own.get(key)) for key in ratios),
            )
        output.print(table)
    if rows:
        print_provenance(rows[-1], output)


if __name__ == "__main__":
    print_summary(read_rows(sys.argv[1:]))

"""Rows of results for people."""

from __future__ import annotations

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


def _cells(row: dict) -> dict[str, str]:
    """A row's columns; empty where they have no meaning."""
    reference = "itself" if row["backend"] == "torch" else "torch"
    exposed, rate, fraction = (
        row[name] for name in ("exposed", "streamed_gb_per_s", "fraction_of_read")
    )
    return {
        "shape": " ".join(f"{key}={value}" for key, value in row["shape"].items()),
        "backend": row["backend"],
        "p20": _time(row["p20_us"]),
        "p50": _time(row["p50_us"]),
        "p80": _time(row["p80_us"]),
        "to torch": ratio_text(row["times_faster_than_torch"], reference),
        "exposed": "" if exposed is None else _exposed_text(exposed),
        "GB/s": "" if rate is None else f"{rate:.1f}",
        "of read": "" if fraction is None else f"{fraction:.0%}",
    }


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    return Console(highlight=False, width=None if Console().is_terminal else 140)


def print_table(rows: list[dict]) -> None:
    """Prints the rows of one op; a line above says what holds for all of them."""
    first = rows[0]
    emulated = f", emulated link {first['emulated']}" if first["emulated"] else ""
    table = Table(
        title=(
            f"{first['op']} {first['dtype']}, {first['ranks']} ranks on {first['cores']} cores, "
            f"{first['transport']}{emulated}; us per call, slowest rank"
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


def print_provenance(row: dict, output: Console) -> None:
    """The machine and the versions, on one line."""
    output.print(
        f"{row['cpu_model']} ({row['cpu_isa']}), torch {row['torch']}, "
        f"load {row['load_average_1min']:.1f}, {row['date_utc']}"
    )


def _exposed_text(exposed: float) -> str:
    return f"[red]{exposed:.2f} loses[/red]" if exposed > 1 else f"{exposed:.2f}"


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

"""Rows of results for people."""

from __future__ import annotations

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
    )
    table.add_column("shape")
    table.add_column("backend")
    columns = ("p20", "p50", "p80", "to torch", "exposed", "GB/s", "of read")
    for name in columns:
        table.add_column(name, justify="right")
    shape = None
    for row in rows:
        if shape is not None and row["shape"] != shape:
            table.add_section()
        label = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        table.add_row(
            "" if row["shape"] == shape else label,
            row["backend"],
            *(f"{row[key]:.1f}" for key in ("p20_us", "p50_us", "p80_us")),
            ratio_text(
                row["times_faster_than_torch"], "itself" if row["backend"] == "torch" else "torch"
            ),
            "" if row["exposed"] is None else _exposed_text(row["exposed"]),
            "" if row["streamed_gb_per_s"] is None else f"{row['streamed_gb_per_s']:.1f}",
            "" if row["fraction_of_read"] is None else f"{row['fraction_of_read']:.0%}",
        )
        shape = row["shape"]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{first['cpu_model']} ({first['cpu_isa']}), torch {first['torch']}, "
        f"load {first['load_average_1min']:.1f}, {first['date_utc']}"
    )


def _exposed_text(exposed: float) -> str:
    return f"[red]{exposed:.2f} loses[/red]" if exposed > 1 else f"{exposed:.2f}"

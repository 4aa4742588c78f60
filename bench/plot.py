"""Draws rows of results: ``python -m commfuse.bench.plot ROWS.jsonl… --out DIR``.

For each op on GPUs and number of ranks a PNG: ``latency_OP_wW.png``, time over message size by
backend, and ``exposed_OP_wW.png``, what stays visible of the communication over the rows. Of
``commfuse bench wall``, ``wall.png``. Needs matplotlib (the extra ``plot``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from commfuse.bench.table import read_rows
from commfuse.errors import UsageError

# Ours first; what else there is takes the further colours in order of appearance.
COLOURS = {
    "auto": "black",
    "cuda": "tab:blue",
    "cuda_in_place": "tab:cyan",
    "triton": "tab:purple",
    "torch": "tab:red",
    "torch_one_shot": "tab:orange",
    "torch_two_shot": "tab:brown",
    "nccl": "tab:green",
}
FUSED = ("auto", "cuda", "triton")


def place(row: dict) -> str:
    """Device, setting and date, as they stand in every title.

    Example:
        >>> place({"gpu": "H100", "setting": "one GPU, 2 ranks", "date_utc": "2026-11-24T03:45:00"})
        'H100, one GPU, 2 ranks, 2026-11-24'
    """
    return f"{row['gpu']}, {row['setting']}, {row['date_utc'][:10]}"


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Draws all that rows allow.

    Args:
        rows: of ops on GPUs, and of the wall; others are left out.
        folder: where the files go; made where it is missing.

    Returns:
        The files.

    Raises:
        UsageError: matplotlib is missing, or there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(f"plots need matplotlib ({error}): pip install 'commfuse[plot]'") from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def key(row: dict) -> tuple[str, int, str]:
        return row["op"], row["ranks"], row["setting"]

    if wall := [row for row in rows if row.get("op") == "wall"]:
        found.append(_draw_wall(wall, folder / "wall.png"))
    measured = sorted((row for row in rows if row.get("device") == "cuda"), key=key)
    for (op, ranks, _), group in groupby(measured, key):
        same = list(group)
        if any(row["streamed_bytes"] for row in same):
            found += _draw_exposed(same, folder / f"exposed_{op}_w{ranks}.png")
        elif len({row["bytes"] for row in same}) > 1:
            found.append(_draw_latency(same, folder / f"latency_{op}_w{ranks}.png"))
    if not found:
        raise UsageError(
            "there is nothing to draw: no rows of several sizes, measured on GPUs, nor of the wall"
        )
    return found


def _lines(rows: Sequence[dict], x: str, y: str) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """(backend, its x, its y), in order of x; ``x`` is a field or a dimension."""
    for backend in dict.fromkeys(row["backend"] for row in rows):
        points = sorted(
            (row[x] if x in row else row["shape"][x], row[y])
            for row in rows
            if row["backend"] == backend and row[y] is not None
        )
        if points:
            yield backend, [point[0] for point in points], [point[1] for point in points]


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw_latency(rows: Sequence[dict], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for backend, sizes, times in _lines(rows, "bytes", "p50_us"):
        axes.plot(sizes, times, marker="o", label=backend, color=COLOURS.get(backend))
    sizes = sorted({row["bytes"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [_bytes(size) for size in sizes])
    axes.set_xlabel("message of each rank")
    axes.set_ylabel("microseconds a call, median, slowest rank")
    axes.set_title(f"{rows[0]['op']} {rows[0]['dtype']}: {place(rows[0])}")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _draw_exposed(rows: Sequence[dict], path: Path) -> list[Path]:
    """A field of the figure for each size of the layer, with its tail or without."""
    import matplotlib.pyplot as plt

    def layer(row: dict) -> tuple:
        return tuple(sorted((k, v) for k, v in row["shape"].items() if k != "m"))

    fused = [row for row in rows if row["backend"] in FUSED and row["exposed"] is not None]
    layers = list(dict.fromkeys(map(layer, fused)))
    if not layers:
        return []
    figure, fields = plt.subplots(
        1, len(layers), figsize=(4.5 * len(layers), 4.5), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for axes, size in zip(fields[0], layers, strict=True):
        same = [row for row in fused if layer(row) == size]
        for field, style in (("exposed", "-"), ("exposed_own", ":")):
            against = "cuBLAS, torch's sum" if field == "exposed" else "our GEMM, our sum"
            for backend, m, exposed in _lines(same, "m", field):
                axes.plot(
                    m, exposed, style, marker="o", color=COLOURS[backend],
                    label=f"{backend}, against {against}",
                )  # fmt: skip
        rows_of_x = sorted({row["shape"]["m"] for row in same})
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows_of_x, [str(m) for m in rows_of_x])
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("rows")
        axes.set_title(_layer_text(same[0]["shape"]))
        axes.grid(alpha=0.3)
    fields[0][0].set_ylabel("exposed communication (0: hidden, 1: no gain)")
    fields[0][-1].legend(fontsize="small")
    figure.suptitle(f"{rows[0]['op']} {rows[0]['dtype']}: {place(rows[0])}")
    return [_save(figure, path)]


def _draw_wall(rows: Sequence[dict], path: Path) -> Path:
    """A bar for each layout with our sums, cut into where its time goes."""
    import matplotlib.pyplot as plt

    parts = {
        "compute": ("computing (emulated)", "tab:blue"),
        "all_reduce": ("sums over ranks", "tab:red"),
        "send_recv": ("messages between stages", "tab:orange"),
        "idle": ("waiting for other stages", "lightgrey"),
    }
    ours = [row for row in rows if row["backend"] == "commfuse"]
    names = [row["layout"] for row in ours]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    left = [0.0] * len(ours)
    for part, (label, colour) in parts.items():
        widths = [row[f"{part}_ms"] for row in ours]
        axes.barh(names, widths, left=left, label=label, color=colour)
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    for name, end, row in zip(names, left, ours, strict=True):
        axes.text(end, name, f" {row['times_one_device']:.2g} x one device", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.35)
    axes.set_xlabel("milliseconds of the emulated devices")
    first = rows[0]
    axes.set_title(
        f"Emulated: {first['layers']} layers of {first['model']}, {first['passes']} passes of "
        f"{first['tokens']} tokens, {first['hardware']}\n{first['inside']} inside hosts, "
        f"{first['across']} across; {first['date_utc'][:10]}",
        fontsize="medium",
    )
    axes.legend()
    return _save(figure, path)


def _layer_text(shape: dict) -> str:
    options = [name for name, value in shape.items() if value is True]
    return ", ".join([f"{shape['k']} to {shape['n']} a rank", *(f"+{name}" for name in options)])


def _bytes(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size / 1024:g} KB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m commfuse.bench.plot", description=__doc__)
    parser.add_argument("rows", nargs="+", help="files of rows (JSON lines)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNGs")
    arguments = parser.parse_args()
    for path in draw(read_rows(arguments.rows), arguments.out):
        print(path)


if __name__ == "__main__":
    main()

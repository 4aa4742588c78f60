"""Charts as SVG, drawn here so that a page needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 44


@dataclass(frozen=True)
class Dot:
    """A point of a curve: where it is, what is written when pointed at, whether it stands out."""

    x: float
    y: float
    title: str
    marked: bool = False


def _ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``most``."""
    raw = most / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= raw)
    return [step * n for n in range(math.ceil(most / step) + 1)]


def curve(
    dots: Sequence[Dot],
    x_name: str,
    y_name: str,
    label: str,
    ideal: bool = False,
    line: bool = True,
) -> str:
    """A curve from the origin of both axes.

    Args:
        dots: ascending in x.
        x_name, y_name: of the axes.
        label: for those who do not see it.
        ideal: whether to draw the line on which y grows as x does from the first dot.
        line: whether the dots are joined.
    """
    x_ticks, y_ticks = _ticks(max(d.x for d in dots)), _ticks(max(d.y for d in dots))

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / x_ticks[-1] * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - y / y_ticks[-1] * (HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(at, x_ticks, y_ticks, x_name, y_name)]
    if ideal:
        slope = dots[0].y / dots[0].x
        end = min(x_ticks[-1], y_ticks[-1] / slope)
        (x0, y0), (x1, y1) = at(dots[0].x, dots[0].y), at(end, end * slope)
        parts.append(
            f'<line class="ideal" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'
        )
    points = " ".join("{:.1f},{:.1f}".format(*at(d.x, d.y)) for d in dots)
    if line:
        parts.append(f'<polyline class="curve" points="{points}"/>')
    for dot in dots:
        x, y = at(dot.x, dot.y)
        kind, radius = ("dot marked", 7) if dot.marked else ("dot", 4)
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
    return _svg(parts, HEIGHT, label)


def _axes(at, x_ticks: list[float], y_ticks: list[float], x_name: str, y_name: str) -> str:
    left, bottom = at(0, 0)
    right, top = at(x_ticks[-1], y_ticks[-1])
    parts = []
    for tick in y_ticks:
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{left - 8}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        x = at(tick, 0)[0]
        parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 18}">{tick:g}</text>')
    parts.append(f'<text class="x name" x="{(left + right) / 2}" y="{bottom + 36}">{x_name}</text>')
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="x name" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(y_name)}</text>"
    )
    return "".join(parts)


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: str, label: str
) -> str:
    """Horizontal bars, a row for each.

    Args:
        bars: (name, parts) of each; a part is (kind, value). A kind's colour is that of the CSS
            class ``part-KIND``.
        unit: of the values.
        label: for those who do not see it.
    """
    row, left = 34, 190
    most = max(sum(value for _, value in parts) for _, parts in bars)
    scale = (WIDTH - left - 90) / most
    drawn = []
    for number, (name, parts) in enumerate(bars):
        y, x = number * row + 6, float(left)
        drawn.append(f'<text class="y" x="{left - 10}" y="{y + 15}">{escape(name)}</text>')
        for kind, value in parts:
            if value <= 0:
                continue
            title = f"{escape(kind.replace('_', '-'))}: {value:.3g} {unit}"
            drawn.append(
                f'<rect class="part-{kind}" x="{x:.2f}" y="{y}" width="{value * scale:.2f}" '
                f'height="22"><title>{title}</title></rect>'
            )
            x += value * scale
        total = sum(value for _, value in parts)
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{total:.3g} {unit}</text>')
    return _svg(drawn, row * len(bars) + 8, label)


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )

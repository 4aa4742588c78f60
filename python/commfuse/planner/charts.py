"""Charts as SVG, drawn here so that a page needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from commfuse.planner.uncertainty import Range

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 44


@dataclass(frozen=True)
class Dot:
    """A point of a curve.

    Attributes:
        x, y: where it is, and between what it lies.
        title: what is written when pointed at.
        marked: whether it stands out.
    """

    x: Range
    y: Range
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
) -> str:
    """A curve from the origin of both axes, in a band as wide as its error.

    Args:
        dots: ascending in x.
        x_name, y_name: of the axes.
        label: for those who do not see it.
        ideal: whether to draw the line on which y grows as x does from the first dot.
    """
    x_ticks, y_ticks = _ticks(max(d.x.value for d in dots)), _ticks(max(d.y.high for d in dots))

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / x_ticks[-1] * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - y / y_ticks[-1] * (HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(at, x_ticks, y_ticks, x_name, y_name)]
    edge = [at(d.x.value, d.y.high) for d in dots]
    edge += [at(d.x.value, d.y.low) for d in reversed(dots)]
    parts.append(f'<polygon class="band" points="{_points(edge)}"/>')
    if ideal:
        x, y = dots[0].x.value, dots[0].y.value
        slope = y / x
        end = min(x_ticks[-1], y_ticks[-1] / slope)
        (x0, y0), (x1, y1) = at(x, y), at(end, end * slope)
        parts.append(
            f'<line class="ideal" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'
        )
    line = _points([at(d.x.value, d.y.value) for d in dots])
    parts.append(f'<polyline class="curve" points="{line}"/>')
    for dot in dots:
        x, y = at(dot.x.value, dot.y.value)
        (left, low), (right, high) = at(dot.x.low, dot.y.low), at(dot.x.high, dot.y.high)
        right = min(right, WIDTH - 1.0)
        parts.append(
            f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}'
            f'M{left:.1f} {y:.1f}H{right:.1f}"/>'
        )
        kind, radius = ("dot marked", 7) if dot.marked else ("dot", 4)
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
    return _svg(parts, HEIGHT, label)


def _points(found: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in found)


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
    bars: Sequence[tuple[str, Range, Sequence[tuple[str, float]]]], unit: str, label: str
) -> str:
    """Horizontal bars, a row for each, with a whisker for the error of the sum.

    Args:
        bars: (name, sum, parts) of each; a part is (kind, value). A kind's colour is that of the
            CSS class ``part-KIND``.
        unit: of the values.
        label: for those who do not see it.
    """
    row, left = 34, 150
    most = max(total.high for _, total, _ in bars)
    scale = (WIDTH - left - 150) / most
    drawn = []
    for number, (name, total, parts) in enumerate(bars):
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
        low, high = left + total.low * scale, left + total.high * scale
        drawn.append(f'<path class="whisker" d="M{low:.1f} {y + 11}H{high:.1f}"/>')
        drawn.append(f'<text x="{high + 8:.1f}" y="{y + 15}">{total} {unit}</text>')
    return _svg(drawn, row * len(bars) + 8, label)


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )

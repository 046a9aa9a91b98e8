"""A metric against the scale as an inline SVG: a line per method, whiskers for the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from coz.tables import Cell

PALETTE = ("#e4572e", "#4361ee", "#29a19c", "#f3a712", "#9b5de5", "#6b705c", "#d62276", "#0a9396")
Place = Callable[[float], float]
_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


def color_of(index: int) -> str:
    """The color of the method at a place in the list."""
    return PALETTE[index % len(PALETTE)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that lie in a range, about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_curves(label: str, cells: Mapping[tuple[float, str], Cell], methods: Sequence[str]) -> str:
    """The SVG of one metric.

    Args:
        cells: (scale, method) → mean and interval.
        methods: in the order of their colors.
    """
    scales = sorted({scale for scale, _ in cells})
    edges = [edge for cell in cells.values() for edge in (cell.mean, cell.low, cell.high) if math.isfinite(edge)]
    low, high = min(edges), max(edges)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin

    def x_of(scale: float) -> float:
        first, last = math.log2(scales[0]), math.log2(scales[-1])
        share = (math.log2(scale) - first) / (last - first) if last > first else 0.5
        return _LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20)

    def y_of(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = _axes(scales, ticks(low, high), x_of, y_of)
    for index, method in enumerate(methods):
        points = [(x_of(scale), cells[scale, method]) for scale in scales if (scale, method) in cells]
        parts.append(_line(points, method, color_of(index), y_of, shift=1.5 * (index - (len(methods) - 1) / 2)))
    name = escape(f"{label} against the scale", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _axes(scales: Sequence[float], values: Sequence[float], x_of: Place, y_of: Place) -> list[str]:
    parts = []
    for value in values:
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for scale in scales:
        parts.append(f'<text x="{x_of(scale):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{scale:g}×</text>')
    return parts


def _line(points: Sequence[tuple[float, Cell]], method: str, color: str, y_of: Place, *, shift: float) -> str:
    """Line, whiskers and dots; `shift` keeps the whiskers of several methods apart, in px."""
    path = " ".join(f"{x + shift:.1f},{y_of(cell.mean):.1f}" for x, cell in points)
    parts = [f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>']
    for x, cell in points:
        at = x + shift
        if math.isfinite(cell.low):
            y_low, y_high = y_of(cell.low), y_of(cell.high)
            parts.append(f'<line stroke="{color}" x1="{at:.1f}" x2="{at:.1f}" y1="{y_low:.1f}" y2="{y_high:.1f}"/>')
        told = escape(f"{method}: {cell.mean:.4f} [{cell.low:.4f}, {cell.high:.4f}]")
        parts.append(f'<circle fill="{color}" cx="{at:.1f}" cy="{y_of(cell.mean):.1f}" r="3.5"><title>{told}</title></circle>')
    return "".join(parts)

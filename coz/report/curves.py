"""A metric against the scale as an inline SVG: a line per method, whiskers for the intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from coz.tables import Cell

PALETTE = ("#e4572e", "#4361ee", "#29a19c", "#f3a712", "#9b5de5", "#6b705c", "#d62276", "#0a9396")
_WIDTH, _LEFT, _RIGHT, _TOP = 360, 52, 12, 12


@dataclass(frozen=True)
class Frame:
    """A small SVG with values upwards and anything sideways.

    Args:
        low, high: values at its lower and upper edge.
        height, bottom: of the drawing, and of the room below the values, in px.
        inset: room left and right of the outermost points.
        mark_above: how far the marks stand above the lower edge of the drawing.
    """

    low: float
    high: float
    height: int = 240
    bottom: int = 34
    inset: int = 10
    mark_above: int = 14

    def x_of(self, share: float) -> float:
        """Where a share of the width lies, 0 to 1."""
        return _LEFT + self.inset + share * (_WIDTH - _LEFT - _RIGHT - 2 * self.inset)

    def y_of(self, value: float) -> float:
        """Where a value lies."""
        return _TOP + (self.high - value) / (self.high - self.low) * (self.height - _TOP - self.bottom)

    def grid(self) -> list[str]:
        """A line and a number for each round value."""
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y_of(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        return parts

    def mark(self, x: float, text: str) -> str:
        """A text below the values."""
        return f'<text x="{x:.1f}" y="{self.height - self.mark_above}" text-anchor="middle">{text}</text>'

    def svg(self, label: str, parts: Sequence[str]) -> str:
        """The whole drawing; `label` is read out."""
        name = escape(label, quote=True)
        return f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def polyline(points: Sequence[tuple[float, float]], color: str) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>'


def dot(x: float, y: float, color: str, told: str, *, radius: float) -> str:
    """A point that says something under the mouse."""
    return f'<circle fill="{color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(told)}</title></circle>'


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
    frame = Frame(low - margin, high + margin)

    def x_of(scale: float) -> float:
        first, last = math.log2(scales[0]), math.log2(scales[-1])
        return frame.x_of((math.log2(scale) - first) / (last - first) if last > first else 0.5)

    parts = [*frame.grid(), *(frame.mark(x_of(scale), f"{scale:g}×") for scale in scales)]
    for index, method in enumerate(methods):
        points = [(x_of(scale), cells[scale, method]) for scale in scales if (scale, method) in cells]
        parts.append(_line(points, method, color_of(index), frame, shift=1.5 * (index - (len(methods) - 1) / 2)))
    return frame.svg(f"{label} against the scale", parts)


def _line(points: Sequence[tuple[float, Cell]], method: str, color: str, frame: Frame, *, shift: float) -> str:
    """Line, whiskers and dots; `shift` keeps the whiskers of several methods apart, in px."""
    parts = [polyline([(x + shift, frame.y_of(cell.mean)) for x, cell in points], color)]
    for x, cell in points:
        at = x + shift
        if math.isfinite(cell.low):
            y_low, y_high = frame.y_of(cell.low), frame.y_of(cell.high)
            parts.append(f'<line stroke="{color}" x1="{at:.1f}" x2="{at:.1f}" y1="{y_low:.1f}" y2="{y_high:.1f}"/>')
        told = f"{method}: {cell.mean:.4f} [{cell.low:.4f}, {cell.high:.4f}]"
        parts.append(dot(at, frame.y_of(cell.mean), color, told, radius=3.5))
    return "".join(parts)

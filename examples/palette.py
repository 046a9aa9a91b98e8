"""A prompt extractor: names a view's average colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coz.prompters.base import Prompt

COLORS = {
    "red": (0.8, 0.2, 0.2),
    "green": (0.2, 0.6, 0.2),
    "blue": (0.2, 0.3, 0.8),
    "yellow": (0.9, 0.8, 0.2),
    "brown": (0.5, 0.35, 0.2),
    "black": (0.05, 0.05, 0.05),
    "grey": (0.5, 0.5, 0.5),
    "white": (0.95, 0.95, 0.95),
}


def nearest_color(rgb: Sequence[float]) -> str:
    """The name of the nearest colour to red, green, blue in [0, 1]."""
    return min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, COLORS[name], strict=True)))


class Palette:
    """Follows `coz.prompters.base.Prompter`."""

    def __init__(self, *, before: str = "") -> None:
        self._before = before

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"name": "palette", "weights": None, "before": self._before}

    def load(self) -> None:
        """Nothing to read."""

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[str]:
        """One prompt per view; `context` is the state that the views were cut from."""
        return [Prompt(f"{self._before} {nearest_color(view.mean((1, 2)).tolist())}".strip()) for view in current]

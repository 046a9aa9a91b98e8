"""A critic: full marks for a text that names the view's average colour, half for one that names none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coz.critics.base import Pair, Score, Tally, check_pairs
from examples.palette import COLORS, nearest_color


class ColorCritic:
    """Follows `coz.critics.base.Critic`. Plain attributes only: it is pickled for several processes."""

    def __init__(self) -> None:
        self.tally = Tally()

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"name": "color", "weights": None}

    def load(self) -> None:
        """Nothing to read."""

    def __call__(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """A score in [0, 1] per text; None would be a failure, counted and never taken for 0."""
        check_pairs(pairs, texts)
        scores: list[Score] = [self._score(pair, text) for pair, text in zip(pairs, texts, strict=True)]
        self.tally.count(scores)
        return scores

    def _score(self, pair: Pair, text: str) -> float:
        _, view = pair
        named = [name for name in COLORS if name in text.lower().split()]
        mean = np.asarray(view.convert("RGB")).reshape(-1, 3).mean(0) / 255
        return 0.5 if not named else float(nearest_color(mean.tolist()) in named)

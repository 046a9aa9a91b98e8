"""A reward: minus the share of words beyond a limit."""

from __future__ import annotations

from collections.abc import Sequence

from coz.errors import UserError
from coz.rewards import Completion, text_of


class Brevity:
    """0 up to `words` words, then falling to -1. TRL multiplies it by `weight`."""

    def __init__(self, *, words: int = 12, weight: float = 0.5) -> None:
        if words < 1:
            raise UserError(f"reward.brevity.words={words} must be at least 1")
        self.__name__ = "brevity"  # its column in rewards.csv
        self.words, self.weight = words, weight

    def __call__(self, *, completions: Sequence[Completion], **_: object) -> list[float]:
        """One value per completion. Images come as `images=`, a data set's other columns by their names."""
        lengths = [len(text_of(completion).split()) for completion in completions]
        return [0.0 - max(0, length - self.words) / max(1, length) for length in lengths]

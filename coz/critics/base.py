"""The one contract of every critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

Pair = Sequence[Image.Image]
Score = float | None


@dataclass
class Tally:
    """How often a critic was asked and how often it gave no usable score. A failure is counted, never scored 0."""

    asked: int = 0
    failed: int = 0

    def count(self, scores: Sequence[Score]) -> None:
        """Add a call's scores."""
        self.asked += len(scores)
        self.failed += sum(score is None for score in scores)


@runtime_checkable
class Critic(Protocol):
    """Rates texts. A plain callable, not an `nn.Module`: TRL takes a module for a sequence classifier.

    Construction is cheap, `load()` reads the weights (see `backbones.base`). A critic can be pickled.
    """

    tally: Tally

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """JSON-able identity of everything that shapes the scores. Needs no weights."""
        ...

    def load(self) -> None:
        """Read the weights now; called again, does nothing."""
        ...

    def __call__(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """One score per text.

        Args:
            pairs: (context, current): the previous state and the view inside it, 8-bit images.
            texts: what is said about the second image of each pair.

        Returns:
            The paper's 0–100 divided by 100, or None where the critic gave no score; counted in `tally`.
        """
        ...


def check_pairs(pairs: Sequence[Pair], texts: Sequence[str]) -> None:
    """Raise a `ValueError` unless there is one pair of two images per text."""
    if len(pairs) != len(texts):
        raise ValueError(f"{len(pairs)} pairs but {len(texts)} texts; give one each")
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"a critic sees pairs (context, current), and one has {len(pair)} images")

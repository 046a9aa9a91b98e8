"""Words that a person typed, in the place of a prompter's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from coz.prompters.base import Prompt


@dataclass(frozen=True)
class TypedPrompter:
    """Says the same text of every view."""

    text: str

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"name": "typed", "weights": None, "text": self.text}

    def load(self) -> None:
        """Nothing to read."""

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[str]:
        return [Prompt(self.text)] * len(current)

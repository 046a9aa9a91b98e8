"""The one contract of every prompt extractor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class Prompt(str):
    """A prompt as the backbone gets it, with the model's own words (`raw`) where they were cleaned."""

    raw: str

    def __new__(cls, text: str, raw: str | None = None) -> Prompt:
        self = super().__new__(cls, text)
        self.raw = text if raw is None else raw
        return self


@runtime_checkable
class Prompter(Protocol):
    """Says in words what a view shows. Construction is cheap, `load()` reads the weights (see `backbones.base`).

    Two attributes may be left out: `reads_images` (False: it looks at no picture), and `beside_backbone` (False: a call now
    may not run in a thread while the backbone works, because it reads weights or moves them to the backbone's GPU).
    """

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """JSON-able identity of everything that shapes the prompts. Needs no weights."""
        ...

    def load(self) -> None:
        """Read the weights now; called again, does nothing."""
        ...

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[str]:
        """One prompt per image.

        Args:
            current: (B, 3, S, S) in [0, 1], the view that the step will restore, enlarged to the state's size.
            context: (B, 3, S, S), the previous state, inside which that view lies; None where there is none.
            seeds: one per image, for models that sample.
        """
        ...

"""The one contract of every backbone, so that `direct` and the chain use them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from coz.image import Size


@runtime_checkable
class Backbone(Protocol):
    """Enlarges (or restores) a view to any target size.

    A constructor is cheap: it checks its settings, finds its weights and raises a `UserError` if it cannot run; weights
    are read at `load()`, which the first call does by itself. So a run whose states are all stored loads nothing.

    What a model needs besides the image (a pre-resize, tag embeddings, a degradation estimate) stays inside it:
    an interpolation interpolates; a 4x net first resizes to a quarter of the target; a one-step diffusion model resizes
    to the target and restores; an implicit function queries the target.
    """

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts change the output. Prompts are recorded in any case."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """JSON-able identity of everything that shapes the output: class, weights' digest, settings. Needs no weights."""
        ...

    def load(self) -> None:
        """Read the weights now; called again, does nothing."""
        ...

    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Bring a batch of views to `size`.

        Args:
            lr: (B, 3, h, w) in [0, 1], any h and w.
            size: the target, a side or (height, width) in pixels.
            prompts: one text per image, or None for empty ones.
            seeds: one per image, or None for 0 each; equal seeds give equal images whatever the batch.

        Returns:
            (B, 3, *size), float32 in [0, 1], on the CPU.
        """
        ...

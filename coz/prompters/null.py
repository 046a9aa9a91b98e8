"""The empty prompt: "CoZ (Null)" in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class NullPrompter:
    """Says nothing about any view."""

    reads_images = False  # spares the enlargement of what it would not look at

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"name": "null", "weights": None}

    def load(self) -> None:
        """Nothing to read."""

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[str]:
        return [""] * len(current)

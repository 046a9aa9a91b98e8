"""A backbone: bicubic interpolation and an unsharp mask, stronger where the prompt says "sharp"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coz.errors import UserError
from coz.image import Size, as_size, reduce_area, resize


class Unsharp:
    """Follows `coz.backbones.base.Backbone`."""

    reads_prompts = True  # the prompt changes the picture

    def __init__(self, *, amount: float) -> None:
        if not 0 <= amount <= 5:
            raise UserError(f"backbone.amount={amount} must lie between 0 and 5")
        self._amount = amount

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """Names stored states: whatever changes a pixel belongs in it."""
        return {"name": "unsharp", "weights": None, "amount": self._amount}

    def load(self) -> None:
        """A net would read its weights here, once."""

    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """(B, 3, h, w) in [0, 1] → (B, 3, *size) in [0, 1]."""
        height, width = as_size(size)
        large = resize(lr, (height, width))
        blurred = resize(reduce_area(large, (max(1, height // 4), max(1, width // 4))), (height, width))
        words = prompts or [""] * len(lr)
        amounts = torch.tensor([self._amount * (2 if "sharp" in text else 1) for text in words])
        return (large + amounts.view(-1, 1, 1, 1) * (large - blurred)).clamp(0, 1)

"""Losses on pictures: squared error and LPIPS (VGG)."""

from __future__ import annotations

from torch import Tensor, nn

from coz.perceptual import find_trunk, load_lpips


class PixelLosses:
    """L2 and LPIPS of pictures in [-1, 1], in float32. A loss of weight 0 is not computed.

    Args:
        l2, lpips: weights.
        lpips_weights: a torchvision VGG16 checkpoint; None takes the packaged one.

    Raises:
        WeightsNotFound: LPIPS has a weight, and no VGG weights are on this machine.
    """

    def __init__(self, *, l2: float, lpips: float, lpips_weights: str | None = None) -> None:
        self._weights = {"l2": l2, "lpips": lpips}
        self._lpips_weights = lpips_weights
        self._lpips: nn.Module | None = None
        if lpips:
            find_trunk("vgg", lpips_weights)

    def load(self) -> None:
        """Read LPIPS."""
        if self._weights["lpips"] and self._lpips is None:
            self._lpips = load_lpips("vgg", self._lpips_weights)

    def __call__(self, image: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) each → unweighted losses by name."""
        image, hr = image.float(), hr.float()
        parts = {"l2": (image - hr).square().mean()} if self._weights["l2"] else {}
        if self._weights["lpips"]:
            self.load()
            assert self._lpips is not None
            parts["lpips"] = self._lpips.to(image.device)(image, hr).mean()
        return parts

    def total(self, parts: dict[str, Tensor]) -> Tensor | float:
        """The weighted sum."""
        return sum(self._weights[name] * value for name, value in parts.items())

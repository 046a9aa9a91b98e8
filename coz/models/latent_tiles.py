"""Predictions over latents larger than a network's training size: overlapping tiles, blended by Gaussian weights.

The rule is that of StableSR, which OSEDiff, S3Diff and SeeSR share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coz.errors import UserError

Predict = Callable[[Tensor, Tensor, list["Box"]], Tensor]
"""`predict(tiles, owners, boxes)`: (n, C, t, t) tiles, the image that each belongs to (n,), and where it lies there."""

_VARIANCE = 0.01  # of the Gaussian, in tile sides squared


@dataclass(frozen=True)
class Box:
    """A rectangle in latent pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def crop(self, x: Tensor, scale: int = 1) -> Tensor:
        """The rectangle of the last two axes of `x`, whose pixels are `scale` times finer."""
        rows = slice(self.top * scale, self.bottom * scale)
        return x[..., rows, slice(self.left * scale, self.right * scale)]


def check_tiles(tile: int, overlap: int) -> None:
    """Refuse tiles that cannot advance.

    Raises:
        UserError: the overlap is negative or not smaller than the tile.
    """
    if overlap < 0 or tile <= overlap:
        raise UserError(f"latent_tile={tile} must exceed latent_overlap={overlap} >= 0; lower latent_overlap")


def plan_tiles(height: int, width: int, *, tile: int, overlap: int) -> list[Box]:
    """Tiles that cover a latent, column by column; one box if its area is at most that of a tile.

    Tiles are square with the side min(tile, height, width); the last of a row or column is moved back to the border.

    Raises:
        UserError: the tiles cannot advance, as the tile or the latent's short side does not exceed the overlap.
    """
    check_tiles(tile, overlap)
    if height * width <= tile * tile:
        return [Box(0, height, 0, width)]
    side = min(tile, height, width)
    if side <= overlap:
        raise UserError(
            f"a latent of {width} x {height} needs tiles of {side}, which must exceed latent_overlap={overlap}; "
            f"lower latent_overlap, or raise latent_tile to {int(np.ceil((height * width) ** 0.5))} so that one tile is enough"
        )
    return [
        Box(top, top + side, left, left + side)
        for left in _offsets(width, side, side - overlap)
        for top in _offsets(height, side, side - overlap)
    ]


def _offsets(length: int, side: int, stride: int) -> list[int]:
    return [*range(0, length - side, stride), length - side]


def tile_weights(side: int) -> Tensor:
    """Weight of every pixel of a square tile, (side, side) float64.

    The centres are uneven, side/2 along y and (side - 1)/2 along x, as in the released codes.
    """
    position = np.arange(side)

    def gaussian(centre: float) -> np.ndarray:
        return np.exp(-((position - centre) ** 2) / side**2 / (2 * _VARIANCE)) / np.sqrt(2 * np.pi * _VARIANCE)

    return torch.from_numpy(np.outer(gaussian(side / 2), gaussian((side - 1) / 2)))


def predict_in_tiles(latent: Tensor, predict: Predict, *, tile: int, overlap: int, batch_size: int) -> Tensor:
    """Run `predict` over all tiles of all images, at most `batch_size` at a time, and blend: (B, C, h, w) → same.

    The blend is sum(weight · prediction) / sum(weight), summed in float32.
    """
    count, _, height, width = latent.shape
    boxes = plan_tiles(height, width, tile=tile, overlap=overlap)
    jobs = [(image, box) for image in range(count) for box in boxes]
    if len(boxes) == 1:
        weights = torch.ones(height, width, dtype=torch.float64)
    else:
        weights = tile_weights(boxes[0].bottom - boxes[0].top)
    weights = weights.to(latent.device)
    total = torch.zeros(latent.shape, device=latent.device)
    norm = torch.zeros(height, width, device=latent.device)
    for box in boxes:
        box.crop(norm).add_(weights)
    for start in range(0, len(jobs), batch_size):
        chunk = jobs[start : start + batch_size]
        owners = torch.tensor([image for image, _ in chunk])
        crops = torch.cat([box.crop(latent[image : image + 1]) for image, box in chunk])
        predictions = predict(crops, owners, [box for _, box in chunk])
        for (image, box), prediction in zip(chunk, predictions, strict=True):
            box.crop(total[image]).add_(prediction * weights)
    return total / norm

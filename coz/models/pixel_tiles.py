"""Run a convolutional net over overlapping tiles of an image that is too large for one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coz.errors import UserError


def check_tiles(tile_px: int, overlap_px: int) -> None:
    """Refuse a tile that is not larger than its overlaps: tiling would never advance."""
    if overlap_px < 0 or tile_px <= 2 * overlap_px:
        raise UserError(f"tile_px={tile_px} must exceed twice overlap_px={overlap_px}; lower overlap_px or raise tile_px")


def tile_starts(length: int, tile_px: int, overlap_px: int) -> list[int]:
    """Offsets of tiles of one length that cover `length`, the last moved back to the border."""
    if length <= tile_px:
        return [0]
    step = tile_px - overlap_px
    starts = list(range(0, length - tile_px, step))
    return [*starts, length - tile_px]


def run_tiled(net: Callable[[Tensor], Tensor], x: Tensor, *, scale: int, tile_px: int, overlap_px: int) -> Tensor:
    """Apply `net` (B, C, h, w) → (B, C, scale h, scale w) tile by tile and blend the overlaps linearly.

    Args:
        x: (B, C, H, W); one that fits a single tile goes through whole.
        scale: the net's integer factor.
        tile_px: side of a tile, in pixels of `x`.
        overlap_px: how far neighbours overlap.
    """
    height, width = x.shape[-2:]
    if height <= tile_px and width <= tile_px:
        return net(x)
    total = torch.zeros(*x.shape[:2], height * scale, width * scale)
    weights = torch.zeros(height * scale, width * scale)
    for top in tile_starts(height, tile_px, overlap_px):
        for left in tile_starts(width, tile_px, overlap_px):
            tile = net(x[..., top : top + tile_px, left : left + tile_px]).float().cpu()
            rows, columns = tile.shape[-2:]
            ramp = torch.outer(_ramp(rows, overlap_px * scale), _ramp(columns, overlap_px * scale))
            area = (slice(top * scale, top * scale + rows), slice(left * scale, left * scale + columns))
            total[..., area[0], area[1]] += tile * ramp
            weights[area] += ramp
    return total / weights


def _ramp(length: int, overlap: int) -> Tensor:
    """Rises from the border over `overlap` pixels, flat inside; positive everywhere, so that weights never vanish."""
    distance = torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).float()
    return (distance / max(overlap, 1)).clamp(max=1)

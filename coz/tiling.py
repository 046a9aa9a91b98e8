"""Full-image super-resolution in overlapping tiles, over any backbone (the paper's appendix H). No files here.

A step enlarges a picture by a ratio p / q. Its tiles lie on a grid of units, each q pixels of the source and p of the
target, so that every tile begins on a whole pixel of both, whatever the factor. A tile goes through the backbone on its
own, and the results are averaged with Gaussian weights where they overlap.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from coz.errors import UserError

_VARIANCE = 0.01  # of the weights, in units of the tile's squared side, as OSEDiff and SeeSR have it
_LARGEST_DENOMINATOR = 32
_SEGMENT_PX = 32
_FLAT_ENERGY = 0.25  # below it lies the rounding to 8 bits


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width

    def overlap(self, other: Box) -> Box | None:
        """What two rectangles share, or None."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        height, width = min(self.bottom, other.bottom) - top, min(self.right, other.right) - left
        return Box(top, left, height, width) if height > 0 and width > 0 else None

    def within(self, other: Box) -> tuple[slice, slice]:
        """This rectangle as slices of an array that holds `other`."""
        top, left = self.top - other.top, self.left - other.left
        return slice(top, top + self.height), slice(left, left + self.width)


@dataclass(frozen=True)
class Tile:
    """One tile: its place in the grid, what it reads of the source and what it writes of the target.

    `source` may end up to q - 1 pixels beyond the picture, where it is continued by its border; `target` ends with it.
    `made` is what the backbone is asked for: (height, width) of the whole tile.
    """

    row: int
    column: int
    source: Box
    target: Box
    made: tuple[int, int]


@dataclass(frozen=True)
class TilePlan:
    """How a step's picture is cut."""

    source_size: tuple[int, int]  # (height, width) in pixels
    ratio: Fraction
    tile_units: int
    overlap_units: int

    @property
    def target_size(self) -> tuple[int, int]:
        height, width = (max(1, round(side * self.ratio)) for side in self.source_size)
        return height, width

    @property
    def rows(self) -> int:
        return len(self._starts(0))

    @property
    def columns(self) -> int:
        return len(self._starts(1))

    @property
    def block_px(self) -> int:
        """Side of the blocks that the target is blended in, the distance of neighbouring tiles."""
        return (self.tile_units - self.overlap_units) * self.ratio.numerator

    @property
    def block_rows(self) -> int:
        return -(-self.target_size[0] // self.block_px)

    @property
    def block_columns(self) -> int:
        return -(-self.target_size[1] // self.block_px)

    def tile(self, row: int, column: int) -> Tile:
        """The tile at a place of the grid."""
        p, q = self.ratio.numerator, self.ratio.denominator
        (top, height), (left, width) = self._starts(0)[row], self._starts(1)[column]
        source = Box(top * q, left * q, height * q, width * q)
        target = Box(top * p, left * p, height * p, width * p).overlap(Box(0, 0, *self.target_size))
        assert target is not None
        return Tile(row, column, source, target, (height * p, width * p))

    def block(self, row: int, column: int) -> Box:
        """A block of the target; blocks do not overlap."""
        block = Box(row * self.block_px, column * self.block_px, self.block_px, self.block_px)
        cut = block.overlap(Box(0, 0, *self.target_size))
        assert cut is not None
        return cut

    def rows_of(self, block_row: int) -> list[int]:
        """The rows of tiles that a row of blocks is blended from."""
        return self._covering(0, block_row)

    def columns_of(self, block_column: int) -> list[int]:
        return self._covering(1, block_column)

    def _covering(self, axis: int, block: int) -> list[int]:
        p = self.ratio.numerator
        start, end = block * self.block_px, min((block + 1) * self.block_px, self.target_size[axis])
        spans = self._starts(axis)
        return [index for index, (at, units) in enumerate(spans) if at * p < end and (at + units) * p > start]

    def _starts(self, axis: int) -> tuple[tuple[int, int], ...]:
        """(start, length) of the tiles along an axis, in units; the last is moved back to the border."""
        return _spans(-(-self.source_size[axis] // self.ratio.denominator), self.tile_units, self.overlap_units)

    def weights(self, axis: int, tile: int) -> np.ndarray:
        """The tile's weights along an axis, (target pixels,); those of all tiles add up to 1 at every pixel."""
        return _weights(self, axis)[tile]

    def borders(self, axis: int) -> list[int]:
        """Where something could show along an axis: where tiles begin and end, and the middle of their overlaps."""
        p, side = self.ratio.numerator, self.target_size[axis]
        spans = [(at * p, (at + units) * p) for at, units in self._starts(axis)]
        lines = {line for span in spans for line in span}
        lines |= {(after[0] + before[1]) // 2 for before, after in itertools.pairwise(spans)}
        return sorted(line for line in lines if 0 < line < side)


def plan_tiles(source_size: tuple[int, int], factor: float, *, tile_px: int = 512, overlap_px: int = 128) -> TilePlan:
    """Cut the enlargement of a picture into tiles.

    Args:
        source_size: (height, width) of the picture before the step.
        factor: of the step; it is taken as the nearest fraction with a denominator of at most 32.
        tile_px: side of a tile in pixels of the target: 512 is a latent of 64.
        overlap_px: of neighbouring tiles: 128 is 16 of a latent, which the paper found to suffice.

    Raises:
        UserError: a tile that is not larger than the overlap, or too small for the factor.
    """
    for name, value in (("tile_px", tile_px), ("overlap_px", overlap_px)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{name}={value} must be a whole number of pixels")
    ratio = Fraction(factor).limit_denominator(_LARGEST_DENOMINATOR)
    if tile_px < 16 or overlap_px < 0 or overlap_px >= tile_px:
        raise UserError(f"tile_px={tile_px} must exceed overlap_px={overlap_px} and be at least 16; lower overlap_px")
    tile_units, overlap_units = tile_px // ratio.numerator, -(-overlap_px // ratio.numerator)
    if tile_units <= overlap_units:
        raise UserError(f"tile_px={tile_px} is too small beside overlap_px={overlap_px} for a step of {factor:g}; raise it")
    return TilePlan(source_size, ratio, tile_units, overlap_units)


@functools.lru_cache(maxsize=64)
def _spans(length: int, tile: int, overlap: int) -> tuple[tuple[int, int], ...]:
    if length <= tile:
        return ((0, length),)
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return tuple((start, tile) for start in starts)


@functools.lru_cache(maxsize=8)
def _weights(plan: TilePlan, axis: int) -> list[np.ndarray]:
    side, p = plan.target_size[axis], plan.ratio.numerator
    total = np.zeros(side)
    windows = []
    for start, units in plan._starts(axis):
        length = units * p
        offsets = (np.arange(length) - (length - 1) / 2) / length
        window = np.exp(-(offsets**2) / (2 * _VARIANCE))[: side - start * p]
        windows.append((start * p, window))
        total[start * p : start * p + len(window)] += window
    return [(window / total[start : start + len(window)]).astype(np.float32) for start, window in windows]


def blend(plan: TilePlan, block: Box, tiles: Sequence[Tile], read: Callable[[Tile], np.ndarray]) -> np.ndarray:
    """A block of the target out of the tiles that cover it.

    Args:
        block: what is wanted.
        tiles: those that cover it.
        read: a tile's pixels, (height, width, 3) uint8.

    Returns:
        (height, width, 3) uint8.
    """
    total = np.zeros((block.height, block.width, 3), np.float32)
    for tile in tiles:
        part = tile.target.overlap(block)
        if part is None:
            continue
        rows, columns = part.within(tile.target)
        weights = np.outer(plan.weights(0, tile.row)[rows], plan.weights(1, tile.column)[columns])
        total[part.within(block)] += read(tile)[rows, columns] * weights[..., None]
    return np.rint(total).clip(0, 255).astype(np.uint8)


def seam_score(
    image: np.ndarray, borders: tuple[Sequence[int], Sequence[int]], *, band_px: int = 2, beside_px: int = 32
) -> float:
    """Gradient energy across tile borders against that on both sides of them: 1 without seams, more where they show.

    The geometric mean over short segments of the borders. The picture's own edges, which lie at a border here and beside
    one there, cancel only over many segments: compare with the score of the same picture made without tiles.

    Args:
        image: (H, W, 3) uint8.
        borders: rows and columns where something could show, see `TilePlan.borders`.
        band_px: how far from a border still counts as at it.
        beside_px: how far away the energy is compared with.
    """
    return float(np.exp(np.mean(seam_lines(image, borders, band_px=band_px, beside_px=beside_px) or [0.0])))


def seam_lines(
    image: np.ndarray, borders: tuple[Sequence[int], Sequence[int]], *, band_px: int = 2, beside_px: int = 32
) -> list[float]:
    """The mean logarithm of the ratio of `seam_score` over the segments of each border."""
    ratios: list[float] = []
    for axis, lines in enumerate(borders):
        across = image if axis == 0 else image.transpose(1, 0, 2)
        for line in lines:
            here = _band_energy(across, line, band_px)
            sides = [line - beside_px, line + beside_px]
            clear = [side for side in sides if all(abs(side - other) > 2 * band_px for other in lines)]
            bands = [band for side in clear if (band := _band_energy(across, side, band_px)) is not None]
            if here is not None and len(bands) == 2:
                ratios.append(float((np.log(here) - (np.log(bands[0]) + np.log(bands[1])) / 2).mean()))
    return ratios


def _band_energy(across: np.ndarray, line: int, band_px: int) -> np.ndarray | None:
    """Mean squared step over the lines near one, in segments along it; None where the picture ends."""
    if line - band_px - 1 < 0 or line + band_px + 1 > len(across):
        return None
    steps = np.diff(across[line - band_px - 1 : line + band_px + 1].astype(np.float32), axis=0) ** 2
    energy = steps.mean((0, 2))
    segments = len(energy) // _SEGMENT_PX
    energy = energy[: segments * _SEGMENT_PX].reshape(segments, _SEGMENT_PX).mean(1)
    return energy + _FLAT_ENERGY

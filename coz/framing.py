"""Rectangles of a photograph, and of the states of a zoom that need be neither square nor centred.

The evaluation's `View` and `Region` are squares of a square start state, as in the paper. People's photographs are not
square: here a state has the frame's aspect ratio, a `Window` is what a step cuts out of it, and a `Rect` says what of
the photograph something shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from coz.errors import UserError
from coz.image import from_pil

Point = tuple[float, float]
SIDE_MULTIPLE_PX = 16  # what latent models and video codecs take without padding


@dataclass(frozen=True)
class Rect:
    """A rectangle of the photograph, in fractions of its width and height."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0

    @property
    def center(self) -> Point:
        return self.left + self.width / 2, self.top + self.height / 2

    def around(self, point: Point, factor: float) -> Rect:
        """The rectangle `factor` times smaller around a point, moved so that it stays inside this one."""
        return self.holding(Rect(0, 0, self.width / factor, self.height / factor), point)

    def holding(self, other: Rect, center: Point) -> Rect:
        """`other`'s size around a centre, moved inside this one."""
        left = min(max(center[0] - other.width / 2, self.left), self.left + self.width - other.width)
        top = min(max(center[1] - other.height / 2, self.top), self.top + self.height - other.height)
        return Rect(left, top, other.width, other.height)

    def inside(self, window: Window, state_size: tuple[int, int]) -> Rect:
        """What a window into a state of (height, width) pixels, which shows this rectangle, shows of the photograph."""
        unit_y, unit_x = self.height / state_size[0], self.width / state_size[1]
        return Rect(
            self.left + window.left_px * unit_x,
            self.top + window.top_px * unit_y,
            window.width_px * unit_x,
            window.height_px * unit_y,
        )

    def window(self, target: Rect, state_size: tuple[int, int]) -> Window:
        """The window, in whole pixels of a state that shows this rectangle, that comes nearest to `target`."""
        height, width = state_size
        width_px = min(max(round(width * target.width / self.width), 1), width)
        height_px = min(max(round(height * target.height / self.height), 1), height)
        x, y = target.center
        left_px = math.floor((x - self.left) / self.width * width - width_px / 2 + 0.5)
        top_px = math.floor((y - self.top) / self.height * height - height_px / 2 + 0.5)
        return Window(min(max(left_px, 0), width - width_px), min(max(top_px, 0), height - height_px), width_px, height_px)


@dataclass(frozen=True)
class Window:
    """A rectangle of a state, in its pixels: `image.View` for states that are not square."""

    left_px: int
    top_px: int
    width_px: int
    height_px: int

    def crop(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 3, height_px, width_px)."""
        return x[..., self.top_px : self.top_px + self.height_px, self.left_px : self.left_px + self.width_px]


@dataclass(frozen=True)
class Frame:
    """What the start state shows, and how many pixels every state has."""

    rect: Rect
    height_px: int
    width_px: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height_px, self.width_px

    def cut(self, photo: Image.Image) -> Tensor:
        """The start state, Lanczos-resized out of the photograph's own pixels: (1, 3, height_px, width_px)."""
        rect = self.rect
        left, top = rect.left * photo.width, rect.top * photo.height
        right, bottom = left + rect.width * photo.width, top + rect.height * photo.height
        box = (max(left, 0.0), max(top, 0.0), min(right, photo.width), min(bottom, photo.height))
        return from_pil(photo.resize((self.width_px, self.height_px), Image.Resampling.LANCZOS, box=box))


def frame_of(
    photo_size: tuple[int, int],
    *,
    state_px: int,
    aspect: float | str = "photo",
    region: Rect | None = None,
    center: Point | None = None,
) -> Frame:
    """Where a zoom starts: the largest rectangle of the wanted aspect ratio inside the photograph or a region of it.

    Args:
        photo_size: (width, height) in pixels.
        state_px: the short side of every state.
        aspect: width / height, as a number or "16:9"; `photo` keeps that of the photograph or the region.
        region: start here instead of at the whole photograph.
        center: keep this point of the photograph as near to the middle as the photograph allows.

    Raises:
        UserError: a side that is no multiple of 16, an aspect or region that makes no sense.
    """
    if isinstance(state_px, bool) or not isinstance(state_px, int) or state_px < 64 or state_px % SIDE_MULTIPLE_PX:
        raise UserError(f"state_px={state_px} must be a multiple of {SIDE_MULTIPLE_PX} and at least 64; the paper's is 512")
    photo_width, photo_height = photo_size
    region = region or Rect()
    _check_region(region, photo_size)
    own = region.width * photo_width / (region.height * photo_height)
    ratio = own if aspect == "photo" else parse_aspect(aspect)
    long_px = max(round(state_px * max(ratio, 1 / ratio) / SIDE_MULTIPLE_PX), state_px // SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX
    width_px, height_px = (long_px, state_px) if ratio >= 1 else (state_px, long_px)
    ratio = width_px / height_px
    if ratio >= own:
        size = Rect(0, 0, region.width, region.width * photo_width / ratio / photo_height)
    else:
        size = Rect(0, 0, region.height * photo_height * ratio / photo_width, region.height)
    return Frame(region.holding(size, center or region.center), height_px, width_px)


def parse_aspect(aspect: float | str) -> float:
    """`1.5`, "3:2" or "3/2" → 1.5.

    Raises:
        UserError: no ratio, or one beyond 1:8 to 8:1.
    """
    try:
        width, _, height = str(aspect).replace("/", ":").partition(":")
        ratio = float(width) / float(height or 1)
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if not 1 / 8 <= ratio <= 8:
        raise UserError(f"aspect={aspect} is no ratio of width to height; use photo, 1:1, 16:9 or a number from 0.125 to 8")
    return ratio


def parse_rect(values: Sequence[float] | Rect, *, what: str) -> Rect:
    """[left, top, width, height] as fractions of the photograph → a `Rect`.

    Raises:
        UserError: not four numbers, or not inside the photograph.
    """
    if isinstance(values, Rect):
        rect = values
    else:
        try:
            rect = Rect(*(float(value) for value in values))
            complete = len(values) == 4
        except (TypeError, ValueError):
            complete = False
        if not complete:
            raise UserError(f"{what}={values} is no rectangle; give [left,top,width,height] as fractions of the photograph")
    fits = rect.left >= 0 and rect.top >= 0 and rect.left + rect.width <= 1 + 1e-9 and rect.top + rect.height <= 1 + 1e-9
    if not (fits and rect.width > 0 and rect.height > 0):
        raise UserError(
            f"{what}={rect.left:g},{rect.top:g},{rect.width:g},{rect.height:g} does not lie inside the photograph; "
            "give [left,top,width,height] as fractions of it"
        )
    return rect


def _check_region(region: Rect, photo_size: tuple[int, int]) -> None:
    width, height = region.width * photo_size[0], region.height * photo_size[1]
    if min(width, height) < 8:
        raise UserError(f"the region holds {width:.3g} x {height:.3g} px of the photograph; start from a larger one")


def between(first: Rect, last: Rect, factor: float) -> Rect:
    """The rectangle `factor` times smaller than `first` on the straight zoom to `last`, which it never leaves.

    The corner moves linearly with the size, which looks like a camera that flies towards one fixed point.
    """
    width, height = first.width / factor, first.height / factor
    done = 1.0 if first.width == last.width else (first.width - width) / (first.width - last.width)
    return Rect(first.left + (last.left - first.left) * done, first.top + (last.top - first.top) * done, width, height)

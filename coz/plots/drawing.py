"""What the figures share: colours, wrapped text, framed cells."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from coz.image import Region

BACKGROUND, INK, FAINT = "white", "#1a1a1a", "#666666"
PALETTE = ("#e4572e", "#f3a712", "#29a19c", "#4361ee", "#9b5de5")
GAP_PX = 10
TEXT_PX = 14
LINE_PX = 19
BORDER_PX = 4
_SMALLEST_BOX_PX = 11  # a view of one pixel must still be found


@functools.cache
def font(size_px: int = TEXT_PX) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font lacks "×" and most scripts."""
    found = importlib.util.find_spec("matplotlib")
    for place in (found.submodule_search_locations or ()) if found else ():
        file = Path(place) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size_px)
    return ImageFont.load_default(size_px)


def color_of(step: int) -> str:
    """The colour of a step, from 1."""
    return PALETTE[(step - 1) % len(PALETTE)]


def wrap(text: str, width_px: int, *, lines: int, size_px: int = TEXT_PX) -> list[str]:
    """A text in at most so many lines of a width; what does not fit ends in "…"."""
    face, wrapped = font(size_px), [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if wrapped[-1] and face.getlength(longer) > width_px:
            wrapped.append(word)
        else:
            wrapped[-1] = longer
    wrapped = [_shorten(line, width_px, face) for line in wrapped if line]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], _shorten(wrapped[lines - 1] + " …", width_px, face)]
    return wrapped


def _shorten(line: str, width_px: int, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if face.getlength(line) <= width_px:
        return line
    kept = line.removesuffix(" …")
    while kept and face.getlength(kept + "…") > width_px:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def write_lines(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], *, color: str = INK, size_px: int = TEXT_PX
) -> None:
    """Lines of text under each other."""
    step_px = LINE_PX if size_px == TEXT_PX else round(size_px * 1.27)
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * step_px), line, fill=color, font=font(size_px))


def blank_figure(columns: int, height_px: int, cell_px: int) -> Image.Image:
    """An empty figure of so many columns of cells, GAP + columns (cell + GAP) px wide."""
    return Image.new("RGB", (left_of(columns, cell_px), height_px), BACKGROUND)


def left_of(column: int, cell_px: int) -> int:
    """Where a column of cells begins."""
    return GAP_PX + column * (cell_px + GAP_PX)


def write_credit(draw: ImageDraw.ImageDraw, top: int, credit: str, *, width_px: int) -> None:
    """A faint line under a row, over the width of the figure."""
    write_lines(draw, (GAP_PX, top), wrap(credit, width_px - 2 * GAP_PX, lines=1), color=FAINT)


def read_cell(path: Path, cell_px: int) -> Image.Image:
    """A state as a cell of a figure."""
    with Image.open(path) as image:
        return image.convert("RGB").resize((cell_px, cell_px), Image.Resampling.LANCZOS)


def draw_box(draw: ImageDraw.ImageDraw, at: tuple[int, int], cell_px: int, region: Region, color: str) -> None:
    """A box around a region of the cell at a place, with a white line on both sides so that it shows on any picture."""
    side = max(region.side * cell_px, _SMALLEST_BOX_PX)
    middle = [origin + (start + region.side / 2) * cell_px for origin, start in zip(at, (region.left, region.top), strict=True)]
    left, top = (min(max(m - side / 2, origin), origin + cell_px - side) for m, origin in zip(middle, at, strict=True))
    for grow, width, ink in ((1, 1, "white"), (0, 3, color), (-3, 1, "white")):
        edges = (left - grow, top - grow, left + side + grow - 1, top + side + grow - 1)
        if edges[2] > edges[0] and edges[3] > edges[1]:
            draw.rectangle(edges, outline=ink, width=width)


def draw_border(draw: ImageDraw.ImageDraw, at: tuple[int, int], cell_px: int, color: str) -> None:
    """A border inside a cell, in the colour of the box that it enlarges."""
    draw.rectangle((*at, at[0] + cell_px - 1, at[1] + cell_px - 1), outline=color, width=BORDER_PX)


def draw_absent(draw: ImageDraw.ImageDraw, at: tuple[int, int], cell_px: int) -> None:
    """A cell that has no picture."""
    draw.rectangle((*at, at[0] + cell_px - 1, at[1] + cell_px - 1), outline=FAINT)
    draw.text((at[0] + 8, at[1] + 8), "not computed", fill=FAINT, font=font())

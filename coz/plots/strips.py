"""Strips that every run draws: all scales and methods of a photograph side by side, and a single zoom's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from coz.plots.drawing import BACKGROUND, FAINT, GAP_PX, INK, PALETTE, TEXT_PX, draw_absent, font, read_cell, wrap
from coz.stored_chains import ShownChain

_CELL_PX = 320
_CAPTION_LINES = 2


def draw_strip(
    title: str,
    start: Path,
    cells: Mapping[tuple[str, float], ShownChain],
    methods: Sequence[str],
    scales: Sequence[float],
    credit: str = "",
) -> Image.Image:
    """The photograph with the places looked at, then a row of pictures per method, a column per scale."""
    caption_px = _CAPTION_LINES * (TEXT_PX + 3) + 6
    row_px, column_px = _CELL_PX + caption_px + GAP_PX, _CELL_PX + GAP_PX
    head_px = 3 * TEXT_PX + GAP_PX
    width = GAP_PX + column_px * (len(scales) + 1)
    height = head_px + max(1, len(methods)) * row_px + TEXT_PX
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    plain, bold = font(), font(TEXT_PX + 3)
    draw.text((GAP_PX, GAP_PX), title, fill=INK, font=bold)
    canvas.paste(_photo(start, cells.values()), (GAP_PX, head_px))
    for line, text in enumerate(wrap(credit, _CELL_PX, lines=3)):
        draw.text((GAP_PX, head_px + _CELL_PX + 4 + line * (TEXT_PX + 3)), text, fill=FAINT, font=plain)
    for column, scale in enumerate(scales, start=1):
        left = GAP_PX + column * column_px
        draw.text((left, head_px - TEXT_PX - 6), f"{scale:g}×", fill=INK, font=bold)
        for row, method in enumerate(methods):
            top = head_px + row * row_px
            chain = cells.get((method, scale))
            shot = chain.shots[-1] if chain is not None else None
            if shot is None:
                draw_absent(draw, (left, top), _CELL_PX)
            else:
                canvas.paste(read_cell(shot.image, _CELL_PX), (left, top))
            caption = f'{method}: "{shot.prompt}"' if shot is not None and shot.prompt else method
            for line, text in enumerate(wrap(caption, _CELL_PX, lines=_CAPTION_LINES)):
                draw.text((left, top + _CELL_PX + 4 + line * (TEXT_PX + 3)), text, fill=INK if line == 0 else FAINT, font=plain)
    return canvas


def _photo(start: Path, chains: Iterable[ShownChain]) -> Image.Image:
    """The start state with a frame around what each scale shows."""
    photo = read_cell(start, _CELL_PX)
    draw = ImageDraw.Draw(photo)
    regions = sorted({shot.region for chain in chains for shot in chain.shots}, key=lambda region: -region.side)
    sides = sorted({round(region.side, 6) for region in regions}, reverse=True)
    for region in regions:
        color = PALETTE[sides.index(round(region.side, 6)) % len(PALETTE)]
        left, top, right, bottom = (
            edge * _CELL_PX for edge in (region.left, region.top, region.left + region.side, region.top + region.side)
        )
        draw.rectangle((left - 1, top - 1, max(right, left + 2), max(bottom, top + 2)), outline=color, width=2)
    return photo


def draw_zoom(
    photo: Image.Image,
    pictures: Sequence[tuple[Image.Image, str, str]],
    rects: Sequence[tuple[float, float, float, float]],
) -> Image.Image:
    """A photograph of any shape with a frame around each step, then each step's picture with its scale and prompt.

    Args:
        pictures: (image, scale, prompt) of each step.
        rects: what of the photograph each shows, (left, top, width, height) as fractions.
    """
    plain, bold = font(), font(TEXT_PX + 3)
    head_px, caption_px = 2 * TEXT_PX + 4, 3 * (TEXT_PX + 3) + 6
    widths = [max(80, round(_CELL_PX * image.width / image.height)) for image in [photo, *(picture[0] for picture in pictures)]]
    canvas = Image.new("RGB", (sum(widths) + GAP_PX * (len(widths) + 1), head_px + _CELL_PX + caption_px), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(photo.resize((widths[0], _CELL_PX), Image.Resampling.LANCZOS), (GAP_PX, head_px))
    for index, (left, top, width, height) in enumerate(rects):
        x, y = GAP_PX + left * widths[0], head_px + top * _CELL_PX
        edges = (x - 1, y - 1, max(x + width * widths[0], x + 2), max(y + height * _CELL_PX, y + 2))
        draw.rectangle(edges, outline=PALETTE[index % len(PALETTE)], width=2)
    left_px = GAP_PX
    for width_px, (image, scale, prompt), index in zip(widths[1:], pictures, range(len(pictures)), strict=True):
        left_px += widths[index] + GAP_PX
        draw.text((left_px, 8), scale, fill=PALETTE[index % len(PALETTE)], font=bold)
        canvas.paste(image.resize((width_px, _CELL_PX), Image.Resampling.LANCZOS), (left_px, head_px))
        for line, text in enumerate(wrap(prompt, width_px, lines=3)):
            draw.text((left_px, head_px + _CELL_PX + 4 + line * (TEXT_PX + 3)), text, fill=INK, font=plain)
    return canvas

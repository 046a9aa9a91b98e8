"""Figures 3, 5 and 11: photographs and scales against methods, with a box on the input around what is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from coz.plots.drawing import (
    GAP_PX,
    INK,
    LINE_PX,
    TEXT_PX,
    blank_figure,
    draw_absent,
    draw_box,
    font,
    left_of,
    read_cell,
    wrap,
    write_credit,
)
from coz.stored_chains import ShownChain

_BOX = "#e4572e"


def draw_grid(
    cells: Mapping[tuple[str, float, str], ShownChain],
    *,
    photos: Sequence[str],
    scales: Sequence[float],
    methods: Mapping[str, str],
    cell_px: int,
    credits: Mapping[str, str],
) -> Image.Image:
    """A row per photograph and scale, a column per method, the input in front.

    The picture is GAP + (1 + methods) (cell + GAP) px wide, and GAP + head + rows (cell + GAP) px high, plus a line for each
    photograph that has a credit.

    Args:
        cells: (photograph, scale, method) → the chain that ends in the state; what is absent is drawn as such.
        methods: method → its label, in the columns' order.
        credits: photograph → a line under its rows.
    """
    credited = [photo for photo in photos if credits.get(photo)]
    heads = ["input", *(f"({letter}) {label}" for letter, label in zip("abcdefghijkl", methods.values(), strict=False))]
    wrapped = [wrap(head, cell_px, lines=2, size_px=TEXT_PX + 1) for head in heads]
    head_px = max(map(len, wrapped)) * LINE_PX + 6
    height = GAP_PX + head_px + len(photos) * len(scales) * (cell_px + GAP_PX) + len(credited) * (LINE_PX + 10)
    canvas = blank_figure(1 + len(methods), height, cell_px)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped):
        for number, words in enumerate(lines):
            at = (left_of(column, cell_px) + cell_px / 2, GAP_PX + number * LINE_PX)
            draw.text(at, words, fill=INK, font=font(TEXT_PX + 1), anchor="ma")
    top = GAP_PX + head_px
    for photo in photos:
        for scale in scales:
            row = [cells.get((photo, scale, method)) for method in methods]
            _row(canvas, draw, row, scale, top, cell_px)
            top += cell_px + GAP_PX
        if photo in credited:
            write_credit(draw, top - GAP_PX + 3, credits[photo], width_px=canvas.width)
            top += LINE_PX + 10
    return canvas


def _row(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: Sequence[ShownChain | None],
    scale: float,
    top: int,
    cell_px: int,
) -> None:
    there = [chain for chain in row if chain is not None and chain.shots]
    if there:
        canvas.paste(read_cell(there[0].start, cell_px), (GAP_PX, top))
        for region in {chain.shots[-1].region for chain in there}:
            draw_box(draw, (GAP_PX, top), cell_px, region, _BOX)
    else:
        draw_absent(draw, (GAP_PX, top), cell_px)
    _tag(draw, (GAP_PX, top), f"{scale:g}×")
    for column, chain in enumerate(row, start=1):
        at = (left_of(column, cell_px), top)
        if chain is None or not chain.shots:
            draw_absent(draw, at, cell_px)
        else:
            canvas.paste(read_cell(chain.shots[-1].image, cell_px), at)


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    """The scale in a corner of the input."""
    face = font(TEXT_PX + 3)
    width = int(face.getlength(text)) + 14
    draw.rectangle((*at, at[0] + width, at[1] + TEXT_PX + 12), fill="black")
    draw.text((at[0] + width / 2, at[1] + 4), text, fill="white", font=face, anchor="ma")

"""The paper's figures of zooms: rows of states (Fig. 1, 12 to 16), and prompts beside their states (Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from coz.image import Region
from coz.plots.drawing import (
    FAINT,
    GAP_PX,
    INK,
    LINE_PX,
    TEXT_PX,
    blank_figure,
    color_of,
    draw_absent,
    draw_border,
    draw_box,
    font,
    left_of,
    read_cell,
    wrap,
    write_credit,
    write_lines,
)
from coz.stored_chains import ShownChain

_HEAD_PX = 2 * TEXT_PX
PROMPT_LINES = 4


def draw_zoom_rows(
    chains: Mapping[str, ShownChain], *, scales: Sequence[float], cell_px: int, credits: Mapping[str, str]
) -> Image.Image:
    """A row per photograph: the input, then the states at some scales; a box in each picture is what the next one shows.

    The picture is GAP + (1 + scales) (cell + GAP) px wide, and GAP + head + photographs (cell + caption + GAP) px high.

    Args:
        chains: photograph → its chain.
        scales: that have a column; a state between two of them is skipped, and the boxes with it.
        credits: photograph → a line under its row.
    """
    caption_px = LINE_PX + 12 if any(credits.get(photo) for photo in chains) else 0
    canvas = blank_figure(len(scales) + 1, GAP_PX + _HEAD_PX + len(chains) * (cell_px + caption_px + GAP_PX), cell_px)
    draw = ImageDraw.Draw(canvas)
    _heads(draw, scales, cell_px)
    for row, (photo, chain) in enumerate(chains.items()):
        top = GAP_PX + _HEAD_PX + row * (cell_px + caption_px + GAP_PX)
        _chain_row(canvas, draw, chain, scales, top, cell_px)
        if credits.get(photo):
            write_credit(draw, top + cell_px + 4, credits[photo], width_px=canvas.width)
    return canvas


def draw_prompt_rows(chains: Mapping[str, ShownChain], *, scales: Sequence[float], cell_px: int) -> Image.Image:
    """A row per way of prompting: its label, the input, and the state of each step over the prompt that led to it.

    The picture is GAP + (1 + scales) (cell + GAP) px wide, and GAP + head + rows (label + cell + prompt + GAP) px high.

    Args:
        chains: label → the chain of one photograph.
    """
    prompt_px, label_px = PROMPT_LINES * LINE_PX + 8, TEXT_PX + 12
    row_px = label_px + cell_px + prompt_px + GAP_PX
    canvas = blank_figure(len(scales) + 1, GAP_PX + _HEAD_PX + len(chains) * row_px, cell_px)
    draw = ImageDraw.Draw(canvas)
    _heads(draw, scales, cell_px)
    for row, (label, chain) in enumerate(chains.items()):
        top = GAP_PX + _HEAD_PX + row * row_px
        line = wrap(label, canvas.width - 2 * GAP_PX, lines=1, size_px=TEXT_PX + 3)
        write_lines(draw, (GAP_PX, top), line, size_px=TEXT_PX + 3)
        _chain_row(canvas, draw, chain, scales, top + label_px, cell_px)
        for column, scale in enumerate(scales, start=1):
            shot = next((shot for shot in chain.shots if shot.scale == scale), None)
            if shot is not None:
                text = f"“{shot.prompt}”" if shot.prompt else "no prompt"
                lines = wrap(text, cell_px, lines=PROMPT_LINES)
                place = (left_of(column, cell_px), top + label_px + cell_px + 6)
                write_lines(draw, place, lines, color=INK if shot.prompt else FAINT)
    return canvas


def _heads(draw: ImageDraw.ImageDraw, scales: Sequence[float], cell_px: int) -> None:
    for column, text in enumerate(["input", *(f"{scale:g}×" for scale in scales)]):
        middle = left_of(column, cell_px) + cell_px / 2
        draw.text((middle, GAP_PX), text, fill=color_of(column) if column else INK, font=font(TEXT_PX + 3), anchor="ma")


def _chain_row(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, chain: ShownChain, scales: Sequence[float], top: int, cell_px: int
) -> None:
    """Pictures, borders and boxes of one chain. A box is drawn where its picture and the one it leads to are neighbours."""
    canvas.paste(read_cell(chain.start, cell_px), (GAP_PX, top))
    shown, column_before = Region(), 0
    for column, scale in enumerate(scales, start=1):
        at = (left_of(column, cell_px), top)
        shot = next((shot for shot in chain.shots if shot.scale == scale), None)
        if shot is None:
            draw_absent(draw, at, cell_px)
            continue
        canvas.paste(read_cell(shot.image, cell_px), at)
        draw_border(draw, at, cell_px, color_of(column))
        box = _within(shot.region, shown)
        draw_box(draw, (left_of(column_before, cell_px), top), cell_px, box, color_of(column))
        shown, column_before = shot.region, column


def _within(region: Region, outer: Region) -> Region:
    """A region of the start state, in fractions of another one."""
    left, top = (region.left - outer.left) / outer.side, (region.top - outer.top) / outer.side
    return Region(left, top, region.side / outer.side)

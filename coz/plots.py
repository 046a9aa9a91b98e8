"""Pictures of results: zoom strips, all scales and methods of a photograph side by side, and the reward curves of GRPO runs.

python -m coz.plots rewards RUN…        Figures 6 and 7
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from coz.errors import UserError
from coz.image import Region, View

_CELL_PX = 320
_GAP_PX = 10
_TEXT_PX = 15
_CAPTION_LINES = 2
_BACKGROUND, _INK, _FAINT, _ACCENT = "white", "#1a1a1a", "#666666", "#e4572e"
_PALETTE = ("#e4572e", "#f3a712", "#29a19c", "#4361ee", "#9b5de5")


@dataclass(frozen=True)
class StripState:
    """One picture of a strip."""

    image: Path
    prompt: str
    regions: tuple[Region, ...]  # what each state of its chain shows of the start state, the first first


def read_strip_state(states: Path, key: str) -> tuple[StripState, Path]:
    """A stored state with its ancestry, and the picture of its start state."""
    lineage = []
    node = key
    while True:
        meta = json.loads((states / node / "state.json").read_text())
        if meta["step"] == 0:
            break
        lineage.append(meta)
        node = meta["parent"]
    with Image.open(states / node / "image.png") as start:
        state_px = start.width
    region, regions = Region(), []
    for meta in reversed(lineage):
        region = region.inside(View(**meta["view"]), state_px)
        regions.append(region)
    prompt = lineage[0]["prompt"] if lineage else ""
    return StripState(states / key / "image.png", prompt, tuple(regions)), states / node / "image.png"


def draw_strip(
    title: str,
    start: Path,
    cells: Mapping[tuple[str, float], StripState],
    methods: Sequence[str],
    scales: Sequence[float],
    credit: str = "",
) -> Image.Image:
    """The photograph with the places looked at, then a row of pictures per method, a column per scale."""
    caption_px = _CAPTION_LINES * (_TEXT_PX + 3) + 6
    row_px, column_px = _CELL_PX + caption_px + _GAP_PX, _CELL_PX + _GAP_PX
    head_px = 3 * _TEXT_PX + _GAP_PX
    width = _GAP_PX + column_px * (len(scales) + 1)
    height = head_px + max(1, len(methods)) * row_px + _TEXT_PX
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font, bold = ImageFont.load_default(_TEXT_PX), ImageFont.load_default(_TEXT_PX + 3)
    draw.text((_GAP_PX, _GAP_PX), title, fill=_INK, font=bold)
    canvas.paste(_photo(start, list(cells.values())), (_GAP_PX, head_px))
    for line, text in enumerate(textwrap.wrap(credit, 44)[:3]):
        draw.text((_GAP_PX, head_px + _CELL_PX + 4 + line * (_TEXT_PX + 3)), text, fill=_FAINT, font=font)
    for column, scale in enumerate(scales, start=1):
        left = _GAP_PX + column * column_px
        draw.text((left, head_px - _TEXT_PX - 6), f"{scale:g}x", fill=_INK, font=bold)
        for row, method in enumerate(methods):
            top = head_px + row * row_px
            cell = cells.get((method, scale))
            if cell is None:
                draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), outline=_FAINT)
                draw.text((left + 8, top + 8), "not computed", fill=_FAINT, font=font)
            else:
                with Image.open(cell.image) as image:
                    canvas.paste(image.convert("RGB").resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS), (left, top))
            caption = f'{method}: "{cell.prompt}"' if cell is not None and cell.prompt else method
            for line, text in enumerate(textwrap.wrap(caption, 44)[:_CAPTION_LINES]):
                draw.text(
                    (left, top + _CELL_PX + 4 + line * (_TEXT_PX + 3)), text, fill=_INK if line == 0 else _FAINT, font=font
                )
    return canvas


def _photo(start: Path, cells: Sequence[StripState]) -> Image.Image:
    """The start state with a frame around what each scale shows."""
    with Image.open(start) as image:
        photo = image.convert("RGB").resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(photo)
    regions = sorted({region for cell in cells for region in cell.regions}, key=lambda region: -region.side)
    sides = sorted({round(region.side, 6) for region in regions}, reverse=True)
    for region in regions:
        color = _PALETTE[sides.index(round(region.side, 6)) % len(_PALETTE)]
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
    font, bold = ImageFont.load_default(_TEXT_PX), ImageFont.load_default(_TEXT_PX + 3)
    head_px, caption_px = 2 * _TEXT_PX + 4, 3 * (_TEXT_PX + 3) + 6
    widths = [max(80, round(_CELL_PX * image.width / image.height)) for image in [photo, *(picture[0] for picture in pictures)]]
    canvas = Image.new("RGB", (sum(widths) + _GAP_PX * (len(widths) + 1), head_px + _CELL_PX + caption_px), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(photo.resize((widths[0], _CELL_PX), Image.Resampling.LANCZOS), (_GAP_PX, head_px))
    for index, (left, top, width, height) in enumerate(rects):
        x, y = _GAP_PX + left * widths[0], head_px + top * _CELL_PX
        edges = (x - 1, y - 1, max(x + width * widths[0], x + 2), max(y + height * _CELL_PX, y + 2))
        draw.rectangle(edges, outline=_PALETTE[index % len(_PALETTE)], width=2)
    left_px = _GAP_PX
    for width_px, (image, scale, prompt), index in zip(widths[1:], pictures, range(len(pictures)), strict=True):
        left_px += widths[index] + _GAP_PX
        draw.text((left_px, 8), scale, fill=_PALETTE[index % len(_PALETTE)], font=bold)
        canvas.paste(image.resize((width_px, _CELL_PX), Image.Resampling.LANCZOS), (left_px, head_px))
        for line, text in enumerate(textwrap.wrap(prompt, max(10, width_px // 8))[:3]):
            draw.text((left_px, head_px + _CELL_PX + 4 + line * (_TEXT_PX + 3)), text, fill=_INK, font=font)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# reward curves

_PANELS = {
    "critic": "Critic Reward",
    "phrase": "Phrase Exclusion Reward",
    "repetition": "Repetition Penalty",
    "total": "Total Reward",
}


def read_curves(run: Path, split: str = "validation") -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each reward of a GRPO run, by name.

    Raises:
        UserError: no rows of rewards there.
    """
    file = run / "rewards.csv"
    if not file.is_file():
        raise UserError(f"{run} holds no rewards.csv; give the folder of a run of train_grpo.py")
    curves: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["split"] == split and row.get("value"):
                curves.setdefault(row["name"], {})[int(row["step"])] = float(row["value"])
    if not curves:
        raise UserError(f"{file} holds no {split} row yet; wait for the first validation")
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in curves.items()}


def draw_rewards(runs: Sequence[Path], *, out: Path) -> Path:
    """Figures 6 and 7: each reward on the validation pairs against the step, a line per run. → the file written.

    Raises:
        UserError: a folder without rewards.
    """
    curves = {_run_label(run): read_curves(run) for run in runs}
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(_PANELS), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_PANELS))
    for panel, (name, title) in zip(panels, _PANELS.items(), strict=True):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        for color, (label, values) in zip(_PALETTE * len(curves), curves.items(), strict=False):
            if name in values:
                panel.plot(*values[name], color=color, label=label, marker="o", markersize=3)
    if len(curves) > 1:
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def _run_label(run: Path) -> str:
    """The critic's name and the run's."""
    config = run / "config.yaml"
    if config.is_file():
        from omegaconf import OmegaConf

        critic = OmegaConf.select(OmegaConf.load(config), "choices.critic")
        return f"{critic} ({run.name})" if critic else run.name
    return run.name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 and one sentence where the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m coz.plots", description="Draw figures from the files of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    rewards = commands.add_parser("rewards", help="the reward curves of GRPO runs, several together")
    rewards.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of train_grpo.py's runs")
    rewards.add_argument("--out", type=Path, help="default: rewards.png in the first run")
    given = parser.parse_args(arguments)
    try:
        print(draw_rewards(given.runs, out=given.out or given.runs[0] / "rewards.png"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

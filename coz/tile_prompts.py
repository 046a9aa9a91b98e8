"""Prompts of a full image's tiles: one for all, one for each, or one for each cell of a grid of tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from coz.chain import seed_of
from coz.errors import UserError
from coz.image import from_pil, resize
from coz.prompters.base import Prompter
from coz.pyramid import Canvas
from coz.tiling import Box, Tile, TilePlan

PromptMode = Literal["global", "tile", "grid"]
_OVERVIEW_PX = 512


def check_mode(mode: str, grid: int) -> None:
    """Refuse an unknown mode or a grid of nothing."""
    if mode not in ("global", "tile", "grid"):
        raise UserError(f"prompts={mode} is unknown; use global, tile or grid")
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
        raise UserError(f"grid={grid} must be a whole number of tiles, at least 1")


class TilePrompts:
    """Asks a prompter for each tile's words, each once: answers are kept in a journal beside the picture.

    As in the chain, the prompter sees what is to be restored, enlarged, and the wider picture around it; the only prompt
    of `global` is asked of the whole photograph.
    """

    def __init__(
        self,
        *,
        prompter: Prompter,
        mode: PromptMode,
        grid: int,
        journal: Path,
        step: int,
        plan: TilePlan,
        source: Canvas,
        overview: Image.Image,
        identity: str,
        seed: int,
    ) -> None:
        """
        Args:
            mode, grid: see `enlarging.enlarge`.
            journal: a file of JSON lines.
            step, plan, source: of the step whose tiles are asked for.
            overview: the whole photograph.
            identity: of the photograph, for seeds.
        """
        self._prompter, self._mode, self._grid, self._journal = prompter, mode, grid, journal
        self._step, self._plan, self._source, self._overview = step, plan, source, overview
        self._identity, self._seed = identity, seed
        self._known = _read(journal)

    def __call__(self, tile: Tile) -> str:
        """The words for a tile."""
        cell = self._cell(tile)
        if cell not in self._known:
            current, context = self._views(tile)
            seed = seed_of(self._seed, f"{self._identity}/{cell}", self._step)
            text = str(self._prompter(current, context, seeds=[seed])[0])
            with open(self._journal, "a", encoding="utf-8") as file:
                # Each line begins anew, for a kill may have cut the last one off.
                file.write("\n" + json.dumps({"cell": cell, "prompt": text}, ensure_ascii=False))
            self._known[cell] = text
        return self._known[cell]

    def _cell(self, tile: Tile) -> str:
        if self._mode == "global":
            return "all"
        size = self._grid if self._mode == "grid" else 1
        return f"{self._step}/{tile.row // size}/{tile.column // size}"

    def _views(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        if self._mode == "global":
            photo = self._overview.copy()
            photo.thumbnail((_OVERVIEW_PX, _OVERVIEW_PX), Image.Resampling.LANCZOS)
            return from_pil(photo), None
        if self._mode == "tile":
            box = tile.source
        else:
            rows = _cell_ends(tile.row, self._grid, self._plan.rows)
            columns = _cell_ends(tile.column, self._grid, self._plan.columns)
            first, last = (self._plan.tile(rows[i], columns[i]).source for i in (0, 1))
            box = Box(first.top, first.left, last.bottom - first.top, last.right - first.left)
        around = _wider(box, self._plan.ratio.numerator / self._plan.ratio.denominator, self._source.size)
        size = (tile.made[0], tile.made[1])
        return self._picture(box, size), self._picture(around, size)

    def _picture(self, box: Box, size: tuple[int, int]) -> Tensor:
        """A part of the source at a tile's size; a grid's cell is read whole, which bounds the grid, not the picture."""
        return resize(_tensor(self._source, box), size)


def _tensor(source: Canvas, box: Box) -> Tensor:
    return torch.from_numpy(source.read(box).copy()).permute(2, 0, 1)[None].float().div(255)


def _cell_ends(index: int, grid: int, count: int) -> tuple[int, int]:
    first = index // grid * grid
    return first, min(first + grid, count) - 1


def _wider(box: Box, factor: float, size: tuple[int, int]) -> Box:
    """A box around another, `factor` times as large where the picture allows."""
    height, width = (min(round(side * factor), whole) for side, whole in zip((box.height, box.width), size, strict=True))
    top = min(max(box.top + (box.height - height) // 2, 0), size[0] - height)
    left = min(max(box.left + (box.width - width) // 2, 0), size[1] - width)
    return Box(top, left, height, width)


def _read(journal: Path) -> dict[str, str]:
    known = {}
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill cut off
            known[entry["cell"]] = entry["prompt"]
    return known

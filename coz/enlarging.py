"""Enlarge a whole photograph, tile by tile and step by step, into a pyramid on disk.

Memory is bounded whatever the size, and a killed run goes on where it was: a finished tile lies on disk until the blocks
it is part of are blended, and a journal says which rows of blocks are.

>>> result = coz.enlarge("photo.jpg", scale=64, folder="big")
>>> result.write_bigtiff("big.tif")
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from coz.backbones.base import Backbone
from coz.chain import check_seed, plan_factors, seed_of
from coz.errors import UserError
from coz.image import from_pil, read_photo, resize, to_uint8
from coz.parts import Enlarge, build_parts
from coz.prompters.base import Prompter
from coz.provenance import note_on
from coz.pyramid import Canvas, Pyramid, build_pyramid, check_room, create_canvas, import_zarr, write_bigtiff
from coz.store import explain_write_errors, fingerprint, write_atomic, write_json
from coz.tile_prompts import PromptMode, TilePrompts, check_mode
from coz.tiling import Box, Tile, TilePlan, blend, plan_tiles, seam_lines

FORMAT = 1  # raised when the same settings would give other pictures
OnTile = Callable[[int, Tile], None]


@dataclass(frozen=True)
class EnlargeSettings:
    """What shapes an enlargement besides the photograph and the scale."""

    backbone: Backbone
    prompter: Prompter
    prompts: PromptMode = "global"
    grid: int = 4
    tile_px: int = 512
    overlap_px: int = 128
    seed: int = 0
    batch_size: int = 1


@dataclass(frozen=True)
class Enlargement:
    """A finished enlargement: `folder/image.ome.zarr` and what it was made of."""

    folder: Path
    plans: tuple[TilePlan, ...]

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.folder / "image.ome.zarr")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.plans[-1].target_size

    def write_bigtiff(self, path: str | Path) -> Path:
        """See `pyramid.write_bigtiff`."""
        return write_bigtiff(self.pyramid, path)

    def seams(self, *, strip_px: int = 256, strips: int = 8) -> tuple[float, float]:
        """How much more gradient energy lies across the last step's tile borders than beside them, and the standard error.

        1 without seams. The picture's own edges are taken out by the same measure on its source, interpolated without
        tiles (see `tiling.seam_lines`). Strips across the whole picture are measured, not every border's whole length.
        """
        plan, last = self.plans[-1], len(self.plans)
        made, source = self.pyramid.levels[0], Canvas(self.folder / "steps.zarr" / str(last - 1))
        p, q = plan.ratio.numerator, plan.ratio.denominator
        ratios: list[float] = []
        for axis in (0, 1):  # along which a strip is long
            borders = (plan.borders(0), []) if axis == 0 else ([], plan.borders(1))
            length, across = -(-source.size[axis] // q), source.size[1 - axis] // q
            width = min(max(strip_px // p, 1), across)
            for start in np.unique(np.linspace(0, across - width, min(strips, across // width)).astype(int)).tolist():
                box = Box(0, start, length, width) if axis == 0 else Box(start, 0, width, length)
                strip = made.read(_scaled(box, p))
                plain = to_uint8(resize(_batch([source.read(_scaled(box, q))]), (strip.shape[0], strip.shape[1])))[0]
                ratios += [a - b for a, b in zip(seam_lines(strip, borders), seam_lines(plain, borders), strict=True)]
        if not ratios:
            return 1.0, 0.0
        return float(np.exp(np.mean(ratios))), float(np.std(ratios) / len(ratios) ** 0.5)


def _scaled(box: Box, factor: int) -> Box:
    return Box(box.top * factor, box.left * factor, box.height * factor, box.width * factor)


class Enlarger:
    """Makes an enlargement in a folder, or what of it is missing there."""

    def __init__(self, photo: Image.Image, folder: Path, *, factors: Sequence[float], settings: EnlargeSettings) -> None:
        """
        Raises:
            UserError: tiles that make no sense, too little room on the disk, a folder that holds another enlargement.
        """
        import_zarr()
        check_mode(settings.prompts, settings.grid)
        check_seed(settings.seed)
        if not isinstance(settings.batch_size, int) or settings.batch_size < 1:
            raise UserError(f"batch_size={settings.batch_size} must be a whole number of at least 1")
        self.folder, self._settings, self._photo = Path(folder), settings, photo
        plans, size = [], (photo.height, photo.width)
        for factor in factors:
            plans.append(plan_tiles(size, factor, tile_px=settings.tile_px, overlap_px=settings.overlap_px))
            size = plans[-1].target_size
        self.plans = tuple(plans)
        self._digest = hashlib.sha256(photo.tobytes()).hexdigest()
        self._made_by = {
            "format": FORMAT,
            "photo": self._digest,
            "photo_size": list(photo.size),
            "factors": [str(plan.ratio) for plan in plans],
            "backbone": dict(settings.backbone.fingerprint),
            "prompter": dict(settings.prompter.fingerprint),
            "prompts": settings.prompts,
            "grid": settings.grid,
            "tile_px": settings.tile_px,
            "overlap_px": settings.overlap_px,
            "seed": settings.seed,
        }
        self._check_folder()
        if not self._journal("pyramid"):
            check_room(self.folder, size)

    @property
    def tiles(self) -> int:
        """How many tiles all steps have."""
        return sum(plan.rows * plan.columns for plan in self.plans)

    def finished_tiles(self) -> int:
        """How many of them are there already."""
        count = 0
        for step, plan in enumerate(self.plans, start=1):
            count += sum(plan.columns - len(self._missing(step, plan, row)) for row in range(plan.rows))
        return count

    def run(self, on_tile: OnTile = lambda step, tile: None) -> Enlargement:
        """Compute what is missing.

        Args:
            on_tile: called after each tile that this run made, (step, tile).

        Raises:
            UserError: another process works in the folder; the disk is full.
        """
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            with lock:
                write_json(self.folder / "enlargement.json", self._made_by)
                self._run(on_tile)
        except Timeout as error:
            raise UserError(f"{self.folder} is being worked in by another process; wait for it, or choose another") from error
        return Enlargement(self.folder, self.plans)

    def _run(self, on_tile: OnTile) -> None:
        if not self._journal("start"):
            canvas = create_canvas(self._step_path(0), (self._photo.height, self._photo.width), chunk_px=512)
            for top in range(0, self._photo.height, 512):
                box = Box(top, 0, min(512, self._photo.height - top), self._photo.width)
                canvas.write(box, np.asarray(self._photo.crop((0, box.top, box.width, box.bottom))))
            self._note("start", 0)
        for step, plan in enumerate(self.plans, start=1):
            if self._journal(f"blocks{step}") < plan.block_rows:
                self._step(step, plan, on_tile)
        group = self.folder / "image.ome.zarr"
        if not self._journal("pyramid"):
            about = note_on(
                backbone=self._settings.backbone.fingerprint,
                prompter=self._settings.prompter.fingerprint,
                scale=self.plans[-1].target_size[0] / self._photo.height,
                fingerprint=fingerprint(self._made_by),
            )
            build_pyramid(group, done=lambda name, row: row < self._journal(name), note=self._note, about=about)
            self._note("pyramid", 0)

    def _check_folder(self) -> None:
        file = self.folder / "enlargement.json"
        if not file.is_file():
            return
        made_by = json.loads(file.read_text())
        if fingerprint(made_by) != fingerprint(self._made_by):
            differing = [key for key in self._made_by if made_by.get(key) != json.loads(json.dumps(self._made_by[key]))]
            raise UserError(
                f"{self.folder} holds an enlargement of another {' and '.join(differing[:3])}; choose another folder"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # one step

    def _step(self, step: int, plan: TilePlan, on_tile: OnTile) -> None:
        source = Canvas(self._step_path(step - 1))
        target = create_canvas(self._step_path(step), plan.target_size, chunk_px=plan.block_px)
        prompts = TilePrompts(
            prompter=self._settings.prompter,
            mode=self._settings.prompts,
            grid=self._settings.grid,
            journal=self.folder / "prompts.jsonl",
            step=step,
            plan=plan,
            source=source,
            overview=self._photo,
            identity=self._digest,
            seed=self._settings.seed,
        )
        blended = self._journal(f"blocks{step}")
        for row in range(plan.rows):
            self._tile_row(step, plan, row, source, prompts, on_tile)
            while blended < plan.block_rows and max(plan.rows_of(blended)) <= row:
                self._blend_row(step, plan, blended, target)
                self._note(f"blocks{step}", blended)
                blended += 1
                self._forget_tiles(step, plan, blended)
        shutil.rmtree(self.folder / "tiles" / str(step), ignore_errors=True)

    def _tile_row(self, step: int, plan: TilePlan, row: int, source: Canvas, prompts: TilePrompts, on_tile: OnTile) -> None:
        todo = self._missing(step, plan, row)
        size = self._settings.batch_size
        for first in range(0, len(todo), size):
            tiles = [plan.tile(row, column) for column in todo[first : first + size]]
            for group in _of_one_shape(tiles):
                self._compute(step, group, source, prompts)
                for tile in group:
                    on_tile(step, tile)

    def _compute(self, step: int, tiles: Sequence[Tile], source: Canvas, prompts: TilePrompts) -> None:
        lr = _batch([source.read(tile.source) for tile in tiles])
        words = [prompts(tile) for tile in tiles]
        seeds = [seed_of(self._settings.seed, f"{self._digest}/{tile.row}/{tile.column}", step) for tile in tiles]
        made = self._settings.backbone(lr, size=tiles[0].made, prompts=words, seeds=seeds)
        if tuple(made.shape) != (len(tiles), 3, *tiles[0].made):
            raise ValueError(f"{type(self._settings.backbone).__name__} returned {tuple(made.shape)} for {tiles[0].made}")
        for tile, pixels in zip(tiles, to_uint8(made), strict=True):
            _write_array(self._tile_path(step, tile.row, tile.column), pixels[: tile.target.height, : tile.target.width])

    def _blend_row(self, step: int, plan: TilePlan, row: int, target: Canvas) -> None:
        for column in range(plan.block_columns):
            tiles = [plan.tile(r, c) for r in plan.rows_of(row) for c in plan.columns_of(column)]
            block = plan.block(row, column)
            target.write(block, blend(plan, block, tiles, lambda tile: self._read_tile(step, tile)))

    def _read_tile(self, step: int, tile: Tile) -> np.ndarray:
        return np.load(self._tile_path(step, tile.row, tile.column), mmap_mode="r")

    def _forget_tiles(self, step: int, plan: TilePlan, blended: int) -> None:
        """Delete the rows of tiles that no block to come needs."""
        needed = min((row for block in range(blended, plan.block_rows) for row in plan.rows_of(block)), default=plan.rows)
        for row in range(needed):
            folder = self._tile_path(step, row, 0).parent
            if folder.is_dir():
                shutil.rmtree(folder)

    def _missing(self, step: int, plan: TilePlan, row: int) -> list[int]:
        """The columns of a row whose tiles have yet to be made."""
        blended = self._journal(f"blocks{step}")
        if all(row not in plan.rows_of(block) for block in range(blended, plan.block_rows)):
            return []  # used up and deleted
        return [column for column in range(plan.columns) if not self._tile_path(step, row, column).is_file()]

    # -----------------------------------------------------------------------------------------------------------------
    # files

    def _step_path(self, step: int) -> Path:
        """The picture after a step; the last is the finest level of the pyramid."""
        if step == len(self.plans):
            return self.folder / "image.ome.zarr" / "0"
        return self.folder / "steps.zarr" / str(step)

    def _tile_path(self, step: int, row: int, column: int) -> Path:
        return self.folder / "tiles" / str(step) / f"{row:05d}" / f"{column:05d}.npy"

    def _journal(self, name: str) -> int:
        """How many rows of something are finished; see `_note`."""
        try:
            return int((self.folder / "journal" / name).read_text())
        except FileNotFoundError:
            return 0

    def _note(self, name: str, row: int) -> None:
        """Row `row` of something is finished, and with it all before."""
        write_atomic(self.folder / "journal" / name, str(row + 1))


def _of_one_shape(tiles: Sequence[Tile]) -> Iterator[list[Tile]]:
    for shape in dict.fromkeys(tile.made for tile in tiles):
        yield [tile for tile in tiles if tile.made == shape]


def _batch(pictures: Sequence[np.ndarray]) -> Tensor:
    return from_pil([Image.fromarray(pixels) for pixels in pictures])


def _write_array(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    write_atomic(path, buffer.getvalue())


def shrink(photo: Image.Image, start_px: int | None) -> Image.Image:
    """Lanczos-resize the short side down to `start_px`; a smaller photograph, or None, changes nothing."""
    if start_px is None or min(photo.size) <= start_px:
        return photo
    factor = start_px / min(photo.size)
    return photo.resize((round(photo.width * factor), round(photo.height * factor)), Image.Resampling.LANCZOS)


def prompt_mode(prompts: PromptMode | None, backbone: Backbone) -> PromptMode:
    """The mode asked for; without one, a prompt per tile where the backbone reads them, else one for all."""
    return prompts or ("tile" if backbone.reads_prompts else "global")


def enlarge(
    photo: str | Path | Image.Image,
    *,
    folder: str | Path,
    scale: float = 4,
    start_px: int | None = None,
    backbone: str | Backbone | Enlarge | None = None,
    prompter: str | Prompter | None = None,
    profile: str = "embedded",
    prompts: PromptMode | None = None,
    grid: int = 4,
    tile_px: int = 512,
    overlap_px: int = 128,
    seed: int = 0,
    batch_size: int = 1,
    max_factor: float = 4.0,
    device: str = "auto",
    precision: str = "auto",
    on_tile: OnTile = lambda step, tile: None,
) -> Enlargement:
    """Enlarge a whole photograph into `folder/image.ome.zarr`. The same call again goes on where it was.

    Args:
        photo: a file, or an image.
        folder: where the result goes.
        scale: magnification, any number above 1.
        start_px: reduce the photograph's short side to this first; None keeps it.
        backbone, prompter, profile, device, precision: see `zooming.zoom`.
        prompts: `global`, one for all; `tile`, one for each tile; `grid`, one for each `grid` x `grid` tiles; None is `tile`
            for a backbone that reads prompts and `global` for others.
        tile_px, overlap_px: see `tiling.plan_tiles`.
        seed: of everything random.
        batch_size: tiles per call of the backbone; changes nothing but speed.
        max_factor: of one step.
        on_tile: called after each tile, (step, tile).

    Raises:
        UserError: a mistake in any of these, said before any weights load.
    """
    image = photo.convert("RGB") if isinstance(photo, Image.Image) else read_photo(photo, min_side_px=8)
    factors = plan_factors(scale, max_factor)
    built = build_parts(backbone=backbone, prompter=prompter, profile=profile, device=device, precision=precision)
    settings = EnlargeSettings(
        *built, prompt_mode(prompts, built[0]), grid, tile_px, overlap_px, seed=seed, batch_size=batch_size
    )
    return Enlarger(shrink(image, start_px), Path(folder), factors=factors, settings=settings).run(on_tile)

"""Tiles: their plan, their seams, prompts, resuming after a kill, and what other programs read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import coz
from coz.backbones.interpolation import Interpolation
from coz.errors import UserError
from coz.image import from_pil, resize, to_uint8
from coz.tiling import Box, plan_tiles, seam_score

pytest.importorskip("zarr")


def noise(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def read_all(result):
    height, width = result.size
    return result.pyramid.read(0, Box(0, 0, height, width))


@pytest.mark.parametrize("factor", [4, 2, 1.5, 3.3, 4 / 3])
@pytest.mark.parametrize("size", [(5, 7), (64, 64), (100, 333), (257, 129)])
def test_every_pixel_is_covered_and_weights_add_to_one(size, factor):
    plan = plan_tiles(size, factor, tile_px=128, overlap_px=32)
    assert float(plan.ratio) == pytest.approx(factor, rel=0.01)
    total = np.zeros(plan.target_size)
    for row in range(plan.rows):
        for column in range(plan.columns):
            tile = plan.tile(row, column)
            rows, columns = tile.target.within(Box(0, 0, *plan.target_size))
            total[rows, columns] += np.outer(plan.weights(0, row), plan.weights(1, column))
            scaled = Fraction(tile.source.top) * plan.ratio, Fraction(tile.source.left) * plan.ratio
            assert scaled == (tile.target.top, tile.target.left)
    assert total == pytest.approx(np.ones(plan.target_size), abs=1e-5)
    blocks = [plan.block(r, c) for r in range(plan.block_rows) for c in range(plan.block_columns)]
    assert sum(block.height * block.width for block in blocks) == np.prod(plan.target_size)


@pytest.mark.parametrize("scale", [4, 6, 16])
def test_nearest_in_tiles_is_nearest_of_the_whole(tmp_path, scale):
    photo = noise(40, 70)
    result = coz.enlarge(photo, folder=tmp_path, scale=scale, backbone="nearest", tile_px=128, overlap_px=32)
    whole = from_pil(photo)
    for factor in (4, scale / 4) if scale > 4 else (4,):
        whole = resize(whole, (round(whole.shape[-2] * factor), round(whole.shape[-1] * factor)), "nearest")
    assert np.array_equal(read_all(result), to_uint8(whole)[0])


def test_bicubic_in_tiles_shows_no_seam(tmp_path):
    photo = noise(150, 150)
    result = coz.enlarge(photo, folder=tmp_path, scale=4, backbone="bicubic", tile_px=256, overlap_px=64)
    tiled, whole = read_all(result), to_uint8(resize(from_pil(photo), 600))[0]
    assert np.abs(tiled.astype(int) - whole).max() <= 1
    borders = result.plans[0].borders(0), result.plans[0].borders(1)
    assert seam_score(tiled, borders) == pytest.approx(seam_score(whole, borders), rel=0.02)
    assert result.seams()[0] == pytest.approx(1, abs=0.02)


def toned(lr, size):
    """A backbone whose tone differs from tile to tile, as generative ones' does."""
    x = resize(lr, size)
    return (x + 0.15 * (float(lr.mean() * 1e4) % 1 - 0.5)).clamp(0, 1)


def test_the_seam_score_sees_hard_borders_and_weights_remove_them(tmp_path):
    photo = Image.fromarray((np.asarray(noise(200, 200)) // 4 + 80).astype(np.uint8))
    scores = {}
    for overlap_px in (0, 64):
        folder = tmp_path / str(overlap_px)
        result = coz.enlarge(photo, folder=folder, scale=4, backbone=toned, tile_px=160, overlap_px=overlap_px)
        plan = result.plans[0]
        borders = plan.borders(0), plan.borders(1)
        clean = seam_score(to_uint8(resize(from_pil(photo), 800))[0], borders)
        scores[overlap_px] = seam_score(read_all(result), borders) / clean
        assert result.seams()[0] == pytest.approx(scores[overlap_px], rel=0.25)
    assert scores[0] > 1.5
    assert scores[64] - 1 < 0.1 * (scores[0] - 1)


class Counting(Interpolation):
    def __init__(self, fail_after=None):
        super().__init__(resampling="bicubic")
        self.sizes, self.fail_after = [], fail_after

    def __call__(self, lr, **settings):
        if self.fail_after is not None and len(self.sizes) >= self.fail_after:
            raise KeyboardInterrupt
        self.sizes.append(tuple(lr.shape))
        return super().__call__(lr, **settings)


@pytest.mark.parametrize("fail_after", [0, 3, 11, 24, 40])
def test_an_interrupted_run_goes_on(tmp_path, fail_after):
    photo = noise(60, 50)
    settings = {"scale": 16, "prompter": "null", "tile_px": 256, "overlap_px": 64}
    whole = coz.enlarge(photo, folder=tmp_path / "whole", backbone=Counting(), **settings)
    tiles = sum(plan.rows * plan.columns for plan in whole.plans)
    first, second = Counting(fail_after), Counting()
    if fail_after < tiles:
        with pytest.raises(KeyboardInterrupt):
            coz.enlarge(photo, folder=tmp_path / "cut", backbone=first, **settings)
    result = coz.enlarge(photo, folder=tmp_path / "cut", backbone=second, **settings)
    assert len(first.sizes) + len(second.sizes) == tiles if fail_after < tiles else True
    assert np.array_equal(read_all(result), read_all(whole))
    assert not any(path.suffix == ".npy" for path in (tmp_path / "cut").rglob("*"))
    third = Counting()
    coz.enlarge(photo, folder=tmp_path / "cut", backbone=third, **settings)
    assert not third.sizes


SLOW = """
import sys, time
import numpy as np
from PIL import Image
import coz
from coz.backbones.interpolation import Interpolation

class Slow(Interpolation):
    def __call__(self, lr, **settings):
        time.sleep(float(sys.argv[3]))
        made = super().__call__(lr, **settings)
        return made

def note(step, tile):
    with open(sys.argv[2], "a") as file:
        file.write(f"{step} {tile.row} {tile.column}\\n")

photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))
coz.enlarge(photo, folder=sys.argv[1], scale=16, backbone=Slow(resampling="bicubic"), prompter="null", tile_px=256,
            overlap_px=64, on_tile=note)
"""


def test_a_kill_redoes_no_finished_tile(tmp_path):
    log = tmp_path / "tiles.log"
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run"), str(log)]
    process = subprocess.Popen([*command, "0.1"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 6):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = log.read_text().splitlines()
    assert len(before) >= 6
    subprocess.run([*command, "0"], check=True, timeout=120)
    every = log.read_text().splitlines()
    assert len(every) > len(before)
    assert len(set(every)) == len(every)  # none twice
    # A kill between a tile's file and its line may lose the line, never the tile.
    plans = [plan_tiles(size, 4, tile_px=256, overlap_px=64) for size in ((60, 50), (240, 200))]
    assert len(every) >= sum(plan.rows * plan.columns for plan in plans) - 1


class Naming:
    """A prompter that counts."""

    def __init__(self):
        self.seen = []

    @property
    def fingerprint(self):
        return {"name": "naming", "weights": None}

    def load(self):
        pass

    def __call__(self, current, context, *, seeds=None):
        self.seen.append((tuple(current.shape), None if context is None else tuple(context.shape)))
        return [f"words {len(self.seen)}"] * len(current)


class Reading(Counting):
    reads_prompts = True

    def __init__(self):
        super().__init__()
        self.prompts = []

    def __call__(self, lr, *, prompts=None, **settings):
        self.prompts += prompts
        return super().__call__(lr, **settings)


@pytest.mark.parametrize(("mode", "asked"), [("global", 1), ("tile", 4 * 3), ("grid", 2 * 2), (None, 4 * 3)])
def test_prompts(tmp_path, mode, asked):
    prompter, backbone = Naming(), Reading()
    settings = {"scale": 4, "prompts": mode, "grid": 2, "tile_px": 128, "overlap_px": 32, "backbone": backbone}
    coz.enlarge(noise(100, 80), folder=tmp_path, prompter=prompter, **settings)
    assert len(prompter.seen) == asked
    assert len(set(backbone.prompts)) == asked
    assert len(backbone.prompts) == 4 * 3
    if mode != "global":
        assert prompter.seen[0] == ((1, 3, 128, 128), (1, 3, 128, 128))


def test_batches_change_nothing(tmp_path):
    photo = noise(60, 50)
    settings = {"scale": 4, "backbone": "bicubic", "tile_px": 128, "overlap_px": 32}
    one = coz.enlarge(photo, folder=tmp_path / "1", **settings)
    three = coz.enlarge(photo, folder=tmp_path / "3", batch_size=3, **settings)
    assert np.array_equal(read_all(one), read_all(three))


def test_other_programs_read_it(tmp_path):
    import tifffile
    import zarr

    result = coz.enlarge(noise(150, 200), folder=tmp_path / "run", scale=4, backbone="bicubic")
    group = zarr.open_group(str(tmp_path / "run" / "image.ome.zarr"), mode="r")
    assert [group[d["path"]].shape for d in group.attrs["ome"]["multiscales"][0]["datasets"]] == [(3, 600, 800), (3, 300, 400)]
    picture = read_all(result)
    half = picture.reshape(300, 2, 400, 2, 3).mean((1, 3))
    assert np.abs(result.pyramid.read(1, Box(0, 0, 300, 400)) - half).max() <= 0.5
    result.write_bigtiff(tmp_path / "big.tif")
    with tifffile.TiffFile(tmp_path / "big.tif") as file:
        assert file.is_bigtiff
        assert np.array_equal(file.pages[0].asarray(), picture)
        assert len(file.series[0].levels) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile_px": 64, "overlap_px": 96}, "overlap_px=96"),
        ({"prompts": "some"}, "prompts=some"),
        ({"prompts": "grid", "grid": 0}, "grid=0"),
        ({"scale": 0.5}, "scale=0.5"),
        ({"scale": 4096}, "GB free"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        coz.enlarge(noise(600, 600), folder=tmp_path, backbone="bicubic", **settings)


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    coz.enlarge(noise(20, 20), folder=tmp_path, scale=4, backbone="bicubic")
    with pytest.raises(UserError, match="another backbone"):
        coz.enlarge(noise(20, 20), folder=tmp_path, scale=4, backbone="nearest")


def test_the_command(tmp_path):
    noise(40, 40).save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "coz.apps.enlarge", f"image={tmp_path}/photo.png", "scale=6", "backbone=bicubic"]
    command += [f"outputs={tmp_path}/out", "tiff=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "240 x 240 px" in done.stdout
    assert list(tmp_path.glob("out/enlarge/photo_6x_*/image.tif"))

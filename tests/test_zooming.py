"""Zooms into any place, shape and scale; their files; the film."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import coz
from coz.apps.arguments import friendly
from coz.backbones.interpolation import Interpolation
from coz.errors import UserError
from coz.film import film_frames, matched
from coz.framing import Rect, between, frame_of
from coz.image import resize
from coz.prompters.null import NullPrompter
from coz.zooming import plan_route


@pytest.fixture
def photo():
    """A gradient that says where a pixel lies: red is x, green is y."""
    height, width = 300, 450
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x / width * 255, y / height * 255, np.full_like(x, 128)], -1).astype(np.uint8))


def enlarge(lr, size):
    return resize(lr, size, "bicubic")


def test_import_is_light():
    code = "import coz, sys; assert 'torch' not in sys.modules; coz.zoom; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("scale", [4, 10, 64])
def test_the_last_state_shows_the_place_asked_for(photo, scale):
    zoom = coz.zoom(photo, scale=scale, at=(0.31, 0.62), backbone=enlarge, state_px=64)
    assert zoom.states[0].image.size == (96, 64)
    last = zoom.states[-1]
    assert last.scale == pytest.approx(scale, rel=0.15)  # whole pixels of a small state
    assert last.rect.center == pytest.approx((0.31, 0.62), abs=0.5 / 64)
    red, green, _ = np.asarray(last.image).reshape(-1, 3).mean(0) / 255
    assert (red, green) == pytest.approx(last.rect.center, abs=0.01)


def test_at_the_border_the_view_stays_inside(photo):
    zoom = coz.zoom(photo, scale=16, at=(1.0, 0.0), backbone=enlarge, state_px=64)
    rect = zoom.states[-1].rect
    assert rect.left + rect.width == pytest.approx(1.0)
    assert rect.top == pytest.approx(zoom.states[0].rect.top)


def test_a_region_uses_the_photographs_own_pixels():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    zoom = coz.zoom(noise, scale=4, region=(0.25, 0.5, 0.125, 0.125), backbone=enlarge, state_px=64)
    assert np.array_equal(np.asarray(zoom.states[0].image), np.asarray(noise)[256:320, 128:192])


def test_points_are_fractions_of_each_state(photo):
    zoom = coz.zoom(photo, scale=16, at=[(0.0, 0.0), (1.0, 1.0)], backbone=enlarge, state_px=64)
    first, second = zoom.states[1].rect, zoom.states[2].rect
    assert (first.left, first.top) == pytest.approx((0, zoom.states[0].rect.top))
    assert second.left + second.width == pytest.approx(first.left + first.width)


def test_a_path_visits_its_rectangles(photo):
    path = [(0.2, 0.2, 0.5, 0.5), (0.6, 0.6, 0.05, 0.05)]
    zoom = coz.zoom(photo, path=path, backbone=enlarge, state_px=128)
    assert [round(state.scale) for state in zoom.states] == [1, 2, 8, 20]
    assert zoom.states[1].rect.center == pytest.approx((0.45, 0.45), abs=0.01)
    assert zoom.states[-1].rect.center == pytest.approx((0.625, 0.625), abs=0.01)


def test_auto_finds_the_only_structure():
    canvas = np.full((256, 384, 3), 128, np.uint8)
    canvas[180:220:8, 40:80] = 0
    zoom = coz.zoom(Image.fromarray(canvas), scale=4, at="auto", backbone=enlarge, state_px=128)
    rect = zoom.states[-1].rect
    assert rect.left <= 40 / 384
    assert rect.left + rect.width >= 80 / 384
    assert rect.top <= 180 / 256


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"at": (1.2, 0.5)}, "between 0 and 1"),
        ({"at": "left"}, "at=left"),
        ({"at": [(0.5, 0.5)]}, "1 points for 3 steps"),
        ({"scale": 1}, "out of range"),
        ({"scale": 1e9}, "out of range"),
        ({"state_px": 100}, "multiple of 16"),
        ({"aspect": "wide"}, "aspect=wide"),
        ({"region": (0.5, 0.5, 0.6, 0.1)}, "inside the photograph"),
        ({"region": (0.0, 0.0, 0.5, 0.5), "at": (0.9, 0.9)}, "outside the region"),
        ({"path": [(0.2, 0.2, 0.2, 0.2), (0.7, 0.7, 0.1, 0.1)]}, r"path\[1\]"),
        ({"prompts": {4: "fur"}}, "step 4"),
        ({"prompts": "fur"}, "prompts=fur"),
        ({"rounding": "up"}, "rounding=up"),
        ({"seed": "x"}, "seed=x"),
        ({"backbone": 3}, "backbone=3"),
        ({"backbone": "spam"}, "did you mean span"),
        ({"backbone": lambda lr, size: lr}, "instead of"),
    ],
)
def test_mistakes_are_named(photo, settings, words):
    with pytest.raises(UserError, match=words):
        coz.zoom(photo, **{"backbone": enlarge, "prompter": "null", **settings})


def test_by_name_and_without_a_profiles_models(photo):
    by_name = coz.zoom(photo, scale=4, backbone="bicubic", prompter="null", state_px=64)
    assert np.array_equal(by_name.image, coz.zoom(photo, scale=4, backbone=enlarge, state_px=64).image)


@pytest.mark.parametrize("kind", ["array", "levels", "pillow", "chw"])
def test_what_a_function_may_return(photo, kind):
    def backbone(lr, size):
        image = resize(lr, size)
        levels = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        return {"array": levels / 255.0, "levels": levels, "pillow": Image.fromarray(levels), "chw": image[0]}[kind]

    expected = coz.zoom(photo, scale=4, backbone=enlarge, state_px=64).image
    assert np.array_equal(coz.zoom(photo, scale=4, backbone=backbone, state_px=64).image, expected)


class Counting(Interpolation):
    calls = 0

    def __call__(self, lr, **settings):
        self.calls += 1
        return super().__call__(lr, **settings)


def test_a_store_goes_on_from_what_is_there(photo, tmp_path):
    backbone = Counting(resampling="bicubic")
    settings = {"scale": 64, "backbone": backbone, "prompter": NullPrompter(), "state_px": 64, "store": tmp_path}
    first = coz.zoom(photo, **settings)
    assert backbone.calls == 3
    again = coz.zoom(photo, **settings)
    assert backbone.calls == 3
    assert np.array_equal(first.image, again.image)
    edited = coz.zoom(photo, prompts={2: "fur"}, **settings)  # steps 2 and 3 anew
    assert backbone.calls == 5
    assert edited.prompts == ["", "fur", ""]


def test_files(photo, tmp_path):
    zoom = coz.zoom(photo, scale=10, backbone=enlarge, state_px=64, prompts={1: "sky"})
    zoom.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"0_1x.png", "1_4x.png", "prompts.txt", "zoom.json", "strip.png"}
    assert (tmp_path / "prompts.txt").read_text().startswith("4x\tsky\n")


# ---------------------------------------------------------------------------------------------------------------------
# film


def test_the_flight_never_leaves_its_ends():
    first, last = Rect(0, 0, 1, 1), Rect(0.6, 0.1, 0.25, 0.25)
    for factor in np.geomspace(1, 4, 9):
        rect = between(first, last, factor)
        assert rect.width == pytest.approx(1 / factor)
        assert -1e-9 <= rect.left <= last.left + 1e-9
    assert between(first, last, 4) == last


def grainy(seed, tone):
    """A backbone that enlarges, adds grain and shifts the tone, as generative ones may."""
    generator = torch.Generator().manual_seed(seed)

    def backbone(lr, size):
        x = resize(lr, size)
        return (x + 0.01 * torch.randn(x.shape, generator=generator) + tone).clamp(0, 1)

    return backbone


def roughness(frames):
    """How much a frame's change may exceed both its neighbours': 1 or less is smooth motion."""
    steps = [np.abs(b.astype(float) - a.astype(float)).mean() for a, b in itertools.pairwise(frames)]
    return max(here / max(before, after) for before, here, after in zip(steps, steps[1:], steps[2:], strict=False) if here > 1)


def test_no_jump_between_scales(photo):
    zoom = coz.zoom(photo, scale=16, at=(0.3, 0.6), backbone=grainy(0, 0.1), state_px=64)
    frames = list(film_frames(zoom.states, fps=20, seconds_per_step=1.5))
    assert len(frames) == 20 * (2 * 1.5 + 0.5 + 1.0)
    assert roughness(frames) < 1.3
    cut = [*frames[:40], *frames[55:]]
    assert roughness(cut) > 1.5  # the measure sees a jump
    tones = [frame[..., 2].mean() for frame in frames]  # blue is constant in the photograph
    assert max(tones) - min(tones) < 6
    unmatched = list(film_frames(zoom.states, fps=20, seconds_per_step=1.5, color_match="none"))
    assert max(frame[..., 2].mean() for frame in unmatched) - min(frame[..., 2].mean() for frame in unmatched) > 25


def test_the_film_begins_and_ends_with_the_states(photo):
    zoom = coz.zoom(photo, scale=10, at=(0.3, 0.6), backbone=enlarge, state_px=64)
    frames = list(film_frames(zoom.states, fps=5, seconds_per_step=1))
    assert np.array_equal(frames[0], np.asarray(zoom.states[0].image))
    last = (matched(zoom.states)[-1] * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(frames[-1] - last).max() <= 1


def test_a_film_is_written_whole(photo, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    zoom = coz.zoom(photo, scale=4, backbone=enlarge, state_px=64)
    zoom.save(tmp_path, film=True, fps=10, seconds_per_step=1)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    about = next(reader)
    assert about["size"] == (96, 64)
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "film.mp4"))[0] == 25
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_what_people_type():
    typed = ["image=my photo (1), it's.jpg", "at=0.31,0.62", "region=0,0,.5,.5", "aspect=16:9", "at=auto", "scale=64"]
    assert friendly(typed) == [
        r"image='my photo (1), it\'s.jpg'",
        "at=[0.31,0.62]",
        "region=[0,0,.5,.5]",
        "aspect='16:9'",
        "at=auto",
        "scale=64",
    ]


def test_the_command(photo, tmp_path):
    photo.save(tmp_path / "a photo, of=mine.png")
    command = [sys.executable, "-m", "coz.apps.zoom", f"image={tmp_path}/a photo, of=mine.png", "scale=10", "at=0.31,0.62"]
    command += ["backbone=bicubic", "prompter=null", "state_px=64", f"outputs={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 2  10" in done.stdout or "step 2  9" in done.stdout
    assert list(tmp_path.glob("out/zoom/*/strip.png"))
    wrong = subprocess.run([*command, "at=2,2"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "lies outside the picture" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_frame_has_the_photographs_shape():
    frame = frame_of((4000, 3000), state_px=512)
    assert frame.size == (512, 688)
    assert frame.rect.width * 4000 / (frame.rect.height * 3000) == pytest.approx(688 / 512)
    tall = frame_of((4000, 3000), state_px=512, aspect="1:1", center=(0.9, 0.5))
    assert tall.rect.left + tall.rect.width == pytest.approx(1)


def test_any_scale_is_planned():
    for scale in (1.5, 3.7, 24, 100, 4096):
        assert math.prod(plan_route((512, 512), scale=scale).factors) == pytest.approx(scale)

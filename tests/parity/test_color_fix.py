"""The colour corrections equal OSEDiff's, by stage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from coz.image import adain_color_fix, from_pil, to_uint8, wavelet_color_fix, wavelet_low


def _picture(array: np.ndarray) -> torch.Tensor:
    return from_pil(Image.fromarray(array))


@pytest.fixture(scope="module")
def arrays(parity):
    folder = parity("color_fix")
    config = json.loads((folder / "config.json").read_text())
    return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "expected.npz")), config


@pytest.mark.parametrize(("method", "fix"), [("adain", adain_color_fix), ("wavelet", wavelet_color_fix)])
def test_color_fix_equals_the_release(arrays, method, fix):
    inputs, expected, config = arrays
    for pair in range(len(config["pairs"])):
        target, source = (_picture(inputs[f"pair{pair}_{part}_u8"]) for part in ("target", "source"))
        fixed = fix(target, source)
        recorded = expected[f"pair{pair}_{method}_f32_before_clamp"]
        np.testing.assert_allclose(fixed[0].numpy(), recorded, rtol=0, atol=config["tolerance"]["f32"]["atol"])

        levels = to_uint8(fixed, rounding="truncate")[0].astype(int)
        difference = np.abs(levels - expected[f"pair{pair}_{method}_u8"].astype(int))
        exact = np.abs(255 * recorded - np.rint(255 * recorded)).transpose(1, 2, 0) > 1e-3
        assert difference.max() <= 1
        assert difference[exact].max() == 0


def test_wavelet_low_part_equals_the_release(arrays):
    inputs, expected, config = arrays
    low = wavelet_low(_picture(inputs["pair0_target_u8"]))
    atol = config["tolerance"]["f32"]["atol"]
    np.testing.assert_allclose(low[0].numpy(), expected["pair0_target_wavelet_low_f32"], rtol=0, atol=atol)

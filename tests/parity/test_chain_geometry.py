"""Crops, resizes and quantisation along the released chain, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from coz.backbones.interpolation import Interpolation
from coz.chain import StepSettings, zoom_chain
from coz.image import fix_color, from_pil, quantize, resize, start_state, view_at
from coz.prompters.null import NullPrompter


@pytest.fixture(scope="module")
def chain(parity):
    folder = parity("osediff_sd3") / "chain"
    if not folder.is_dir():
        pytest.skip("this parity set has no chain")
    return folder, json.loads((folder / "chain.json").read_text())


def _read(path) -> torch.Tensor:
    return from_pil(Image.open(path))


def _equal(ours: torch.Tensor, recorded: torch.Tensor) -> bool:
    return bool(np.array_equal(ours.numpy(), recorded.numpy()))


def test_start_state(chain):
    folder, info = chain
    start = start_state(Image.open(folder / "source.png").convert("RGB"), info["process_size"])
    assert _equal(start, _read(folder / "nearest__null" / "0.png"))


@pytest.mark.parametrize("kind", ["nearest", "bicubic"])
def test_interpolated_runs(chain, kind):
    """Each is a direct enlargement of the start state at every scale."""
    folder, info = chain
    run = folder / f"{kind}__null"
    settings = StepSettings(backbone=Interpolation(resampling=kind), prompter=NullPrompter())
    for step in range(1, info["rec_num"] + 1):
        (state,) = zoom_chain(_read(run / "0.png"), factors=[float(info["upscale"] ** step)], settings=settings)
        assert _equal(state.images, _read(run / f"{step}.png")), f"{kind} step {step}"


def test_inputs_of_direct_runs(chain):
    folder, info = chain
    side = info["process_size"]
    checked = 0
    for run in sorted(folder.glob("onestep__*")):
        for step in range(1, info["rec_num"] + 1):
            start = _read(run / "0.png")
            view = view_at(side, float(info["upscale"] ** step)).crop(start)
            assert _equal(resize(view, side), _read(run / f"0_input_for_{step}.png")), f"{run.name} step {step}"
            checked += 1
    assert checked


def test_inputs_of_chain_steps(chain):
    folder, info = chain
    side = info["process_size"]
    checked = 0
    for run in sorted(folder.glob("recursive*")):
        for step in range(1, info["rec_num"] + 1):
            before = _read(run / f"{step - 1}.png")
            view = view_at(side, float(info["upscale"])).crop(before)
            assert _equal(resize(view, side), _read(run / f"{step}_input.png")), f"{run.name} step {step}"
            checked += 1
    assert checked


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_color_fix_of_a_recorded_step(chain, method):
    folder, _ = chain
    target, source = _read(folder / "recursive__null" / "1.png"), _read(folder / "recursive__null" / "1_input.png")
    fixed = quantize(fix_color(target, source, method), rounding="truncate")
    assert float((fixed - _read(folder / "colorfix" / f"{method}.png")).abs().max()) <= 1.01 / 255

"""Metrics by known answers and by published figures."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from coz.checkpoint import WeightsNotFound
from coz.image import View, resize, to_pil
from coz.metrics import ConsistencyInput, ConsistencyStep, ConsistencyStepLpips, Niqe, Sample, psnr
from coz.perceptual import load_lpips


@pytest.fixture(scope="module")
def published(parity, data_dir):
    folder = parity("realsr_metrics")
    rows = list(csv.DictReader((folder / "realsr_osediff.csv").open()))
    return rows, data_dir / "realsr"


def test_niqe_equals_the_published_values(published):
    rows, pictures = published
    niqe = Niqe()
    values = [niqe.score(np.asarray(Image.open(pictures / "sr_osediff" / row["file"]).convert("RGB"))) for row in rows]
    theirs = np.array([float(row["published_niqe"]) for row in rows])
    assert np.abs(np.array(values) - theirs).max() < 0.003
    assert np.mean(values) == pytest.approx(5.6476, abs=0.0002)


def test_niqe_in_cpu_arithmetic(published):
    rows, pictures = published
    niqe = Niqe(arithmetic="cpu")
    for row in rows[:5]:
        value = niqe.score(np.asarray(Image.open(pictures / "sr_osediff" / row["file"]).convert("RGB")))
        assert value == pytest.approx(float(row["niqe"]), abs=1e-6)
        assert value == pytest.approx(float(row["published_niqe"]), abs=0.05)


def test_lpips_equals_the_published_values(published):
    rows, pictures = published
    try:
        net = load_lpips("alex")
    except WeightsNotFound as error:
        pytest.skip(str(error))
    for row in rows[:6]:
        sr, hr = (
            torch.from_numpy(np.asarray(Image.open(pictures / kind / row["file"]).convert("RGB")).copy()).permute(2, 0, 1)[None]
            / 255
            for kind in ("sr_osediff", "hr")
        )
        with torch.inference_mode():
            value = float(net(sr, hr, normalize=True))
        assert value == pytest.approx(float(row["lpips_alex"]), abs=1e-5)
        assert value == pytest.approx(float(row["published_lpips"]), abs=0.0005)


def test_psnr_of_a_known_error():
    a, b = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)
    assert psnr(a, b) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a) == pytest.approx(80)


@pytest.fixture
def sample(tmp_path):
    """A start state and its centre enlarged 4 times, by nearest neighbours: nothing lost, nothing invented."""
    start = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    to_pil(start)[0].save(tmp_path / "start.png")
    view = View(left_px=24, top_px=24, size_px=16)
    output = resize(view.crop(start), 64, "nearest")
    to_pil(output)[0].save(tmp_path / "out.png")
    paths = {"image": tmp_path / "out.png", "parent": tmp_path / "start.png", "start": tmp_path / "start.png"}
    return Sample(**paths, view=view, region=(0.375, 0.375, 0.25))


def _shift(path, levels):
    array = np.asarray(Image.open(path)).astype(int) + levels
    Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(path)


def test_consistency_of_an_honest_enlargement_is_perfect(sample):
    assert ConsistencyStep()(sample) == pytest.approx(80)
    assert ConsistencyInput()(sample) == pytest.approx(80)


def test_consistency_sees_what_was_changed(sample):
    _shift(sample.image, 20)
    assert ConsistencyStep()(sample) < 25
    assert ConsistencyInput()(sample) < 25


def test_input_consistency_samples_a_region_between_pixels(sample):
    shifted = Sample(**{**sample.__dict__, "region": (0.375 + 0.25 / 64, 0.375, 0.25)})
    assert 10 < ConsistencyInput()(shifted) < 40


def test_step_lpips_is_nil_for_an_honest_enlargement_and_rises(sample):
    try:
        metric = ConsistencyStepLpips()
    except WeightsNotFound as error:
        pytest.skip(str(error))
    assert metric(sample) == pytest.approx(0, abs=1e-6)
    Image.fromarray(255 - np.asarray(Image.open(sample.image))).save(sample.image)
    assert metric(sample) > 0.3


def test_identities_are_plain_and_complete():
    for metric in (Niqe(), ConsistencyStep(), ConsistencyInput()):
        identity = json.loads(json.dumps(dict(metric.identity)))
        assert identity["metric"] == metric.name
    assert Niqe().identity["pyiqa"]
    assert Niqe().identity != Niqe(arithmetic="cpu").identity


def test_a_missing_trunk_says_how_to_get_it(tmp_path):
    with pytest.raises(WeightsNotFound, match="nowhere"):
        ConsistencyStepLpips(weights=str(tmp_path / "nowhere.pth"))

"""Metrics against a truth: published values, known answers, and where the truth of a magnification lies."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from coz.checkpoint import WeightsNotFound
from coz.data.photos import list_photos
from coz.errors import UserError
from coz.evaluation import Plan, Reference, StateMaker
from coz.full_reference import Dists, Lpips, PsnrY, SsimY
from coz.image import View, resize
from coz.learned_metrics import LearnedMetric
from coz.measuring import sample_of
from coz.metrics import Sample, Truth
from coz.prompters.null import NullPrompter
from coz.store import StateStore


def _pair(folder, file):
    sr = folder / "sr_osediff" / file
    return Sample(image=sr, parent=sr, view=View(0, 0, 1), start=sr, region=(0.0, 0.0, 1.0), truth=Truth(folder / "hr" / file))


@pytest.mark.parametrize(
    ("build", "ours", "published", "atol", "to_published"),
    [
        (PsnrY, "psnr_y", "published_psnr", 1e-4, 1e-4),
        (SsimY, "ssim_y", "published_ssim", 1e-5, 1e-5),
        (Lpips, "lpips_alex", "published_lpips", 2e-5, 5e-4),
    ],
)
def test_values_equal_the_published_ones(parity, data_dir, build, ours, published, atol, to_published):
    rows = list(csv.DictReader((parity("realsr_metrics") / "realsr_osediff.csv").open()))
    metric = build()
    for row in rows[::25]:
        value = metric(_pair(data_dir / "realsr", row["file"]))
        assert value == pytest.approx(float(row[ours]), abs=atol)
        assert value == pytest.approx(float(row[published]), abs=to_published)


def test_dists_equals_the_published_values(parity, data_dir):
    rows = list(csv.DictReader((parity("realsr_metrics") / "realsr_osediff_dists.csv").open()))
    try:
        metric = Dists()
    except WeightsNotFound as error:
        pytest.skip(str(error))
    for row in rows[:2]:
        value = metric(_pair(data_dir / "realsr", row["file"]))
        assert value == pytest.approx(float(row["dists"]), abs=2e-5)
        assert value == pytest.approx(float(row["published_dists"]), abs=5e-4)


def test_unequal_sizes_are_refused(tmp_path):
    for name, size in (("a.png", (32, 32)), ("b.png", (32, 40))):
        Image.new("RGB", size).save(tmp_path / name)
    a = tmp_path / "a.png"
    sample = Sample(image=a, parent=a, view=View(0, 0, 1), start=a, region=(0, 0, 1), truth=Truth(tmp_path / "b.png"))
    with pytest.raises(ValueError, match=r"\(40, 32\)"):
        PsnrY()(sample)
    with pytest.raises(ValueError, match="has none"):
        PsnrY()(Sample(**{**sample.__dict__, "truth": None}))


# ---------------------------------------------------------------------------------------------------------------------
# the truth of a magnification


class Bicubic:
    reads_prompts = False
    fingerprint = {"name": "bicubic", "weights": None}

    def load(self):
        pass

    def __call__(self, lr, *, size, prompts=None, seeds=None):
        return resize(lr, size)


@pytest.fixture
def photo(tmp_path):
    """A large smooth photograph, sides neither equal nor multiples, over which every region looks different."""
    y, x = np.mgrid[0:520, 0:700]
    array = np.stack([x * 255 / 700, y * 255 / 520, 127 + 90 * np.sin(x / 40) * np.cos(y / 50)], axis=-1)
    (tmp_path / "photos").mkdir()
    Image.fromarray(array.astype(np.uint8)).save(tmp_path / "photos" / "a.png")
    return list_photos(path=tmp_path / "photos")


def _lineage(tmp_path, photo, scale, reference, at="centre"):
    from coz.chain import StepSettings, plan_factors

    plan = Plan(factors=plan_factors(scale), at=at, start_px=64, reference=reference)
    settings = StepSettings(backbone=Bicubic(), prompter=NullPrompter())
    (lineage,) = StateMaker(store=StateStore(tmp_path / "states"), settings=settings, plan=plan).run(photo)
    return lineage


@pytest.mark.parametrize(("scale", "at"), [(2, "centre"), (4, "centre"), (4, (0.3, 0.6)), (8, (0.7, 0.4))])
def test_the_truth_is_the_part_of_the_photograph_that_the_output_shows(tmp_path, photo, scale, at):
    sample = sample_of(_lineage(tmp_path, photo, scale, Reference(8, 64), at))
    truth = sample.truth.read((64, 64))
    assert truth.shape == (1, 3, 64, 64)
    # A smooth photograph survives reduction and enlargement, so only a truth from the right place matches.
    assert PsnrY()(sample) > 33
    left, top, side = sample.truth.region
    shifted = Sample(**{**sample.__dict__, "truth": Truth(sample.truth.picture, 512, (left + side / 8, top, side))})
    assert PsnrY()(shifted) < PsnrY()(sample) - 3


def test_at_the_reduction_itself_the_truth_is_the_photographs_own_pixels(tmp_path, photo):
    sample = sample_of(_lineage(tmp_path, photo, 8, Reference(8, 64)))
    left, top, side = (round(edge * 512) for edge in sample.truth.region)
    assert side == 64
    with Image.open(photo[0].path) as image:
        corner = ((700 - 512) // 2 + left, (520 - 512) // 2 + top)
        crop = np.asarray(image.crop((*corner, corner[0] + side, corner[1] + side)))
    assert np.array_equal(sample.truth.read((64, 64))[0].permute(1, 2, 0).mul(255).round().byte().numpy(), crop)


def test_a_smaller_start_serves_a_larger_reduction(tmp_path, photo):
    sample = sample_of(_lineage(tmp_path, photo, 4, Reference(16, 32)))
    assert sample.truth.square_px == 512
    assert PsnrY()(sample) > 30
    with Image.open(sample.start) as start:
        assert start.size == (64, 64)


def test_a_photograph_too_small_for_the_reference_is_a_named_failure(tmp_path, photo):
    from coz.chain import StepSettings

    plan = Plan(factors=[4.0], start_px=64, reference=Reference(16, 64))
    settings = StepSettings(backbone=Bicubic(), prompter=NullPrompter())
    maker = StateMaker(store=StateStore(tmp_path / "states"), settings=settings, plan=plan)
    assert maker.run(photo) == []
    assert "1024 px" in maker.failures[0].reason


def test_a_reference_makes_other_states(tmp_path, photo):
    keys = {_lineage(tmp_path, photo, 4, reference).start.key for reference in (None, Reference(8, 64), Reference(4, 64))}
    assert len(keys) == 3


# ---------------------------------------------------------------------------------------------------------------------
# learned metrics


def test_missing_weights_name_the_file_and_its_source(tmp_path):
    for name, file in (
        ("musiq", "musiq_koniq_ckpt-e95806b9.pth"),
        ("maniqa-pipal", "MANIQA_PIPAL-ae6d356b.pth"),
        ("clipiqa", "RN50.pt"),
    ):
        with pytest.raises(WeightsNotFound, match=file) as caught:
            LearnedMetric(name=name, folder=str(tmp_path))
        assert "https://" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="maniqa is unknown"):
        LearnedMetric(name="maniqa", folder=str(tmp_path))


def test_musiq_from_a_folder_is_pyiqas_and_batches_change_nothing(tmp_path):
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.manual_seed(0)
    net = MUSIQ(pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "musiq_koniq_ckpt-e95806b9.pth")
    metric = LearnedMetric(name="musiq", folder=str(tmp_path), device="cpu")
    pictures = (torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    with torch.inference_mode():
        expected = [float(net(picture[None])) for picture in pictures]
    assert metric.scores(pictures) == pytest.approx(expected, abs=1e-5)
    Image.fromarray((pictures[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "a.png")
    a = tmp_path / "a.png"
    value = metric(Sample(image=a, parent=a, view=View(0, 0, 1), start=a, region=(0, 0, 1)))
    assert value == pytest.approx(expected[0], abs=1e-5)
    assert metric.identity["weights"]

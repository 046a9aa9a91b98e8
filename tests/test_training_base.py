"""The small base of a dry run: what it starts as, that it learns, and that another one is not taken for it."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coz.errors import UserError
from coz.models import sd2
from coz.models.sd3_sizes import SIZES
from coz.training.journal import CsvLog
from coz.training.sd21 import SD21Nets
from coz.training.tiny_autoencoder import start_as_thumbnail, teach_autoencoder
from coz.training.tiny_base import Lessons, ensure_tiny_sd21

ROOT = Path(__file__).parent.parent
GROUP = {"norm_num_groups": 1, "layers_per_block": 1}


def autoencoder():
    return sd2.build_random(lambda: sd2.build_vae(SIZES["tiny"].vae | GROUP), seed=0)


def pictures(number: int, count: int = 4) -> Tensor:
    """Smooth pictures in [-1, 1]."""
    low = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(number))
    return F.interpolate(low, size=(32, 32), mode="bicubic", align_corners=True).clamp(0, 1) * 2 - 1


def error(vae, x: Tensor) -> float:
    with torch.no_grad():
        return float((vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean())


def test_the_latent_starts_as_a_thumbnail():
    vae, x = autoencoder(), pictures(1)
    before = correlation(vae, x)
    start_as_thumbnail(vae)
    assert correlation(vae, x) > 0.97 > 0.7 > before


def correlation(vae, x: Tensor) -> float:
    with torch.no_grad():
        latent = vae.encode(x).latent_dist.mean[:, :3]
    return float(torch.corrcoef(torch.stack([latent.flatten(), F.avg_pool2d(x, 8).flatten()]))[0, 1])


def test_it_soon_draws_better_than_one_colour():
    vae, held = autoencoder(), pictures(10_000)
    flat = float((held - held.mean((-2, -1), keepdim=True)).square().mean())
    start_as_thumbnail(vae)
    teach_autoencoder(vae, pictures, steps=60)
    assert error(vae, held) < 0.6 * flat
    plain = autoencoder()
    teach_autoencoder(plain, pictures, steps=60)
    assert error(plain, held) > 1.2 * error(vae, held)


def test_a_base_of_other_settings_is_refused(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    folder = str(tmp_path / "base")
    lessons = Lessons(
        paths=[str(photos)],
        hold_out=1,
        crop_px=32,
        shrink_to_px=None,
        autoencoder_steps=1,
        denoiser_steps=1,
        batch_size=1,
        seed=0,
    )
    ensure_tiny_sd21(folder=folder, lessons=lessons)
    assert ensure_tiny_sd21(folder=folder, lessons=lessons) == folder
    nets = SD21Nets(weights=folder, device="cpu", precision="fp32")
    nets.load()
    assert nets.embed(["a cat"])[0].shape[1] == 77
    with pytest.raises(UserError, match=r"another hold_out; remove it"):
        ensure_tiny_sd21(folder=folder, lessons=replace(lessons, hold_out=2))


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "stages"), [("osediff_sd3", (60, 30)), ("osediff_sd21", (120, 80))])
def test_the_tiny_profile_learns(tmp_path, backbone, stages):
    """Both stages, SD3's shorter than the recipe; SD2.1 starts lower and needs it whole. Minutes."""
    last = str(sum(stages))
    command = [sys.executable, str(ROOT / "train_sr.py"), "profile=tiny", f"backbone={backbone}", f"outputs={tmp_path}"]
    command += [*(f"training.stages.{i}.steps={steps}" for i, steps in enumerate(stages)), f"training.validate_every={last}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = CsvLog(tmp_path / "train_sr" / "tiny" / "validation.csv").rows()

    def mean(name: str, step: str) -> float:
        values = [float(row[name]) for row in rows if row["step"] == step]
        return math.fsum(values) / len(values)

    assert mean("psnr", last) > mean("psnr", "0") + 2
    assert mean("psnr", last) > mean("psnr_constant_color", "0") + 2

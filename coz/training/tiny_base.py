"""A small base model that knows something, for dry runs: an autoencoder taught on a few photographs beside random networks.

Adapters can bring out only what the frozen base is able to do, and a random decoder cannot draw pictures. So a dry run of
the training first makes a base whose autoencoder works, once, in about a minute, and writes it as a folder in SD3's layout.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from coz.data.crops import CropDataset, Manifest
from coz.data.degradation import Bicubic
from coz.errors import UserError
from coz.models.sd3_source import TEXT_ENCODERS, RandomSource
from coz.store import explain_write_errors, remove_stale, stale_name

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")


def ensure_tiny_sd3(
    *,
    folder: str,
    paths: Sequence[str],
    hold_out: int,
    steps: int = 300,
    batch_size: int = 16,
    crop_px: int = 64,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> str:
    """Make the base unless its folder is there already; returns the folder. It appears whole or not at all.

    Args:
        paths, hold_out: the photographs, as in `Manifest`; those held out are not shown to it either.
        steps, batch_size, crop_px, learning_rate: of the autoencoder's training, falling to zero.
    """
    target = Path(folder)
    if target.is_dir():
        return folder
    if steps < 1:
        raise UserError(f"base.steps={steps} must be at least 1")
    source = RandomSource(size="tiny", seed=seed)
    vae = source.vae(dtype=torch.float32, device=_CPU)
    photos, _ = Manifest(paths=paths, hold_out=hold_out).split()
    crops = CropDataset(
        photos=photos,
        crop_px=crop_px,
        seed=seed,
        degradations=[(steps * batch_size, Bicubic())],
        on_device=True,
        remember=len(photos),
    )
    loss = _teach(vae, crops, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    logger.info("made %s: an autoencoder with a squared error of %.4f", folder, loss)
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        temporary = target.parent / stale_name(target.name)
        shutil.rmtree(temporary, ignore_errors=True)
        _write(temporary, source, vae)
        temporary.replace(target)
    return folder


def _teach(vae: nn.Module, crops: CropDataset, *, steps: int, batch_size: int, learning_rate: float) -> float:
    """Squared error of the decoded mode; returns the last one. Leaves latents of deviation 1 to the scaling factor."""
    vae.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    value = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 - step / steps)
        x = torch.stack([crops[step * batch_size + i].hr for i in range(batch_size)]) * 2 - 1
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.mean, return_dict=False)[0] - x).square().mean()
        # keeps the latents near the deviation that SD3's scaling factor expects, and the posterior narrow
        spread = (posterior.mean.std() * vae.config.scaling_factor - 1).square() + (posterior.logvar + 6).square().mean() / 100
        optimizer.zero_grad()
        (loss + 0.01 * spread).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        value = float(loss)
    vae.requires_grad_(False)
    return value


def _write(folder: Path, source: RandomSource, vae: nn.Module) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    source.transformer(dtype=torch.float32, device=_CPU).save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    for name in TEXT_ENCODERS:
        source.text_encoder(name, dtype=torch.float32).save_pretrained(folder / name)
        source.tokenizer(name).save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")

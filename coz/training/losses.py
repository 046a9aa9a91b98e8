"""Losses of OSEDiff (Wu et al. 2024, arXiv 2406.08177): pixels, LPIPS, and variational score distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coz.errors import UserError
from coz.training.diffusion import Process

Predict = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]  # (noisy latents, times, embeddings) → prediction

OSEDIFF_NEGATIVE = (
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG Style, 3D render, unreal engine, blurring, "
    "dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, lowres, over-smooth"
)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts; OSEDiff's values."""

    l2: float = 1.0
    lpips: float = 2.0
    vsd: float = 1.0
    regulariser: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise UserError(f"loss.{name}={value} must not be negative; 0 leaves the part out")


@dataclass(frozen=True)
class VSD:
    """How the distillation is computed.

    Args:
        guidance: classifier-free guidance of the teacher, 1 for none. OSEDiff: 7.5; the released SD3 code has none.
        negative_prompt: what the teacher is guided away from.
        floor: the least value that the gradient is divided by; 0 for no guard, as the released code.
    """

    guidance: float = 7.5
    negative_prompt: str = OSEDIFF_NEGATIVE
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise UserError(f"vsd.guidance={self.guidance} must be at least 1; 1 is without guidance")
        if self.floor < 0:
            raise UserError(f"vsd.floor={self.floor} must not be negative")


@torch.no_grad()
def vsd_gradient(
    latent: Tensor,
    *,
    noise: Tensor,
    times: Tensor,
    process: Process,
    student: Predict,
    teacher: Predict,
    embeds: tuple[Tensor, ...],
    negative: tuple[Tensor, ...],
    settings: VSD,
) -> Tensor:
    """The direction in which a latent is less likely: (x0 of the student - x0 of the teacher) / mean |z - x0 of the teacher|.

    Args:
        latent: (B, C, h, w), what the generator made.
        student: the network that follows the generator (the regulariser).
        teacher: the frozen network, guided.
        embeds, negative: of the prompts and of the negative prompt, first axis B.
    """
    latent = latent.detach().float()
    noisy = process.add_noise(latent, noise, times)
    from_student = process.estimate_clean(noisy, student(noisy, times, embeds).float(), times)
    prediction = guided(teacher, noisy, times, embeds, negative, guidance=settings.guidance)
    from_teacher = process.estimate_clean(noisy, prediction, times)
    weight = (latent - from_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (from_student - from_teacher) / weight.clamp(min=settings.floor)


def guided(
    predict: Predict, noisy: Tensor, times: Tensor, embeds: tuple[Tensor, ...], negative: tuple[Tensor, ...], *, guidance: float
) -> Tensor:
    """Classifier-free guidance: n + g (p - n), both predictions in one batch."""
    if guidance == 1:
        return predict(noisy, times, embeds).float()
    both = tuple(torch.cat([n, p]) for n, p in zip(negative, embeds, strict=True))
    without, prompted = predict(torch.cat([noisy, noisy]), torch.cat([times, times]), both).float().chunk(2)
    return without + guidance * (prompted - without)


def pull(latent: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in `latent` is 2 / n times `gradient`, and whose value is the gradient's mean square."""
    latent = latent.float()
    return (latent - (latent - gradient).detach()).square().mean()


def regulariser_loss(
    latent: Tensor, *, noise: Tensor, times: Tensor, process: Process, student: Predict, embeds: tuple[Tensor, ...]
) -> Tensor:
    """The student's own diffusion loss on what the generator made; nothing flows back into the generator."""
    clean = latent.detach().float()
    noisy = process.add_noise(clean, noise, times)
    prediction = student(noisy, times, embeds).float()
    return process.regression_loss(prediction, clean=clean, noise=noise, noisy=noisy, times=times)

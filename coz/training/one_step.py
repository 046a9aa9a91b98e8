"""OSEDiff's training of a one-step diffusion model (Wu et al. 2024, arXiv 2406.08177, Fig. 2), for any such model.

The generator restores; the regulariser, a diffusion model of what the generator makes, is compared with the frozen teacher,
and the difference pulls the generator. All three are one network with another adapter switched on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from coz.errors import UserError
from coz.training.diffusion import Process
from coz.training.losses import VSD, LossWeights, pull, regulariser_loss, vsd_gradient
from coz.training.pixel_losses import PixelLosses
from coz.training.trainee import Batch, Outcome, seeded_generators

GENERATOR, REGULARISER = "generator", "regulariser"
Embeds = tuple[Tensor, ...]


class OneStepNets(Protocol):
    """The networks of a one-step model over one frozen base, an `nn.Module`."""

    process: Process
    clamps_image: bool
    """Whether the pixel losses see the image clamped to [-1, 1], as SD2.1's released trainer has it."""

    def load(self) -> None: ...

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        """Switch to the generator, to the regulariser, or to the teacher (None)."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latent."""
        ...

    def embed(self, prompts: Sequence[str]) -> Embeds:
        """Embeddings of texts, without gradients."""
        ...

    def encode(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → latent; `noise` None takes the posterior's mode."""
        ...

    def restore_latent(self, latent: Tensor, embeds: Embeds) -> Tensor:
        """The one step."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latent → about [-1, 1]."""
        ...

    def predict(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor: ...

    def trained(self, adapter: str) -> Mapping[str, nn.Parameter]: ...

    def write(self, folder: Path) -> Mapping[str, str]: ...

    def write_released(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Draws:
    """Everything that the losses of a batch draw."""

    posterior: Tensor  # (B, C, h, w) standard normal, as the next two
    vsd_noise: Tensor
    regulariser_noise: Tensor
    vsd_uniform: Tensor  # (B,) in [0, 1), as the last
    regulariser_uniform: Tensor

    @staticmethod
    def of_samples(seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Draws:
        """By the samples' numbers alone."""
        rows = []
        for generator in seeded_generators(seed, indices):
            normal = torch.randn(3, *shape, generator=generator)
            rows.append((*normal, *torch.rand(2, generator=generator)))
        return Draws(*(torch.stack(column).to(device) for column in zip(*rows, strict=True)))


class OneStepTrainee(nn.Module):
    """A one-step diffusion model under training.

    Args:
        nets: the model.
        loss: weights of the parts.
        vsd: settings of the distillation.
        lpips_weights: a torchvision VGG16 checkpoint for LPIPS; None takes the packaged one.

    Raises:
        WeightsNotFound: LPIPS has a weight, and no VGG weights are on this machine.
    """

    enlarged = True

    def __init__(self, *, nets: OneStepNets, loss: LossWeights, vsd: VSD, lpips_weights: str | None = None) -> None:
        super().__init__()
        if loss.l2 == loss.lpips == loss.vsd == 0:
            raise UserError("all loss weights of the generator are 0; set loss.l2, loss.lpips or loss.vsd")
        self.nets = nets
        self._loss, self._vsd = loss, vsd
        self._pixels = PixelLosses(l2=loss.l2, lpips=loss.lpips, lpips_weights=lpips_weights)

    def load(self) -> None:
        """Read the weights of the model and of LPIPS."""
        self.nets.load()
        self._pixels.load()

    def trained(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        groups = {GENERATOR: self.nets.trained(GENERATOR)}
        if self._loss.vsd:
            groups[REGULARISER] = self.nets.trained(REGULARISER)
        return groups

    def forward(self, batch: Batch) -> Outcome:
        shape = self.nets.latent_shape(batch.hr.shape[-2], batch.hr.shape[-1])
        draws = Draws.of_samples(batch.seed, batch.indices, shape, batch.hr.device)
        return self.losses(
            batch.lq * 2 - 1,
            batch.hr * 2 - 1,
            embeds=self.nets.embed(batch.prompts),
            negative=self.nets.embed([self._vsd.negative_prompt] * len(batch.prompts)) if self._vsd.guidance != 1 else (),
            draws=draws,
        )

    def losses(self, lq: Tensor, hr: Tensor, *, embeds: Embeds, negative: Embeds, draws: Draws) -> Outcome:
        """Generator and regulariser together; their gradients do not mix, so one backward pass serves both.

        Args:
            lq, hr: (B, 3, H, W) in [-1, 1].
            embeds, negative: of the prompts and the negative prompt.
        """
        nets, weights = self.nets, self._loss
        with nets.use(GENERATOR):
            latent = nets.restore_latent(nets.encode(lq, draws.posterior), embeds)
            image = nets.decode(latent)
        parts = self._pixels(image.clamp(-1, 1) if nets.clamps_image else image, hr)
        total = self._pixels.total(parts)
        if weights.vsd:
            parts["vsd"] = pull(latent, self._gradient(latent, embeds, negative, draws))
            parts["regulariser"] = self._regulariser_loss(latent, embeds, draws)
            total = total + weights.vsd * parts["vsd"] + weights.regulariser * parts["regulariser"]
        return Outcome(total, {name: value.detach() for name, value in parts.items()})

    def _gradient(self, latent: Tensor, embeds: Embeds, negative: Embeds, draws: Draws) -> Tensor:
        return vsd_gradient(
            latent,
            noise=draws.vsd_noise,
            times=self.nets.process.distillation_times(draws.vsd_uniform),
            process=self.nets.process,
            student=self._student,
            teacher=self._teacher,
            embeds=embeds,
            negative=negative,
            settings=self._vsd,
        )

    def _regulariser_loss(self, latent: Tensor, embeds: Embeds, draws: Draws) -> Tensor:
        times = self.nets.process.regression_times(draws.regulariser_uniform)
        return regulariser_loss(
            latent,
            noise=draws.regulariser_noise,
            times=times,
            process=self.nets.process,
            student=self._student,
            embeds=embeds,
        )

    def _student(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor:
        with self.nets.use(REGULARISER):
            return self.nets.predict(noisy, times, embeds)

    def _teacher(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor:
        with self.nets.use(None):
            return self.nets.predict(noisy, times, embeds)

    @torch.no_grad()
    def restore(self, lq: Tensor, *, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        shape = self.nets.latent_shape(lq.shape[-2], lq.shape[-1])
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        with self.nets.use(GENERATOR):
            latent = self.nets.encode(lq * 2 - 1, noise.to(lq.device))
            image = self.nets.decode(self.nets.restore_latent(latent, self.nets.embed(prompts)))
        return (image.float() * 0.5 + 0.5).clamp(0, 1)

    def write(self, folder: Path) -> Mapping[str, str]:
        return self.nets.write(folder)

    def write_released(self, folder: Path) -> None:
        self.nets.write_released(folder)

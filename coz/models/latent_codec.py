"""Between pictures and latents: Stable Diffusion's autoencoder with its number format, batches and tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coz.models import vae_tiles
from coz.models.sd2 import Placement

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class LatentCodec:
    """Encodes to moments and decodes latents.

    Args:
        vae: the autoencoder, where and in which format it is to run.
        encoder_tile_px, decoder_tile: see `coz.models.vae_tiles`; the decoder's is in latent pixels.
        batch_size: most pictures per call.
    """

    def __init__(
        self, vae: AutoencoderKL, *, placement: Placement, encoder_tile_px: int, decoder_tile: int, batch_size: int
    ) -> None:
        self.vae = vae
        self.placement = placement
        self.encoder_tile_px, self.decoder_tile = encoder_tile_px, decoder_tile
        self.batch_size = batch_size

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides multiples of 8 → mean and log variance (B, 8, H/8, W/8)."""
        x = x.to(self.placement.device, self.placement.vae_dtype)
        parts = x.split(self.batch_size)
        return torch.cat([vae_tiles.encode_moments(self.vae, part, tile_px=self.encoder_tile_px) for part in parts])

    def latent(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """(B, 8, h, w) → scaled latent (B, 4, h, w), float32.

        Args:
            noise: (B, 4, h, w) standard normal, or None for the posterior's mode.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise is not None:
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(mean.device)
        return mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, h, w) → (B, 3, 8h, 8w), float32, not clamped."""
        z = (latent / self.vae.config.scaling_factor).to(self.placement.device, self.placement.vae_dtype)
        parts = z.split(self.batch_size)
        return torch.cat([vae_tiles.decode(self.vae, part, tile=self.decoder_tile) for part in parts]).float()

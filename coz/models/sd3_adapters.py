"""Which adapters turn SD3 into a super-resolution model: released files, our own, or random ones."""

from __future__ import annotations

import torch
from torch import nn

from coz.checkpoint import WeightsNotFound, WrongWeights, local_file
from coz.models.lora import random_adapter
from coz.models.lora_files import (
    RELEASED_VAE_ALPHA,
    LoraInfo,
    SD3Adapters,
    read_adapters,
    read_info,
    read_released_list,
    read_released_vae_encoder,
)
from coz.models.sd3 import adaln_layers, encoder_layers


def read_sd3_adapters(
    lora: str | None, vae_encoder: str | None, transformer: nn.Module, vae: nn.Module, *, rank: int | None
) -> SD3Adapters:
    """Read a file of our own format, or a released pair.

    Args:
        lora: a file of either kind.
        vae_encoder: the second file of a released pair; None for our own format.
        transformer, vae: the models, for names and shapes only; may lie on the meta device.
        rank: see `read_released_list`.

    Raises:
        WeightsNotFound: a file is missing or not given.
        WrongWeights: a file does not fit the model.
    """
    if lora is None:
        raise WeightsNotFound("lora is not set; give the released SR_LoRA/*.pkl, or a file that train_sr.py wrote")
    local_file(lora, what="lora")
    if read_info(lora) is not None:
        if vae_encoder is not None:
            raise WrongWeights(f"lora={lora} holds the VAE's adapter too; leave vae_encoder={vae_encoder} away")
        return read_adapters(lora, {"transformer": adaln_layers(transformer), "vae_encoder": encoder_layers(vae)})
    if vae_encoder is None:
        raise WeightsNotFound(f"lora={lora} is a released LoRA, which needs vae_encoder; give the released SR_VAE/*.pt")
    local_file(vae_encoder, what="vae_encoder")
    sr = read_released_list(lora, adaln_layers(transformer), rank=rank)
    encoder_shapes = {name: tuple(tensor.shape) for name, tensor in vae.encoder.state_dict().items()}
    base, vae_adapter = read_released_vae_encoder(vae_encoder, encoder_shapes, rank=rank)
    vae_rank = next(iter(vae_adapter.values())).rank
    info = LoraInfo(
        rank=next(iter(sr.values())).rank,
        encode_shift=False,
        base="stabilityai/stable-diffusion-3-medium-diffusers",
        factors={"transformer": 1.0, "vae_encoder": RELEASED_VAE_ALPHA / vae_rank},
    )
    return SD3Adapters(info=info, parts={"transformer": sr, "vae_encoder": vae_adapter}, vae_base=base)


def random_sd3_adapters(transformer: nn.Module, vae: nn.Module, *, rank: int, seed: int) -> SD3Adapters:
    """Adapters with seeded random values over the layers that the released ones adapt."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        part: random_adapter(layers, rank=rank, generator=generator)
        for part, layers in (("transformer", adaln_layers(transformer)), ("vae_encoder", encoder_layers(vae)))
    }
    return SD3Adapters(info=LoraInfo(rank=rank, encode_shift=False, base="random"), parts=parts)

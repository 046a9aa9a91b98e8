"""What the backbones of the Stable Diffusion 2 family need of a device, by the shapes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from coz.checkpoint import count_numbers
from coz.models import sd2
from coz.models.device_memory import GB, Demand

_BUILDERS: dict[str, Callable[[sd2.Config], nn.Module]] = {
    "unet": sd2.build_unet,
    "vae": sd2.build_vae,
    "text_encoder": sd2.build_text_encoder,
}


def demand_of(
    networks: Sequence[tuple[sd2.Weights, str]], *, placement: sd2.Placement, images: int, tile_px: int = 512
) -> Demand:
    """Memory of networks that all stay on the device; the VAE's decoder is what works with most of it.

    Args:
        networks: (where it comes from, part), such as (weights, "unet"). A ControlNet counts as its file, or as nearly
            half a UNet.
        images: pictures of `tile_px` squared that pass the VAE at once.
    """
    vae_bytes = torch.empty((), dtype=placement.vae_dtype).element_size()
    net_bytes = torch.empty((), dtype=placement.dtype).element_size()
    weights = sum(_numbers(source, part) * (vae_bytes if part == "vae" else net_bytes) for source, part in networks)
    # the widest point of the decoder, as in `sd3_memory`: four copies of 128 channels (of the second level's) at full size
    channels = next(source.config("vae")["block_out_channels"][1] for source, part in networks if part == "vae")
    work = images * tile_px**2 * 4 * channels * vae_bytes
    return Demand(placement.device, weights / GB, (weights + work) / GB)


def _numbers(source: sd2.Weights, part: str) -> int:
    """How many numbers a part holds, without reading any."""
    if source.folder is not None:
        return count_numbers(source.folder / sd2.FILES[part][1])
    if part == "controlnet":
        return int(0.42 * _numbers(source, "unet"))  # 364 of 866 million at full size
    with torch.device("meta"):
        net = _BUILDERS[part](source.config(part))
    return sum(math.prod(tensor.shape) for tensor in net.state_dict().values())

"""A small autoencoder that can draw after a minute: it starts as a thumbnail of the picture and learns the details."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coz.training.descent import descend

_BEACON = 8.0
_COLORS, _CARRIED = 3, 4  # channels that carry the thumbnail: R, G, B and the beacon
_AT = 3.0  # where SiLU is nearly linear

_POINT = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
_BOX = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4  # reduces by 2
_TENT = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16  # makes a doubled picture a bilinear one


@torch.no_grad()
def start_as_thumbnail(vae: nn.Module) -> None:
    """Set the weights of diffusers' `AutoencoderKL` so that the latent's first three channels hold the picture reduced by 8,
    and the decoder enlarges them. All other channels keep their random weights.

    The last norm of encoder and decoder would spoil this, since it scales a picture by its own contrast. So a fourth channel,
    the beacon, carries a large constant that decides the norm, which is then the same for all pictures. The norm must be of
    one group. Residual branches start at zero.
    """
    for name, module in vae.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "conv2" or name.endswith("to_out.0"):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif leaf == "conv_shortcut":
            _carry(module, torch.ones(1, 1))
        elif "downsamplers" in name and leaf == "conv":
            _carry(module, _BOX)
        elif "upsamplers" in name and leaf == "conv":
            _carry(module, _TENT)
        elif leaf in ("quant_conv", "post_quant_conv"):
            nn.init.dirac_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    channels = int(vae.config.latent_channels)  # type: ignore[union-attr]
    gain = 2 / float(vae.config.scaling_factor)  # type: ignore[union-attr] # pictures deviate by about 0.5
    for half, factor in ((vae.encoder, gain), (vae.decoder, 1 / gain)):
        _carry(half.conv_in, _POINT)  # type: ignore[union-attr]
        half.conv_in.weight[_COLORS:_CARRIED] = 0  # type: ignore[union-attr]
        half.conv_in.bias[_COLORS] = _BEACON  # type: ignore[union-attr]
        _read_out(half, factor)  # type: ignore[arg-type]
    vae.encoder.conv_out.weight[channels:] *= 0.1  # type: ignore[union-attr]
    vae.encoder.conv_out.bias[channels:] = -6  # type: ignore[union-attr] # the posterior's log-variance


def _carry(conv: nn.Module, kernel: Tensor) -> None:
    """The first channels pass through a kernel, unmixed."""
    weight, bias = conv.weight, conv.bias
    count = min(_CARRIED, weight.shape[1])  # type: ignore[index,union-attr]
    weight[:_CARRIED], bias[:_CARRIED] = 0, 0  # type: ignore[index]
    for channel in range(count):
        weight[channel, channel] = kernel  # type: ignore[index]


def _read_out(half: nn.Module, factor: float) -> None:
    """The last convolution undoes norm and SiLU around the point where the beacon has put them."""
    norm, conv = half.conv_norm_out, half.conv_out
    mean, deviation = _BEACON / norm.num_channels, _BEACON / math.sqrt(norm.num_channels)  # type: ignore[operator,arg-type]
    norm.bias[:_COLORS] = _AT  # type: ignore[index]
    sigmoid = 1 / (1 + math.exp(-_AT))
    slope = sigmoid * (1 + _AT * (1 - sigmoid))
    scale = factor * deviation / slope
    conv.weight[:_COLORS] = 0  # type: ignore[index]
    for channel in range(_COLORS):
        conv.weight[channel, channel, 1, 1] = scale  # type: ignore[index]
        conv.bias[channel] = -scale * (_AT * sigmoid - slope * mean / deviation)  # type: ignore[index]


def teach_autoencoder(
    vae: nn.Module, crops: Callable[[int], Tensor], *, steps: int, learning_rate: float = 3e-3, seed: int = 0
) -> float:
    """Minimise the squared error of the decoded mode, with Adam at a rate that falls to zero; returns the last error.

    Args:
        crops: number of a batch → (B, 3, S, S) in [-1, 1]. Their colours are swapped, inverted and compressed at random, so
            that a few photographs do not decide which colours it can draw.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = float(vae.config.scaling_factor)  # type: ignore[union-attr]

    def losses(step: int) -> tuple[Tensor, Tensor]:
        x = _recolored(crops(step), generator)
        posterior = vae.encode(x).latent_dist  # type: ignore[operator]
        error = (vae.decode(posterior.mean, return_dict=False)[0] - x).square().mean()  # type: ignore[operator]
        # the latents' deviation is the one that the scaling factor stands for, the posterior is narrow
        shape = (posterior.mean.std() * scale - 1).square() + (posterior.logvar + 6).square().mean() / 100
        return error + 0.01 * shape, error

    return descend(vae, losses, steps=steps, learning_rate=learning_rate, betas=(0.9, 0.99))


def _recolored(x: Tensor, generator: torch.Generator) -> Tensor:
    count = len(x)
    order = torch.rand(count, 3, generator=generator).argsort(1)
    x = torch.stack([picture[channels] for picture, channels in zip(x, order, strict=True)])
    sign = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, -1.0, 1.0)
    contrast = 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator)
    offset = (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1) * (1 - contrast)
    return x * sign * contrast + offset

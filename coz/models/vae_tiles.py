"""The autoencoder over pictures larger than memory allows: tiles that share group-norm statistics.

All tiles go through the layers in step. At every group norm their statistics are pooled: means, and biased variances,
each weighted by the tile's area with its margin. Overlaps thus count twice and the variance between tiles is left out:
an estimate, as in the "tiled VAE" that OSEDiff and S3Diff ship, whose results it reproduces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODER_MARGIN_PX = 32
DECODER_MARGIN = 11
"""Margin around a decoder's tile, in latent pixels."""

Pass = Generator[tuple[nn.GroupNorm, Tensor], Tensor, Tensor]
"""A tile's way through a network: yields what is to be normalised and is sent it back; returns the output."""


@dataclass(frozen=True)
class Span:
    """One tile along one axis: what it reads and what it is pasted to, both in input pixels."""

    read_start: int
    read_end: int
    paste_start: int
    paste_end: int


def check_vae_tiles(encoder_tile_px: int, decoder_tile: int) -> None:
    """Refuse tiles that hold nothing, or that do not lie on the latent's grid.

    Raises:
        UserError: an encoder tile that is not a positive multiple of 8 px, or a decoder tile below 1.
    """
    if encoder_tile_px < 8 or encoder_tile_px % 8:
        raise UserError(f"vae_encoder_tile_px={encoder_tile_px} must be a positive multiple of 8; use 1024, say")
    if decoder_tile < 1:
        raise UserError(f"vae_decoder_tile={decoder_tile} must be at least 1 latent pixel; use 224, say")


def is_tiled(height: int, width: int, *, tile: int, margin: int) -> bool:
    """Whether a picture is large enough for tiles."""
    return max(height, width) > 2 * margin + tile


def plan_spans(length: int, *, tile: int, margin: int) -> list[Span]:
    """Tiles along one axis: cores of equal size within [margin, length - margin], read with a margin around.

    The core's size is raised to a multiple of 32 where that stays within `tile`, else of 16, 8, 4 or 2.
    """
    inner = length - 2 * margin
    if inner <= tile:
        return [Span(0, length, 0, length)]
    count = math.ceil(inner / tile)
    size = math.ceil(inner / count)
    raised = (math.ceil(size / multiple) * multiple for multiple in (32, 16, 8, 4, 2))
    size = next((value for value in raised if value <= tile), size)
    spans = []
    for index in range(count):
        start = margin + index * size
        end = min(start + size, length)
        spans.append(
            Span(
                read_start=max(start - margin, 0),
                read_end=min(end + margin, length),
                paste_start=start if start > margin else 0,
                paste_end=end if end < length - margin else length,
            )
        )
    return spans


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, x: Tensor, *, tile_px: int) -> Tensor:
    """Mean and log variance of the latent: (B, 3, H, W) in [-1, 1] → (B, 8, H/8, W/8), before the scaling factor."""
    if is_tiled(*x.shape[-2:], tile=tile_px, margin=ENCODER_MARGIN_PX):
        moments = _run_tiled(vae.encoder, _encoder_pass, x, tile=tile_px, margin=ENCODER_MARGIN_PX, up=1, down=8)
    else:
        moments = vae.encoder(x)
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


@torch.no_grad()
def decode(vae: AutoencoderKL, latent: Tensor, *, tile: int) -> Tensor:
    """(B, 4, h, w), the scaling factor already divided out → (B, 3, 8h, 8w), not clamped."""
    z = latent if vae.post_quant_conv is None else vae.post_quant_conv(latent)
    if is_tiled(*z.shape[-2:], tile=tile, margin=DECODER_MARGIN):
        return _run_tiled(vae.decoder, _decoder_pass, z, tile=tile, margin=DECODER_MARGIN, up=8, down=1)
    return vae.decoder(z)


def _run_tiled(
    net: nn.Module, run: Callable[[nn.Module, Tensor], Pass], x: Tensor, *, tile: int, margin: int, up: int, down: int
) -> Tensor:
    rows = plan_spans(x.shape[-2], tile=tile, margin=margin)
    columns = plan_spans(x.shape[-1], tile=tile, margin=margin)
    boxes = [(row, column) for row in rows for column in columns]
    tiles = [x[..., r.read_start : r.read_end, c.read_start : c.read_end].contiguous() for r, c in boxes]
    outputs = _run_in_step([run(net, tile) for tile in tiles], device=x.device)
    height, width = (length * up // down for length in x.shape[-2:])
    result = torch.empty(x.shape[0], outputs[0].shape[1], height, width, dtype=x.dtype, device=x.device)

    def place(span: Span) -> tuple[slice, slice]:
        start, end, origin = (v * up // down for v in (span.paste_start, span.paste_end, span.read_start))
        return slice(start, end), slice(start - origin, end - origin)

    for (row, column), output in zip(boxes, outputs, strict=True):
        (to_y, from_y), (to_x, from_x) = place(row), place(column)
        result[..., to_y, to_x] = output[..., from_y, from_x].to(x.device)
    return result


def _run_in_step(passes: list[Pass], *, device: torch.device) -> list[Tensor]:
    """Drive all tiles from one group norm to the next. What waits lies on the CPU, so that one tile is on the GPU."""
    waiting: list[tuple[nn.GroupNorm, Tensor]] = []
    statistics: list[tuple[Tensor, Tensor]] = []
    outputs: list[Tensor] = []

    def advance(steps: Iterator[tuple[Pass, Tensor | None]]) -> None:
        waiting.clear()
        statistics.clear()
        for one, value in steps:
            try:
                norm, x = one.send(value)
            except StopIteration as finished:
                outputs.append(finished.value.cpu())
            else:
                groups = x.float().reshape(x.shape[0], norm.num_groups, -1)
                statistics.append(torch.var_mean(groups, dim=2, correction=0))
                waiting.append((norm, x.cpu()))

    advance((one, None) for one in passes)
    while waiting:
        areas = torch.tensor([float(x.shape[-2] * x.shape[-1]) for _, x in waiting], device=device)
        shares = (areas / areas.sum()).view(-1, 1, 1)
        variance = (torch.stack([v for v, _ in statistics]) * shares).sum(0)
        mean = (torch.stack([m for _, m in statistics]) * shares).sum(0)
        held = list(waiting)
        advance((one, _normalize(*entry, mean, variance)) for one, entry in zip(passes, held, strict=True))
    return outputs


def _normalize(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    x = x.to(mean.device)
    groups = x.float().reshape(x.shape[0], norm.num_groups, -1)
    groups = (groups - mean[..., None]) / (variance[..., None] + norm.eps).sqrt()
    scaled = groups.reshape(x.shape) * norm.weight.float().view(-1, 1, 1) + norm.bias.float().view(-1, 1, 1)
    return scaled.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# one tile's way through diffusers' encoder and decoder


def _encoder_pass(encoder: nn.Module, x: Tensor) -> Pass:
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = yield from _resnet(resnet, x)
        for downsample in block.downsamplers or ():
            x = downsample(x)
    x = yield from _middle(encoder.mid_block, x)
    x = yield encoder.conv_norm_out, x
    return encoder.conv_out(F.silu(x))


def _decoder_pass(decoder: nn.Module, x: Tensor) -> Pass:
    x = yield from _middle(decoder.mid_block, decoder.conv_in(x))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = yield from _resnet(resnet, x)
        for upsample in block.upsamplers or ():
            x = upsample(x)
    x = yield decoder.conv_norm_out, x
    return decoder.conv_out(F.silu(x))


def _middle(block: nn.Module, x: Tensor) -> Pass:
    x = yield from _resnet(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            x = yield from _attention(attention, x)
        x = yield from _resnet(resnet, x)
    return x


def _resnet(resnet: nn.Module, x: Tensor) -> Pass:
    device = x.device
    shortcut = (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)).cpu()
    h = yield resnet.norm1, x
    del x
    h = yield resnet.norm2, resnet.conv1(F.silu(h))
    return shortcut.to(device) + resnet.conv2(F.silu(h))


def _attention(attention: nn.Module, x: Tensor) -> Pass:
    device = x.device
    batch, channels, height, width = x.shape
    shortcut = x.cpu()
    h = yield attention.group_norm, x
    del x
    tokens = h.flatten(2).transpose(1, 2)

    def heads(projection: nn.Module) -> Tensor:
        return projection(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(heads(attention.to_q), heads(attention.to_k), heads(attention.to_v))
    mixed = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    return shortcut.to(device) + mixed.transpose(1, 2).reshape(batch, channels, height, width)

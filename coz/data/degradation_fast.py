"""Cheaper operators for the same degradation: alike in distribution, not in every pixel.

Blur through the Fourier transform, compression by libjpeg-turbo (whole quality, on bytes), photon noise by its normal
approximation. On a GPU only the compression leaves the device.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from coz.data import degradation_exact as exact
from coz.data.degradation_exact import gaussian_noise, resize_by, resize_to

__all__ = ["blur", "enlarge_to", "gaussian_noise", "jpeg", "poisson_noise", "resize_by", "resize_to"]

_DIRECT_PX = 9  # a kernel up to this side is applied as it is


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """As `degradation_exact.blur` to about 1e-6, for one kernel: (B, 3, H, W), (k, k) → (B, 3, H, W)."""
    side = kernel.shape[-1]
    if side <= _DIRECT_PX:
        return exact.blur(x, kernel)
    reach, (height, width) = side // 2, x.shape[-2:]
    padded = F.pad(x, (reach,) * 4, mode="reflect")
    size = (_fast_length(height + 2 * reach), _fast_length(width + 2 * reach))
    spectrum = torch.fft.rfft2(padded, s=size)
    spectrum *= torch.fft.rfft2(kernel.to(x).flip(0, 1), s=size)  # flipped: a correlation
    # what wraps around lies in the first 2 reach rows and columns, which are cut off
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def poisson_noise(x: Tensor, *, scale: float, normal: Tensor, gray: bool) -> Tensor:
    """Photon noise by its normal approximation: variance mean / levels.

    Args:
        x: (1, 3, H, W).
        normal: standard normal draws, of x's shape or (1, 1, H, W) for gray noise.
    """
    level = exact.to_gray(x) if gray else x
    levels = _levels(level)
    # the mean is known to 8 bits in the exact operator; the half level that this leaves out does not show
    noise = level.clamp(0, 1).sqrt_().mul_(normal).mul_(scale / levels**0.5)
    return (x + noise).clamp_(0, 1)


def jpeg(x: Tensor, quality: float) -> Tensor:
    """Compress one image by libjpeg-turbo, chroma halved: (1, 3, H, W) in [0, 1] → same, on the 8-bit grid."""
    from torchvision.io import decode_jpeg, encode_jpeg

    restored = decode_jpeg(encode_jpeg(_to_bytes(x[0]).cpu(), quality=round(quality)))
    return restored[None].to(x.device).float().div_(255)


def enlarge_to(x: Tensor, size: tuple[int, int], mode: exact.Mode) -> Tensor:
    """`resize_to` as two products with matrices, the faster way to enlarge by 4: (B, 3, h, w) → (B, 3, *size)."""
    if mode == "area" or x.device.type != "cpu":
        return resize_to(x, size, mode)
    rows, columns = (_weights(old, new, mode) for old, new in zip(x.shape[-2:], size, strict=True))
    return rows @ x @ columns.T


@functools.lru_cache(maxsize=16)
def _weights(old: int, new: int, mode: exact.Mode) -> Tensor:
    """(new, old): what each new row takes of the old ones."""
    return F.interpolate(torch.eye(old)[None, None], size=(new, old), mode=mode)[0, 0]


def _to_bytes(x: Tensor) -> Tensor:
    return (x * 255).round_().clamp_(0, 255).byte()


def _levels(x: Tensor) -> float:
    """`degradation_exact.poisson_levels` without sorting."""
    counts = torch.bincount(_to_bytes(x).flatten(), minlength=256)
    distinct = int((counts > 0).sum())
    return float(1 << (distinct - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def _fast_length(length: int) -> int:
    """The next length whose only prime factors are 2, 3 and 5."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1

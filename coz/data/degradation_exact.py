"""The operators of the Real-ESRGAN degradation, equal to the authors' to float rounding, on any device.

All take and give (B, 3, H, W) float32. Draws of noise are arguments, so that a recorded run can be repeated.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["area", "bilinear", "bicubic"]
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate with a kernel, borders by reflection: (B, 3, H, W), (k, k) or one per image (B, k, k) → (B, 3, H, W)."""
    size, (batch, channels) = kernel.shape[-1], x.shape[:2]
    planes = F.pad(x, (size // 2,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, 3B, H, W): every plane its own group
    per_plane = kernel.to(x).expand(batch, size, size).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(planes, per_plane, groups=batch * channels).view_as(x)


def resize_by(x: Tensor, factor: float, mode: Mode) -> Tensor:
    """Resize by a factor, which itself gives the coordinates; sides are rounded down. No antialiasing, no clamping."""
    return F.interpolate(x, scale_factor=factor, mode=mode)


def resize_to(x: Tensor, size: tuple[int, int], mode: Mode) -> Tensor:
    """Resize to (height, width). Enlarging by `area` a whole number of times repeats pixels."""
    if mode == "area" and all(new % old == 0 for new, old in zip(size, x.shape[-2:], strict=True)):
        return F.interpolate(x, size=size, mode="nearest")  # the same values, sooner
    return F.interpolate(x, size=size, mode=mode)


def gaussian_noise(x: Tensor, *, sigma_255: float, color: Tensor, gray: Tensor | None) -> Tensor:
    """Add normal noise and clip.

    Args:
        sigma_255: deviation in 8-bit levels.
        color: standard normal draws of x's shape; used where `gray` is None.
        gray: standard normal draws (B, 1, H, W), the same for all channels.
    """
    return ((color if gray is None else gray) * (sigma_255 / 255) + x).clamp_(0, 1)


def poisson_levels(x8: Tensor) -> float:
    """The number of photons that white stands for: the next power of two of the number of different values."""
    return 2.0 ** math.ceil(math.log2(len(torch.unique(x8))))


def on_grid(x: Tensor) -> Tensor:
    """Round to 8-bit levels."""
    return (x * 255).round_().clamp_(0, 255).div_(255)


def to_gray(x: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, 1, H, W)."""
    return sum(weight * x[:, i : i + 1] for i, weight in enumerate(_GRAY))


def poisson_noise(x: Tensor, *, scale: float, counts: Tensor, gray: bool) -> Tensor:
    """Add photon noise of one image and clip.

    Args:
        x: (1, 3, H, W).
        scale: how many times stronger than the photon noise.
        counts: Poisson draws, of x's shape, or (1, 1, H, W) for gray noise, with the means of `poisson_means`.
    """
    means, levels = poisson_means(x, gray=gray)
    return (x + (counts - means) / levels * scale).clamp(0, 1)


def poisson_means(x: Tensor, *, gray: bool) -> tuple[Tensor, float]:
    """What the counts of `poisson_noise` are drawn around, and the count that white stands for."""
    x8 = on_grid(to_gray(x) if gray else x)
    levels = poisson_levels(x8)
    return x8 * levels, levels


def sharpen(x: Tensor, *, weight: float = 0.5, radius: int = 51, threshold: float = 10) -> Tensor:
    """Unsharp masking where it matters: on pixels that differ from their surroundings by more than `threshold` levels."""
    sigma = 0.3 * ((radius - 1) * 0.5 - 1) + 0.8  # OpenCV's rule
    line = np.exp(-((np.arange(radius) - radius // 2) ** 2) / (2 * sigma**2))
    kernel = torch.from_numpy(np.outer(line, line) / line.sum() ** 2).float()
    residual = x - blur(x, kernel)
    mask = blur((residual.abs() * 255 > threshold).to(x.dtype), kernel)
    sharp = (x + weight * residual).clamp(0, 1)
    return mask * sharp + (1 - mask) * x


# ---------------------------------------------------------------------------------------------------------------------
# JPEG

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_FROM_YCC = ((1, 0, 1.402), (1, -0.344136, -0.714136), (1, 1.772, 0))


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """DiffJPEG: compress without rounding the quantiser's steps or the pixels. (B, 3, H, W) in [0, 1] → same.

    Args:
        quality: (B,), any number of 1 to 99.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x * 255, (0, -width % 16, 0, -height % 16))
    luma, *chroma = _mix(padded, _TO_YCC, (0.0, 128.0, 128.0)).split(1, dim=1)
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).to(x) / 100
    planes = [_quantize(luma, "luma", factor)]
    for plane in chroma:
        small = _quantize(F.avg_pool2d(plane, 2), "chroma", factor)
        planes.append(small.repeat_interleave(2, -1).repeat_interleave(2, -2))
    ycc = torch.cat(planes, dim=1) - torch.tensor([0.0, 128.0, 128.0], device=x.device).view(3, 1, 1)
    rgb = _mix(ycc, _FROM_YCC, (0.0, 0.0, 0.0)).clamp(0, 255)
    return rgb[..., :height, :width] / 255


def _mix(x: Tensor, matrix: tuple[tuple[float, ...], ...], shift: tuple[float, float, float]) -> Tensor:
    weights = torch.tensor(matrix, device=x.device)
    return torch.einsum("bchw,dc->bdhw", x, weights) + torch.tensor(shift, device=x.device).view(3, 1, 1)


def _quantize(plane: Tensor, table: str, factor: Tensor) -> Tensor:
    """(B, 1, H, W) through the cosine transform of 8 x 8 blocks, rounding, and back."""
    batch, _, height, width = plane.shape
    dct, steps = _dct().to(plane), _table(table).to(plane)
    blocks = plane.view(batch, height // 8, 8, width // 8, 8).transpose(2, 3) - 128
    step = steps * factor.view(batch, 1, 1, 1, 1)
    coefficients = (dct @ blocks @ dct.T / step).round() * step
    blocks = dct.T @ coefficients @ dct + 128
    return blocks.transpose(2, 3).reshape(batch, 1, height, width)


@lru_cache
def _dct() -> Tensor:
    k, n = torch.arange(8.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
    matrix = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.float()


@lru_cache
def _table(name: str) -> Tensor:
    if name == "luma":
        return torch.tensor(_LUMA, dtype=torch.float32).T.contiguous()  # DiffJPEG has it transposed
    table = torch.full((8, 8), 99.0)
    table[:4, :4] = torch.tensor(_CHROMA)
    return table

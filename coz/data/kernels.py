"""Blur kernels of the Real-ESRGAN degradation (Wang et al. 2021, arXiv 2107.10833, section 3), and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from coz.errors import UserError

KERNEL_PX = 21
T = TypeVar("T")
Range = tuple[float, float]


class Draws(Protocol):
    """Where random parameters come from, so that a recorded stream can stand in for a generator."""

    def uniform(self, low: float, high: float) -> float: ...
    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T: ...


# ---------------------------------------------------------------------------------------------------------------------
# shapes


def gaussian(size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, *, beta: float = 1.0) -> np.ndarray:
    """exp(-q^beta / 2), q the squared Mahalanobis distance; beta = 1 is the Gaussian. (size, size) float64, sum 1.

    Args:
        sigma_x, sigma_y: deviations along the axes, in pixels; one for a round kernel.
        theta: rotation in radians.
    """
    # exp(-0.5 q) of a narrow kernel underflows to 0 far from its middle, which is right
    return _normalized(np.exp(-0.5 * np.power(_distance(size, sigma_x, sigma_y, theta), beta)))


def plateau(size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, *, beta: float) -> np.ndarray:
    """1 / (1 + q^beta), flat in the middle. (size, size) float64, sum 1."""
    return _normalized(1 / (np.power(_distance(size, sigma_x, sigma_y, theta), beta) + 1))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """Circular low-pass that rings, c J1(c r) / (2 pi r). (size, size) float64, sum 1.

    Args:
        cutoff: in radians per pixel, pi passes everything.
    """
    from scipy.special import j1

    x, y = _grid(size)
    radius = np.hypot(x, y)
    middle = radius == 0
    values = cutoff * j1(cutoff * radius) / (2 * np.pi * np.where(middle, 1, radius))
    return _normalized(np.where(middle, cutoff**2 / (4 * np.pi), values))


def pulse() -> np.ndarray:
    """The kernel that changes nothing."""
    kernel = np.zeros((KERNEL_PX, KERNEL_PX))
    kernel[KERNEL_PX // 2, KERNEL_PX // 2] = 1
    return kernel


def pad(kernel: np.ndarray, size: int = KERNEL_PX) -> np.ndarray:
    """Zeros around a kernel up to (size, size)."""
    return np.pad(kernel, (size - kernel.shape[0]) // 2)


def trim(kernel: np.ndarray) -> np.ndarray:
    """The kernel without the zeros around it; its side stays odd."""
    middle = kernel.shape[0] // 2
    reach = np.abs(np.argwhere(kernel) - middle).max(initial=0)
    return kernel[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size) - size // 2
    return np.meshgrid(axis, axis)


def _distance(size: int, sigma_x: float, sigma_y: float | None, theta: float) -> np.ndarray:
    x, y = _grid(size)
    sigma_y = sigma_x if sigma_y is None else sigma_y
    along, across = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def _normalized(kernel: np.ndarray) -> np.ndarray:
    return kernel / kernel.sum()


# ---------------------------------------------------------------------------------------------------------------------
# draws


@dataclass(frozen=True)
class BlurRanges:
    """What the kernels of one blur are drawn from."""

    sigma_px: Range
    sinc_probability: float = 0.1
    sizes: tuple[int, ...] = tuple(range(7, KERNEL_PX + 1, 2))
    shapes: tuple[str, ...] = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
    shape_weights: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    generalized_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_px[0] <= self.sigma_px[1]:
            raise UserError(f"blur sigma_px={self.sigma_px} must rise from a value above 0")


def draw_blur(draws: Draws, ranges: BlurRanges) -> np.ndarray:
    """A blur kernel, padded to (21, 21). The order of the draws is Real-ESRGAN's."""
    size = draws.choice(ranges.sizes)
    if draws.uniform(0, 1) < ranges.sinc_probability:
        lowest = math.pi / 3 if size < 13 else math.pi / 5  # a low cutoff needs a large kernel
        return pad(sinc(size, draws.uniform(lowest, math.pi)))
    shape = draws.choice(ranges.shapes, ranges.shape_weights)
    sigma_x, sigma_y, theta = draws.uniform(*ranges.sigma_px), None, 0.0
    if shape.endswith("aniso"):
        sigma_y, theta = draws.uniform(*ranges.sigma_px), draws.uniform(-math.pi, math.pi)
    if shape.startswith("generalized"):
        return pad(gaussian(size, sigma_x, sigma_y, theta, beta=_draw_beta(draws, ranges.generalized_beta)))
    if shape.startswith("plateau"):
        return pad(plateau(size, sigma_x, sigma_y, theta, beta=_draw_beta(draws, ranges.plateau_beta)))
    return pad(gaussian(size, sigma_x, sigma_y, theta))


def draw_last_sinc(draws: Draws, *, probability: float, sizes: Sequence[int]) -> np.ndarray:
    """The low-pass at the end, which rings as sharpening and compression do; or a pulse."""
    if draws.uniform(0, 1) < probability:
        size = draws.choice(sizes)
        return pad(sinc(size, draws.uniform(math.pi / 3, math.pi)))
    return pulse()


def _draw_beta(draws: Draws, between: Range) -> float:
    """Half the time below 1 (or at it), half above."""
    if draws.uniform(0, 1) < 0.5:
        return draws.uniform(between[0], 1)
    return draws.uniform(1, between[1])

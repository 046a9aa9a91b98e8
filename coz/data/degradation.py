"""From a photograph to what the network is given: the second-order Real-ESRGAN degradation, or plain bicubic.

Everything random about a sample comes from (seed, index of the sample), so the number of workers, of processes and of
resumptions changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coz.data import degradation_exact, degradation_fast
from coz.data.degradation_exact import Mode
from coz.data.kernels import BlurRanges, Draws, Range, T, draw_blur, draw_last_sinc, trim
from coz.errors import UserError

MODES: tuple[Mode, ...] = ("area", "bilinear", "bicubic")
Engine = Literal["exact", "fast"]
_SMALL_PIXELS = 160 * 160


class Degradation(Protocol):
    """Maps clean crops to degraded ones."""

    def __call__(self, hr: Tensor, *, seed: int, indices: Sequence[int], enlarged: bool = True) -> Tensor:
        """Degrade; image i is drawn from (seed, indices[i]).

        Args:
            hr: (B, 3, H, W) in [0, 1].
            enlarged: give (B, 3, H, W) as the diffusion models take it, else (B, 3, H / scale, W / scale). Both lie on
                the 8-bit grid.
        """
        ...


class SampleDraws:
    """The random parameters of one sample."""

    def __init__(self, seed: int, index: int) -> None:
        self._numbers = np.random.Generator(np.random.PCG64([seed, index]))

    def uniform(self, low: float, high: float) -> float:
        return float(self._numbers.uniform(low, high))

    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        if weights is None:
            return options[int(self._numbers.integers(len(options)))]
        steps = np.cumsum(weights)
        return options[int(np.searchsorted(steps, self._numbers.random() * steps[-1], side="right"))]

    def generator(self) -> torch.Generator:
        """A generator of PyTorch's for the sample's noise. On the CPU, so that a GPU gives the same noise."""
        return torch.Generator().manual_seed(int(self._numbers.integers(2**63)))


# ---------------------------------------------------------------------------------------------------------------------
# operations


class Noise(Protocol):
    """Where noise comes from, so that a recorded one can stand in."""

    def normal(self, shape: Sequence[int]) -> Tensor: ...
    def poisson(self, means: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DrawnNoise:
    """Noise out of a generator."""

    generator: torch.Generator

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def poisson(self, means: Tensor) -> Tensor:
        return torch.poisson(means.cpu(), generator=self.generator)


@dataclass(frozen=True)
class Blur:
    kernel: np.ndarray  # (k, k)

    def run(self, x: Tensor, noise: Noise, engine: Engine) -> Tensor:
        if engine == "exact":
            return degradation_exact.blur(x, torch.from_numpy(self.kernel).float())
        kernel = trim(self.kernel)
        return x if len(kernel) == 1 else degradation_fast.blur(x, torch.from_numpy(kernel).float())


@dataclass(frozen=True)
class Resize:
    mode: Mode
    factor: float | None = None
    size: tuple[int, int] | None = None  # (height, width), where there is no factor

    def run(self, x: Tensor, noise: Noise, engine: Engine) -> Tensor:
        if self.factor is not None:
            return degradation_exact.resize_by(x, self.factor, self.mode)
        assert self.size is not None
        return degradation_exact.resize_to(x, self.size, self.mode)


@dataclass(frozen=True)
class GaussianNoise:
    sigma_255: float
    gray: bool

    def run(self, x: Tensor, noise: Noise, engine: Engine) -> Tensor:
        draw = noise.normal((x.shape[0], 1 if self.gray else 3, *x.shape[-2:])).to(x.device)
        gray = draw if self.gray else None
        return degradation_exact.gaussian_noise(x, sigma_255=self.sigma_255, color=draw, gray=gray)


@dataclass(frozen=True)
class PoissonNoise:
    scale: float
    gray: bool

    def run(self, x: Tensor, noise: Noise, engine: Engine) -> Tensor:
        if engine == "fast":
            draw = noise.normal((1, 1 if self.gray else 3, *x.shape[-2:])).to(x.device)
            return degradation_fast.poisson_noise(x, scale=self.scale, normal=draw, gray=self.gray)
        means, _ = degradation_exact.poisson_means(x, gray=self.gray)
        counts = noise.poisson(means).to(x.device)
        return degradation_exact.poisson_noise(x, scale=self.scale, counts=counts, gray=self.gray)


@dataclass(frozen=True)
class Jpeg:
    quality: float

    def run(self, x: Tensor, noise: Noise, engine: Engine) -> Tensor:
        # the compression of the small picture shows in the result, down to what 8 bits would round away, and costs little
        if engine == "fast" and x.shape[-2] * x.shape[-1] > _SMALL_PIXELS:
            return degradation_fast.jpeg(x, self.quality)
        return degradation_exact.jpeg(x.clamp(0, 1), torch.tensor([self.quality], device=x.device))


Operation = Blur | Resize | GaussianNoise | PoissonNoise | Jpeg


def apply(operations: Sequence[Operation], x: Tensor, *, noise: Noise, engine: Engine) -> Tensor:
    """Run a plan on one image, (1, 3, H, W) → (1, 3, H, W), on the 8-bit grid."""
    *first, last = operations
    for operation in first:
        x = operation.run(x, noise, engine)
    if engine == "fast" and isinstance(last, Resize) and last.size is not None:
        return degradation_exact.on_grid(degradation_fast.enlarge_to(x, last.size, last.mode))
    return degradation_exact.on_grid(last.run(x, noise, engine))


# ---------------------------------------------------------------------------------------------------------------------
# plans


@dataclass(frozen=True)
class Round:
    """What one of the two rounds of blur, resize, noise and compression is drawn from."""

    blur: BlurRanges
    resize_weights: tuple[float, float, float]  # enlarge, reduce, keep
    resize_range: Range
    noise_sigma_255: Range
    poisson_scale: Range
    blur_probability: float = 1.0
    gaussian_probability: float = 0.5
    gray_probability: float = 0.4
    jpeg_quality: Range = (30.0, 95.0)


# Real-ESRGAN's published values, which OSEDiff's params_realesrgan.yml keeps.
FIRST = Round(BlurRanges((0.2, 3.0)), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
SECOND = Round(BlurRanges((0.2, 1.5)), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5), blur_probability=0.8)


def draw_plan(
    draws: Draws, size: tuple[int, int], *, first: Round = FIRST, second: Round = SECOND, scale: int = 4, last_sinc: float = 0.8
) -> list[Operation]:
    """The operations of one sample, (H, W) → (H, W) by way of (H / scale, W / scale).

    Args:
        draws: where the parameters come from.
        size: (height, width) of the image.
        last_sinc: probability of the ringing low-pass at the end.
    """
    small = (size[0] // scale, size[1] // scale)
    kernels = [draw_blur(draws, part.blur) for part in (first, second)]
    last = Blur(draw_last_sinc(draws, probability=last_sinc, sizes=second.blur.sizes))
    factor = _draw_factor(draws, first)
    plan: list[Operation] = [Blur(kernels[0]), Resize(draws.choice(MODES), factor=factor)]
    plan += [_draw_noise(draws, first), Jpeg(draws.uniform(*first.jpeg_quality))]
    if draws.uniform(0, 1) < second.blur_probability:
        plan.append(Blur(kernels[1]))
    factor = _draw_factor(draws, second)
    middle = (int(size[0] / scale * factor), int(size[1] / scale * factor))
    plan += [Resize(draws.choice(MODES), size=middle), _draw_noise(draws, second)]
    tail: list[Operation] = [Resize(draws.choice(MODES), size=small), last]
    jpeg = Jpeg(draws.uniform(*second.jpeg_quality))
    plan += [*tail, jpeg] if draws.uniform(0, 1) < 0.5 else [jpeg, *tail]
    return [*plan, Resize(draws.choice(MODES), size=size)]


def _draw_factor(draws: Draws, part: Round) -> float:
    way = draws.choice(("up", "down", "keep"), part.resize_weights)
    low, high = part.resize_range
    return {"up": lambda: draws.uniform(1, high), "down": lambda: draws.uniform(low, 1), "keep": lambda: 1.0}[way]()


def _draw_noise(draws: Draws, part: Round) -> Operation:
    gaussian = draws.uniform(0, 1) < part.gaussian_probability
    strength = draws.uniform(*(part.noise_sigma_255 if gaussian else part.poisson_scale))
    gray = draws.uniform(0, 1) < part.gray_probability
    return GaussianNoise(strength, gray) if gaussian else PoissonNoise(strength, gray)


# ---------------------------------------------------------------------------------------------------------------------
# degradations


@dataclass(frozen=True)
class RealESRGAN:
    """The second-order degradation with OSEDiff's parameters, enlarged back to the photograph's size.

    Args:
        engine: `exact` repeats the authors' operators, `fast` is several times faster and equal in distribution only.
        first, second: ranges of the two rounds.
        scale: factor between the photograph and the degraded image before it is enlarged.
    """

    engine: Engine = "fast"
    first: Round = field(default=FIRST)
    second: Round = field(default=SECOND)
    scale: int = 4

    def __post_init__(self) -> None:
        if self.engine not in ("exact", "fast"):
            raise UserError(f"degradation.engine={self.engine} is unknown; use exact or fast")

    @torch.no_grad()
    def __call__(self, hr: Tensor, *, seed: int, indices: Sequence[int], enlarged: bool = True) -> Tensor:
        if min(hr.shape[-2:]) < 64:
            raise UserError(f"crops of {hr.shape[-1]} px are too small to be degraded; use crop_px of at least 64")
        rows = []
        for image, index in zip(hr.split(1), indices, strict=True):
            draws = SampleDraws(seed, index)
            plan = draw_plan(draws, tuple(hr.shape[-2:]), first=self.first, second=self.second, scale=self.scale)
            plan = plan if enlarged else plan[:-1]
            rows.append(apply(plan, image, noise=DrawnNoise(draws.generator()), engine=self.engine))
        return torch.cat(rows)


@dataclass(frozen=True)
class Bicubic:
    """Reduced by `scale` with antialiasing and enlarged again, both bicubic: the paper's plain 4x of stage two."""

    scale: int = 4

    @torch.no_grad()
    def __call__(self, hr: Tensor, *, seed: int, indices: Sequence[int], enlarged: bool = True) -> Tensor:
        height, width = hr.shape[-2:]
        small = F.interpolate(hr, size=(height // self.scale, width // self.scale), mode="bicubic", antialias=True)
        small = degradation_exact.on_grid(small)  # a picture on disk has 8 bits
        if not enlarged:
            return small
        # with antialiasing PyTorch's bicubic is Pillow's, which the chain enlarges its views by
        return degradation_exact.on_grid(F.interpolate(small, size=(height, width), mode="bicubic", antialias=True))

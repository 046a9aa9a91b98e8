"""Metrics of stored pictures: files in, numbers out, one long row per value.

`python -m coz.metrics sr=FOLDER gt=FOLDER` compares two folders, see `folder_metrics`.

No-reference quality (NIQE), and what shows whether a magnification still belongs to its photograph (consistency).
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coz.checkpoint import file_digest
from coz.errors import UserError
from coz.image import View, from_pil, read_photo, reduce_area, resize
from coz.niqe import niqe
from coz.perceptual import find_trunk, load_lpips, lpips_identity

NIQE_PARAMETERS = Path(__file__).parent / "assets" / "niqe_pris_params.npz"
PSNR_EPSILON = 1e-8  # as pyiqa adds it to the MSE: equal pictures get 80 dB instead of infinity
# What libraries raise at a picture that their metric cannot judge; anything else is a fault of this program.
CANNOT_JUDGE = (RuntimeError, ValueError, ArithmeticError, LookupError, AssertionError, OSError)


@dataclass(frozen=True)
class Sample:
    """The files around one output, and how they belong together."""

    image: Path  # the output, S x S
    parent: Path  # the state that its view was cut from
    view: View  # in pixels of the parent
    start: Path  # the start state, S x S
    region: tuple[float, float, float]  # left, top, side of what the output shows, as fractions of the start state
    truth: Truth | None = None


@dataclass(frozen=True)
class Truth:
    """Real pixels of what an output shows: a whole picture, or a part of a photograph's central square."""

    picture: Path
    square_px: int | None = None  # side of the central square that the start state was reduced from; None: the picture as it is
    region: tuple[float, float, float] = (0.0, 0.0, 1.0)  # left, top, side, as fractions of that square

    def read(self, size: tuple[int, int]) -> Tensor:
        """(1, 3, H, W); a part of a photograph is brought to `size` by Lanczos, as the start state was."""
        photo = read_photo(self.picture)
        if self.square_px is None:
            return from_pil(photo)
        corner = ((photo.width - self.square_px) // 2, (photo.height - self.square_px) // 2)
        left, top, side = (edge * self.square_px for edge in self.region)
        box = (corner[0] + left, corner[1] + top, corner[0] + left + side, corner[1] + top + side)
        return from_pil(photo.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box))


class Metric(Protocol):
    """A number for a sample. Construction checks that its weights are there; they are read at the first call.

    Two attributes may be left out: `needs_truth`, and `parallel` (runs well in a process of its own, beside a GPU's work).
    """

    name: str
    label: str
    higher_is_better: bool
    worst: float  # what a failed image counts, as in the paper's appendix B.3

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything the value depends on besides the files: names, versions, options, weights."""
        ...

    def __call__(self, sample: Sample) -> float:
        """The value; NaN or infinity counts as a failure."""
        ...


def read_picture(path: Path) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    with Image.open(path) as image:
        return from_pil(image)


# ---------------------------------------------------------------------------------------------------------------------
# NIQE


class Niqe:
    """NIQE as pyiqa computes it, lower is better (Mittal et al. 2013), on the 8-bit RGB picture.

    NIQE rounds the grey value to an integer, and hundreds of pixels of a picture lie exactly on .5, so that the order
    of float operations decides them (up to 0.02 per picture). `arithmetic=cuda`, the default, repeats on any device
    what a GPU does, and published figures come from GPUs; `cpu` leaves it to PyTorch.
    """

    name = "niqe"
    label = "NIQE"
    higher_is_better = False
    worst = 100.0
    parallel = True

    def __init__(self, *, arithmetic: Literal["cuda", "cpu"] = "cuda") -> None:
        if arithmetic not in ("cuda", "cpu"):
            raise UserError(f"arithmetic={arithmetic} is unknown; use cuda (as published figures) or cpu")
        self._arithmetic = arithmetic

    @property
    def identity(self) -> Mapping[str, object]:
        return {
            "metric": "niqe",
            "pyiqa": importlib.metadata.version("pyiqa"),
            "arithmetic": self._arithmetic,
            "parameters": file_digest(NIQE_PARAMETERS),
        }

    @cached_property
    def _parameters(self) -> tuple[Tensor, Tensor]:
        with np.load(NIQE_PARAMETERS) as arrays:
            mean, covariance = arrays["mu_pris_param"].ravel(), arrays["cov_pris_param"]
        return torch.from_numpy(mean), torch.from_numpy(covariance)

    def __call__(self, sample: Sample) -> float:
        with Image.open(sample.image) as image:
            return self.score(np.asarray(image.convert("RGB")))

    @torch.inference_mode()
    def score(self, pixels: np.ndarray) -> float:
        """NIQE of an (H, W, 3) uint8 picture of at least 192 px a side (two blocks of 96)."""
        if self._arithmetic == "cuda":
            gray = torch.from_numpy(_cuda_gray(pixels))[None, None]
        else:
            from pyiqa.utils.color_util import to_y_channel

            gray = to_y_channel(from_pil(Image.fromarray(pixels)), 255, "yiq").round()
        return niqe(gray, *self._parameters)


def _cuda_gray(pixels: np.ndarray) -> np.ndarray:
    """0.299 R + 0.587 G + 0.114 B with fused multiply-adds in float32, times 255, rounded half to even."""
    unit = pixels.astype(np.float32) * np.float32(1 / 255)
    red, green, blue = (unit[..., channel].astype(np.float64) for channel in range(3))
    weights = [np.float64(np.float32(w)) for w in (0.299, 0.587, 0.114)]
    # A product of two float32 is exact in float64, so rounding the sum once is what a fused multiply-add does.
    total = (weights[0] * red).astype(np.float32)
    for weight, channel in zip(weights[1:], (green, blue), strict=True):
        total = (weight * channel + total).astype(np.float32)
    return np.rint(total * np.float32(255)).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# consistency


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB over all channels, of two pictures in [0, 1]; equal ones give 80."""
    mse = (a.double() - b.double()).square().mean().item()
    return -10 * math.log10(mse + PSNR_EPSILON)


class ConsistencyStep:
    """PSNR between the view that the last step was given and its output averaged back to the view's size.

    Higher is better: a step that invents may, but not at the cost of what it was shown.
    """

    name = "consistency_step"
    label = "cons. step (dB)"
    higher_is_better = True
    worst = 0.0

    @property
    def identity(self) -> Mapping[str, object]:
        return {"metric": self.name, "epsilon": PSNR_EPSILON}

    def __call__(self, sample: Sample) -> float:
        view = sample.view.crop(read_picture(sample.parent))
        return psnr(reduce_area(read_picture(sample.image), (view.shape[-2], view.shape[-1])), view)


class ConsistencyStepLpips:
    """LPIPS (AlexNet) between the same two as `consistency_step`, each enlarged to at least 128 px. Lower is better."""

    name = "consistency_step_lpips"
    label = "cons. step (LPIPS)"
    higher_is_better = False
    worst = 1.0
    _SMALLEST_PX = 128

    def __init__(self, *, weights: str | None = None) -> None:
        self._weights = weights
        find_trunk("alex", weights)

    @property
    def identity(self) -> Mapping[str, object]:
        return {"metric": self.name, **lpips_identity("alex", self._weights)}

    @cached_property
    def _net(self) -> torch.nn.Module:
        return load_lpips("alex", self._weights)

    @torch.inference_mode()
    def __call__(self, sample: Sample) -> float:
        view = sample.view.crop(read_picture(sample.parent))
        side = view.shape[-1]
        back = reduce_area(read_picture(sample.image), side)
        if side < self._SMALLEST_PX:
            view, back = resize(view, self._SMALLEST_PX), resize(back, self._SMALLEST_PX)
        return float(self._net(back, view, normalize=True))


class ConsistencyInput:
    """PSNR between the region of the photograph itself that the output shows, and the output averaged down to it.

    The region is (S/s)² pixels of the start state at scale s, so the same pixels judge every method. Higher is better.
    """

    name = "consistency_input"
    label = "cons. input (dB)"
    higher_is_better = True
    worst = 0.0

    @property
    def identity(self) -> Mapping[str, object]:
        return {"metric": self.name, "epsilon": PSNR_EPSILON}

    def __call__(self, sample: Sample) -> float:
        with Image.open(sample.start) as image:
            side_px = image.width
            left, top, side = (edge * side_px for edge in sample.region)
            count = max(1, round(side))
            if all(abs(value - round(value)) < 1e-6 for value in (left, top, side)):
                corner = (round(left), round(top))
                shown = image.crop((*corner, corner[0] + count, corner[1] + count))
            else:  # a region that does not lie on the photograph's pixels is sampled from them
                shown = image.resize((count, count), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            view = from_pil(shown)
        return psnr(reduce_area(read_picture(sample.image), count), view)


if __name__ == "__main__":
    import sys

    from coz.errors import exit_code
    from coz.folder_metrics import main

    sys.exit(exit_code(lambda: main(sys.argv[1:])))

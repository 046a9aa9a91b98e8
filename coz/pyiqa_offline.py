"""Building pyiqa's networks without the trunks that it would download; checkpoints from this machine fill them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace


@contextlib.contextmanager
def without_downloads(module: ModuleType) -> Iterator[None]:
    """Inside, an architecture's module of pyiqa gets its trunks from timm and torchvision untrained."""
    stand_ins = {"timm": SimpleNamespace(create_model=_timm_model), "models": SimpleNamespace(vgg16=_vgg16)}
    kept = {name: getattr(module, name) for name in stand_ins if hasattr(module, name)}
    for name in kept:
        setattr(module, name, stand_ins[name])
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(module, name, original)


def _timm_model(name: str, pretrained: bool) -> object:
    import timm

    return timm.create_model(name, pretrained=False)


def _vgg16(weights: object) -> object:
    import torchvision

    return torchvision.models.vgg16(weights=None)

"""Interpolation as a backbone: the floor that every method is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coz.errors import UserError
from coz.image import Resampling, Size, as_size, resize

_KNOWN = ("nearest", "bilinear", "bicubic", "lanczos")


class Interpolation:
    """Pillow's 8-bit interpolation, as the released code uses it for its `nearest` and `bicubic` runs."""

    reads_prompts = False

    def __init__(self, *, resampling: Resampling) -> None:
        if resampling not in _KNOWN:
            raise UserError(f"resampling={resampling} is unknown; use one of {', '.join(_KNOWN)}")
        self._resampling = resampling

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"name": "interpolation", "weights": None, "resampling": self._resampling}

    def load(self) -> None:
        """Nothing to read."""

    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        return resize(lr, as_size(size), self._resampling)

"""OSEDiff on SD3 with recorded posterior noise, so that the evaluation can be held against recorded runs."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load_file
from torch import Tensor

from coz.backbones.osediff_sd3 import OSEDiffSD3


class RecordedNoise(OSEDiffSD3):
    """Call number k of a run draws `step<k>` of a file; the first call is number `first_step`."""

    def __init__(self, *, noise: str, first_step: int = 1, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self._recorded, self._step = load_file(noise), first_step

    def _noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor:
        drawn = self._recorded[f"step{self._step}"]
        self._step += 1
        return drawn.float().reshape(len(seeds), -1, height // 8, width // 8)

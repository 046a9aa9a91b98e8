"""DAPE as a prompter: the tags of the current view (the paper's "CoZ (DAPE)")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from coz.models.device_memory import Demand
from coz.models.placement import Precision
from coz.models.ram import Tagger


class Dape:
    """Tags of the current view, joined with ", ". It looks at no context and samples nothing.

    The settings are those of `coz.models.ram.Tagger`, which does the work.
    """

    def __init__(
        self,
        *,
        weights: str,
        lora: str | None = None,
        tag_list: str | None = None,
        thresholds: str | None = None,
        image_px: int = 384,
        window: int | None = None,
        head_heads: int = 4,
        antialias: bool = True,
        size: Literal["full", "tiny"] = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        self._tagger = Tagger(
            weights=weights,
            lora=lora,
            tag_list=tag_list,
            thresholds=thresholds,
            image_px=image_px,
            window=window,
            head_heads=head_heads,
            antialias=antialias,
            size=size,
            seed=seed,
            device=device,
            precision=precision,
        )

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return self._tagger.fingerprint

    def demand(self, *, batch: int) -> Demand:
        """Memory of the tagger, see `Demand`."""
        return self._tagger.demand(batch=batch)

    def load(self) -> None:
        self._tagger.load()

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[str]:
        """(B, 3, S, S) in [0, 1] → B prompts; an image that shows none of the tags gets an empty one."""
        return self._tagger(current)[0]

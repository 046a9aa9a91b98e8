"""Chains that cost nothing, as `evaluate.py` would make them: nn enlarges directly, bicubic stands in for a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from coz.backbones.interpolation import Interpolation
from coz.chain import StepSettings
from coz.data.photos import Photo
from coz.evaluation import Lineage, Plan, StateMaker, plan_for
from coz.prompters.base import Prompter
from coz.store import StateStore


def two_methods_at_two_scales(
    states: Path, photos: Sequence[Photo], prompter: Prompter
) -> Iterator[tuple[str, float, list[Lineage]]]:
    """(method, scale, final states) of nn and "coz_vlm" at 4x and 16x, from start states of 64 px."""
    for method, mode, resampling in (("nn", "direct", "nearest"), ("coz_vlm", "chain", "bicubic")):
        settings = StepSettings(backbone=Interpolation(resampling=resampling), prompter=prompter)
        for scale in (4.0, 16.0):
            plan = Plan(factors=plan_for(mode=mode, scale=scale, max_factor=4, start_px=64), start_px=64)
            yield method, scale, StateMaker(store=StateStore(states), settings=settings, plan=plan).run(photos)

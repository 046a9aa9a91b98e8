"""How a training proceeds, and how far it has come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from coz.data.crops import Stage
from coz.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How training proceeds.

    Args:
        stages: one after the other, in one run.
        crop_px: side of the crops; shrink_to_px: short side that larger photographs are reduced to first, None for no.
        batch_size: samples at once on each process; accumulation: how many of these before a step.
        learning_rate: constant after `warmup_steps`.
        clip_norm: of the gradient of each group; 0 does not clip.
        ema_decay: of the average of the generator's weights, which is then validated and written; 0 for none.
        max_skipped: steps in a row that may be skipped because something was not finite.
        validate_every, save_every, log_every: in steps; the last step does all three.
        workers: processes that load and degrade; degrade_on: `workers`, or `device` for the GPU.
    """

    stages: Sequence[Stage]
    crop_px: int = 512
    shrink_to_px: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 500
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    max_skipped: int = 10
    validate_every: int = 500
    save_every: int = 500
    log_every: int = 10
    workers: int = 0
    degrade_on: str = "workers"
    remember_photos: int = 0

    def __post_init__(self) -> None:
        counts = ("crop_px", "batch_size", "accumulation", "max_skipped", "validate_every", "save_every", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"training.{name}={getattr(self, name)} must be at least 1")
        if self.shrink_to_px is not None and self.shrink_to_px < self.crop_px:
            raise UserError(
                f"training.shrink_to_px={self.shrink_to_px} is less than training.crop_px={self.crop_px}; raise it, or use null"
            )
        if not self.stages:
            raise UserError("training.stages is empty; give at least one stage")
        if self.learning_rate <= 0:
            raise UserError(f"training.learning_rate={self.learning_rate} must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay={self.ema_decay} must lie in [0, 1); 0 is without")
        if self.degrade_on not in ("workers", "device"):
            raise UserError(f"training.degrade_on={self.degrade_on} is unknown; use workers or device")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> int:
        """The number of the stage that a step belongs to, from 0."""
        ends = itertools.accumulate(stage.steps for stage in self.stages)
        return next(number for number, end in enumerate(ends) if step < end)

    def rate_at(self, step: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))


@dataclass
class Progress:
    """What a checkpoint holds besides weights and optimiser."""

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best: float = -math.inf
    unreadable: list[str] = field(default_factory=list)

"""What an engine is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from coz.chain import StepSettings
from coz.data.photos import Photo
from coz.evaluation import Timing
from coz.metrics import Metric
from coz.stages import Failure, Lineage, Plan


@dataclass(frozen=True)
class Work:
    """The states to make and the metrics to take of the last ones.

    `nodes` are the plain configuration nodes (`_target_` and settings) that `settings` was built of, for processes that build
    their own.
    """

    photos: Sequence[Photo]
    states: Path
    plan: Plan
    settings: StepSettings
    metrics: Sequence[Metric]
    nodes: Mapping[str, Mapping[str, object]]
    on_state: Callable[[int], object] = lambda count: None


@dataclass
class Outcome:
    """Every photograph's last state, in the order of the photographs, or why it has none."""

    lineages: list[Lineage]
    failures: list[Failure]
    timing: Timing = field(default_factory=Timing)


class Engine(Protocol):
    """Runs the work; states and metric values are the same whichever engine made them."""

    def run(self, work: Work) -> Outcome:
        """All states into the store, and beside them the values of whatever metrics it ran in parallel."""
        ...

"""Evaluate one method at one scale: states from the store or computed into it, then metrics, then long rows.

Every state's fingerprint covers its parent, so a chain shares its first states with every longer one, a rerun or another
metric computes nothing twice, and direct enlargement at the chain's own factor is the chain's first step.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from coz.chain import StepSettings, Where, look, plan_factors, seed_of, take_step
from coz.checkpoint import file_digest
from coz.data.photos import Photo
from coz.errors import UserError
from coz.image import Region, View, from_pil, read_photo, start_state, to_pil
from coz.metrics import Metric, Sample
from coz.store import CannotWrite, StateStore, StoredState, fingerprint, write_json

logger = logging.getLogger(__name__)

STATE_FORMAT = 1  # raised when the same settings would give other states
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Failure:
    """A photograph that gave no state, and why."""

    photo: str
    reason: str


@dataclass
class Timing:
    """What this run computed itself: how many states, and the wall-clock seconds in prompter and backbone."""

    states: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How a method makes its states."""

    factors: Sequence[float]  # one per step; a single one is direct enlargement
    at: Where | str = "centre"  # also "sample": the place that comes with each photograph
    seed: int = 0
    start_px: int = 512
    start_rounding: str = "truncate"  # how the start state's sides are computed, see `image.start_state`
    batch_size: int = 1


def plan_for(*, mode: str, scale: float, max_factor: float, start_px: int) -> list[float]:
    """The zoom factors of a method at a scale.

    Raises:
        UserError: no magnification, or one that leaves a direct view without a pixel.
    """
    factors = plan_factors(scale, max_factor)
    if mode == "chain":
        return factors
    if scale > start_px:
        raise UserError(
            f"scale={scale:g} leaves no pixel of a {start_px} px photograph to enlarge directly; use at most {start_px}"
        )
    return [float(scale)]


# ---------------------------------------------------------------------------------------------------------------------
# states


@dataclass
class Lineage:
    """A photograph on its way through the chain."""

    photo: Photo
    start: StoredState
    state: StoredState
    region: Region = field(default_factory=Region)
    parent: StoredState | None = None
    view: View | None = None


class StateMaker:
    """Computes the states of a plan into a store, each once, in fixed batches.

    A batch is a fixed run of the list of photographs and is computed whole as soon as one of its states is missing, so
    that a killed run goes on with the same batches and ends with the same bytes.
    """

    def __init__(
        self, *, store: StateStore, settings: StepSettings, plan: Plan, on_state: Progress = lambda count: None
    ) -> None:
        self._store, self._settings, self._plan, self._on_state = store, settings, plan, on_state
        self._made_by = {
            "format": STATE_FORMAT,
            "backbone": dict(settings.backbone.fingerprint),
            "prompter": dict(settings.prompter.fingerprint),
            "rounding": settings.rounding,
            "first_pair": settings.first_pair,
        }
        self.timing = Timing()
        self.failures: list[Failure] = []

    def run(self, photos: Sequence[Photo]) -> list[Lineage]:
        """The final state of every photograph that could be computed, in order; the others are in `failures`."""
        lineages = [lineage for photo in photos if (lineage := self._start(photo)) is not None]
        size = self._plan.batch_size
        batches = [lineages[i : i + size] for i in range(0, len(lineages), size)]
        waiting = [batch for batch in batches if not self._try(batch, wait=False)]
        for batch in waiting:  # another process had claimed these
            self._try(batch, wait=True)
        failed = {failure.photo for failure in self.failures}
        return [lineage for lineage in lineages if lineage.photo.name not in failed]

    def _try(self, batch: Sequence[Lineage], *, wait: bool) -> bool:
        """`_advance`, where an image that cannot be restored fails alone and after a second try."""
        try:
            return self._advance(batch, wait=wait)
        except UserError:
            raise
        except Exception:
            logger.exception("a batch failed (%s); trying its images one by one", ", ".join(i.photo.name for i in batch))
        for lineage in batch:
            try:
                self._advance([lineage], wait=True)
            except UserError:
                raise
            except Exception as error:
                logger.exception("second try")
                self._fail(lineage.photo, error)
        return True

    def _start(self, photo: Photo) -> Lineage | None:
        plan = self._plan
        try:
            made_by = {
                "format": STATE_FORMAT,
                "photo": file_digest(photo.path),
                "start_px": plan.start_px,
                "sides": plan.start_rounding,
            }
            key = fingerprint(made_by)
            stored = self._store.get(key)
            if stored is None:
                image = start_state(read_photo(photo.path), plan.start_px, rounding=plan.start_rounding)  # type: ignore[arg-type]
                meta = {"step": 0, "scale": 1.0, "made_by": made_by, "prompt": "", "raw_prompt": ""}
                stored = self._store.put(key, _png(image), meta)
        except CannotWrite:
            raise
        except (UserError, OSError) as error:
            self._fail(photo, error)
            return None
        return Lineage(photo=photo, start=stored, state=stored)

    def _fail(self, photo: Photo, error: Exception) -> None:
        logger.error("%s failed: %s", photo.name, error)
        self.failures.append(Failure(photo.name, str(error) or type(error).__name__))
        self._on_state(len(self._plan.factors))

    def _advance(self, batch: Sequence[Lineage], *, wait: bool) -> bool:
        """Bring a batch to its last state; False where another process holds one of its states."""
        for step in range(1 + int(batch[0].state.meta["step"]), len(self._plan.factors) + 1):  # type: ignore[call-overload]
            if not self._step(batch, step, wait=wait):
                return False
        return True

    def _step(self, batch: Sequence[Lineage], step: int, *, wait: bool) -> bool:
        images = [_read_state(lineage.state) for lineage in batch]
        views = [self._look(lineage, image, step) for lineage, image in zip(batch, images, strict=True)]
        seeds = [seed_of(self._plan.seed, lineage.start.key, step) for lineage in batch]
        keys = [self._key(lineage, view, seed) for lineage, view, seed in zip(batch, views, seeds, strict=True)]
        stored = [self._store.get(key) for key in keys]
        if not all(stored):
            with self._store.claim(keys, wait=wait) as claimed:
                if not claimed:
                    return False
                stored = [self._store.get(key) for key in keys]  # another process may have finished meanwhile
                if not all(stored):
                    stored = [*self._compute(batch, images, views, seeds, keys, step, stored)]
        for lineage, view, state in zip(batch, views, stored, strict=True):
            assert state is not None
            lineage.region = lineage.region.inside(view, self._plan.start_px)
            lineage.parent, lineage.view, lineage.state = lineage.state, view, state
        self._on_state(len(batch))
        return True

    def _look(self, lineage: Lineage, image: Tensor, step: int) -> View:
        at = self._plan.at
        if at == "sample":
            at = lineage.photo.at or "centre"
        return look(image[0], lineage.region, step=step, factor=self._plan.factors[step - 1], at=at)  # type: ignore[arg-type]

    def _key(self, lineage: Lineage, view: View, seed: int) -> str:
        corner = [view.left_px, view.top_px, view.size_px]
        return fingerprint({"parent": lineage.state.key, "view": corner, "seed": seed, **self._made_by})

    def _compute(
        self,
        batch: Sequence[Lineage],
        images: Sequence[Tensor],
        views: Sequence[View],
        seeds: Sequence[int],
        keys: Sequence[str],
        step: int,
        stored: Sequence[StoredState | None],
    ) -> list[StoredState]:
        import torch

        began = time.perf_counter()
        results, prompts = take_step(torch.cat(list(images)), views, step=step, seeds=seeds, settings=self._settings)
        self.timing.seconds += time.perf_counter() - began
        states = []
        for index, lineage in enumerate(batch):
            have = stored[index]
            if have is None:
                scale = float(lineage.state.meta["scale"]) * self._plan.factors[step - 1]  # type: ignore[arg-type]
                meta = self._describe(lineage, views[index], step, scale, prompts[index])
                have = self._store.put(keys[index], _png(results[index : index + 1]), meta)
            states.append(have)
        self.timing.states += len(batch)
        return states

    def _describe(self, lineage: Lineage, view: View, step: int, scale: float, prompt: str) -> dict[str, object]:
        return {
            "step": step,
            "scale": scale,
            "parent": lineage.state.key,
            "view": {"left_px": view.left_px, "top_px": view.top_px, "size_px": view.size_px},
            "prompt": str(prompt),
            "raw_prompt": getattr(prompt, "raw", str(prompt)),
            "made_by": self._made_by,
        }


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image)[0].save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _read_state(state: StoredState) -> Tensor:
    with Image.open(state.image_path) as image:
        return from_pil(image)


# ---------------------------------------------------------------------------------------------------------------------
# rows


@dataclass(frozen=True)
class Labels:
    """What every row of a run says about it."""

    method: str
    scale: float
    dataset: str
    backbone: str
    prompter: str
    profile: str


def measure(
    lineages: Sequence[Lineage],
    failures: Sequence[Failure],
    metrics: Sequence[Metric],
    labels: Labels,
    on_value: Progress = lambda count: None,
) -> Iterator[dict[str, object]]:
    """One row per photograph and metric. A failed photograph or a value that is no number gets the metric's worst value.

    Values are kept beside the state they belong to, so that another run reads them.
    """
    common = {
        "method": labels.method,
        "scale": labels.scale,
        "dataset": labels.dataset,
        "backbone": labels.backbone,
        "prompter": labels.prompter,
        "profile": labels.profile,
    }
    for lineage in lineages:
        for metric in metrics:
            value, reason = _cached_value(lineage, metric)
            yield {
                "image": lineage.photo.name,
                **common,
                "metric": metric.name,
                "value": value if not reason else metric.worst,
                "failure": reason,
                "state": lineage.state.key,
                "metric_identity": json.dumps(dict(metric.identity), sort_keys=True),
            }
            on_value(1)
    for failure in failures:
        for metric in metrics:
            identity = json.dumps(dict(metric.identity), sort_keys=True)
            row = {
                "metric": metric.name,
                "value": metric.worst,
                "failure": failure.reason,
                "state": "",
                "metric_identity": identity,
            }
            yield {"image": failure.photo, **common, **row}


def _cached_value(lineage: Lineage, metric: Metric) -> tuple[float, str]:
    """(value, why it failed or "")."""
    sample = sample_of(lineage)
    context = {"metric": dict(metric.identity), "start": lineage.start.key, "region": list(sample.region)}
    file = lineage.state.folder / f"{metric.name}-{fingerprint(context)}.json"
    cached = _read_value(file)
    if cached is not None:
        return cached, ""
    try:
        value = metric(sample)
    except (RuntimeError, ValueError, ArithmeticError) as error:  # a metric that cannot judge this picture
        logger.exception("%s failed on %s", metric.name, lineage.photo.name)
        return math.nan, f"{metric.name}: {error}"
    if not math.isfinite(value):
        return math.nan, f"{metric.name} gave {value}"
    write_json(file, {"value": value})
    return value, ""


def _read_value(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["value"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def sample_of(lineage: Lineage) -> Sample:
    """The files that a metric reads for a finished lineage."""
    assert lineage.parent is not None
    assert lineage.view is not None
    region = lineage.region
    return Sample(
        image=lineage.state.image_path,
        parent=lineage.parent.image_path,
        view=lineage.view,
        start=lineage.start.image_path,
        region=(region.left, region.top, region.side),
    )


def row_order(row: Mapping[str, object]) -> tuple[object, ...]:
    """Sorts rows the same way whatever the order they were made in."""
    return row["method"], row["scale"], row["image"], row["metric"]

"""What an evaluation job makes of its photographs: quality, running time (Table 3), agreement of overlaps (Table 6)."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coz import jobs
from coz.chain import StepSettings, ask, look, restore, seed_of
from coz.data.photos import Photo
from coz.errors import UserError
from coz.evaluation import Failure, Lineage, Plan
from coz.image import Region, read_photo, start_state
from coz.jobs import Job, Parts
from coz.measuring import row_of, row_order
from coz.metrics import Metric
from coz.tables import Column, Row

logger = logging.getLogger(__name__)


class Quality:
    """States, then metrics of the last one of each photograph."""

    fresh_answers = False

    def columns(self, metrics: Sequence[Metric]) -> list[Column]:
        """One per metric."""
        return [Column(metric.name, metric.label, metric.higher_is_better) for metric in metrics]

    def __call__(self, job: Job, parts: Parts, photos: Sequence[Photo]) -> list[Row]:
        """One row per photograph and metric."""
        lineages, failures = jobs.make_states(job, parts, photos)
        return jobs.measure_states(job, parts, lineages, failures)


# ---------------------------------------------------------------------------------------------------------------------
# running time


class Runtime:
    """Seconds per photograph, one at a time, prompt extraction (PE) and super-resolution (SR) apart, as in Table 3.

    The clock is read only after every GPU has finished. Reading the photograph, making the start state and storing
    pictures are not counted. Nothing is read from the store or a prompt cache.
    """

    fresh_answers = True

    def __init__(self, *, warmup: int = 3) -> None:
        """Args:
        warmup: so many photographs (from the first on, repeated if there are fewer) are run and not timed.

        Raises:
            UserError: a negative number.
        """
        if warmup < 0:
            raise UserError(f"task.warmup={warmup} must be at least 0")
        self._warmup = warmup

    def columns(self, metrics: Sequence[Metric]) -> list[Column]:
        """Both phases."""
        return [Column("seconds_sr", "SR (s)", False), Column("seconds_pe", "PE (s)", False)]

    def __call__(self, job: Job, parts: Parts, photos: Sequence[Photo]) -> list[Row]:
        """Two rows per photograph; one that fails is left out, and said.

        Raises:
            UserError: every photograph failed.
        """
        job.refusals[:] = [refusal for refusal in job.refusals if not refusal.metric]
        parts.backbone.load()
        parts.prompter.load()
        for index in range(self._warmup):
            self._time(photos[index % len(photos)], parts)
        rows: list[Row] = []
        labels = jobs.labels_of(job.config)
        identity = {"metric": "seconds", "warmup": self._warmup, "torch": torch.__version__, "device": _devices()}
        for photo in photos:
            try:
                sr, pe = self._time(photo, parts)
            except (RuntimeError, ValueError, UserError) as error:
                logger.error("%s failed and is left out of the mean: %s", photo.name, error)
                continue
            rows.append(row_of(labels, photo.name, "seconds_sr", sr, identity))
            rows.append(row_of(labels, photo.name, "seconds_pe", pe, identity))
        if not rows:
            raise UserError(f"none of the {len(photos)} photographs could be timed; see the log in {job.folder}")
        return sorted(rows, key=row_order)

    def _time(self, photo: Photo, parts: Parts) -> tuple[float, float]:
        """(SR seconds, PE seconds) of a photograph's whole chain."""
        plan = parts.plan
        state = start_state(read_photo(photo.path), plan.start_px, rounding=plan.start_rounding)  # type: ignore[arg-type]
        region, sr, pe = Region(), 0.0, 0.0
        for step, factor in enumerate(plan.factors, start=1):
            at = (photo.at or "centre") if plan.at == "sample" else plan.at
            view = look(state[0], region, step=step, factor=factor, at=at)  # type: ignore[arg-type]
            state, sr_step, pe_step = _timed_step(state, view, step, seed_of(plan.seed, photo.name, step), parts.settings)
            region, sr, pe = region.inside(view, plan.start_px), sr + sr_step, pe + pe_step
        return sr, pe


def _timed_step(state: Tensor, view: object, step: int, seed: int, settings: StepSettings) -> tuple[Tensor, float, float]:
    began = _now()
    prompts = ask(state, [view], step=step, seeds=[seed], settings=settings)  # type: ignore[list-item]
    asked = _now()
    state = restore(state, [view], prompts, seeds=[seed], settings=settings)  # type: ignore[list-item]
    return state, _now() - asked, asked - began


def _now() -> float:
    """The time after every GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    return time.perf_counter()


def _devices() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------
# overlaps


class Overlap:
    """Cosine similarity of two patches of the same photograph where they show the same, as in Table 6.

    Two chains end at patches one half of their width apart, so that the right half of the left one (the paper's patch,
    at the centre) and the left half of the right one show the same. The reference takes the halves that show nothing
    in common: the left half of the left patch and the right half of the right one.
    """

    fresh_answers = False
    names = ("overlap_cosine", "separate_cosine")
    worst = 0.0

    def columns(self, metrics: Sequence[Metric]) -> list[Column]:
        """The halves in common, and those apart."""
        return [Column("overlap_cosine", "cos, overlapping", True), Column("separate_cosine", "cos, apart", True)]

    def __call__(self, job: Job, parts: Parts, photos: Sequence[Photo]) -> list[Row]:
        """Two rows per photograph.

        Raises:
            UserError: a scale at which half a patch is no whole number of the photograph's pixels.
        """
        job.refusals[:] = [refusal for refusal in job.refusals if not refusal.metric]
        plan = parts.plan
        half_px = plan.start_px / float(job.config.scale) / 2
        if half_px != int(half_px):
            raise UserError(
                f"task=overlap shifts a patch by half its width, which at scale={job.config.scale:g} is {half_px:g} px of the "
                f"{plan.start_px} px start state; use a scale that gives whole pixels, such as 4, 16, 64 or 256"
            )
        sides = []
        for shift_px in (0.0, half_px):
            place = (0.5 + shift_px / plan.start_px, 0.5)
            sides.append(self._lineages(job, parts, photos, dataclasses.replace(plan, at=place)))
        labels = jobs.labels_of(job.config)
        rows: list[Row] = []
        for photo in photos:
            pair = [done.get(photo.name) for done, _ in sides]
            reasons = [failure.reason for _, failures in sides for failure in failures if failure.photo == photo.name]
            values = (self.worst, self.worst) if reasons else _cosines(*pair)  # type: ignore[arg-type]
            for name, value in zip(self.names, values, strict=True):
                state = pair[0].state.key if pair[0] else ""
                rows.append(row_of(labels, photo.name, name, value, {"metric": name}, "; ".join(reasons), state))
        return sorted(rows, key=row_order)

    @staticmethod
    def _lineages(job: Job, parts: Parts, photos: Sequence[Photo], plan: Plan) -> tuple[dict[str, Lineage], Sequence[Failure]]:
        lineages, failures = jobs.make_states(job, dataclasses.replace(parts, plan=plan), photos)
        return {lineage.photo.name: lineage for lineage in lineages}, failures


def _cosines(left: Lineage, right: Lineage) -> tuple[float, float]:
    """(overlapping halves, halves apart) of two lineages half a patch apart."""
    a, b = left.region, right.region
    if abs((b.left - a.left) / a.side - 0.5) > 1e-6 or abs(b.top - a.top) > 1e-9:
        raise ValueError(f"the patches {a} and {b} do not overlap by half")
    one, other = _pixels(left), _pixels(right)
    half = one.shape[1] // 2
    return _cosine(one[:, half:], other[:, :half]), _cosine(one[:, :half], other[:, half:])


def _pixels(lineage: Lineage) -> np.ndarray:
    with Image.open(lineage.state.image_path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of flattened pixels; of two black pictures, 1."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return float(not a.any() and not b.any())
    return float(np.vdot(a, b)) / norms

"""The states of one method at one scale, from the store or computed into it.

Every state's fingerprint covers its parent, so a chain shares its first states with every longer one, a rerun or another
metric computes nothing twice, and direct enlargement at the chain's own factor is the chain's first step.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from coz.chain import StepSettings, Where, look, plan_factors, seed_of, take_step
from coz.checkpoint import file_digest
from coz.data.photos import Photo
from coz.errors import UserError
from coz.image import Region, View, from_pil, read_photo, resize, start_state, to_pil
from coz.store import CannotWrite, StateStore, StoredState, fingerprint

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
    reference: Reference | None = None


@dataclass(frozen=True)
class Reference:
    """Start from a reduced photograph, so that its own pixels are the truth of what the chain invents."""

    reduce: int
    start_px: int  # side of the reduced square; brought to the plan's `start_px` where that is another

    @property
    def square_px(self) -> int:
        """Side of the photograph's central square that a start state is made of."""
        return self.start_px * self.reduce

    def start_state(self, photo: Image.Image, size_px: int) -> Tensor:
        """The central square, reduced by Lanczos. → (1, 3, size_px, size_px)

        Raises:
            UserError: the photograph is too small.
        """
        square_px = self.square_px
        if min(photo.size) < square_px:
            raise UserError(
                f"{photo.width} x {photo.height} px are too few for reference.reduce={self.reduce}, which needs {square_px} px"
            )
        left, top = (photo.width - square_px) // 2, (photo.height - square_px) // 2
        square = photo.crop((left, top, left + square_px, top + square_px))
        reduced = square.resize((self.start_px, self.start_px), Image.Resampling.LANCZOS)
        return resize(from_pil(reduced), size_px) if self.start_px != size_px else from_pil(reduced)


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
    truth_px: int | None = None  # side of the photograph's central square that the start state was reduced from


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
            if plan.reference:
                made_by |= {"reduce": plan.reference.reduce, "reduced_px": plan.reference.start_px}
            key = fingerprint(made_by)
            stored = self._store.get(key)
            if stored is None:
                image = self._start_image(read_photo(photo.path))
                meta = {"step": 0, "scale": 1.0, "made_by": made_by, "prompt": "", "raw_prompt": ""}
                stored = self._store.put(key, _png(image), meta)
        except CannotWrite:
            raise
        except (UserError, OSError) as error:
            self._fail(photo, error)
            return None
        return Lineage(photo, stored, stored, truth_px=plan.reference.square_px if plan.reference else None)

    def _start_image(self, photo: Image.Image) -> Tensor:
        plan = self._plan
        if plan.reference:
            return plan.reference.start_state(photo, plan.start_px)
        return start_state(photo, plan.start_px, rounding=plan.start_rounding)  # type: ignore[arg-type]

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

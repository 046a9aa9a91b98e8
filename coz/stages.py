"""One step of a batch, cut into the stages that engines run where they like: look, ask the prompter, restore, store.

Every state's fingerprint covers its parent, so a chain shares its first states with every longer one, a rerun or another
metric computes nothing twice, and direct enlargement at the chain's own factor is the chain's first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from coz.chain import StepSettings, Where, ask, look, plan_factors, restore, seed_of
from coz.checkpoint import file_digest
from coz.data.photos import Photo
from coz.errors import UserError
from coz.image import Region, View, encode_png, from_pil, read_photo, resize, start_state, to_pil
from coz.provenance import note_on
from coz.store import StateStore, StoredState, fingerprint

STATE_FORMAT = 1  # raised when the same settings would give other states


@dataclass(frozen=True)
class Failure:
    """A photograph that gave no state, and why."""

    photo: str
    reason: str


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
# stages


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


@dataclass(frozen=True)
class Outlook:
    """What a batch is about to look at, and the names of the states that will come of it."""

    step: int
    views: list[View]
    seeds: list[int]
    keys: list[str]


class Stages:
    """The stages of a plan's steps over a store. Holds no picture between calls, so that any process can run any stage."""

    def __init__(self, *, store: StateStore, settings: StepSettings, plan: Plan) -> None:
        self.store, self.settings, self.plan = store, settings, plan
        self._made_by = {
            "format": STATE_FORMAT,
            "backbone": dict(settings.backbone.fingerprint),
            "prompter": dict(settings.prompter.fingerprint),
            "rounding": settings.rounding,
            "first_pair": settings.first_pair,
        }

    def start(self, photo: Photo) -> Lineage:
        """The start state of a photograph.

        Raises:
            UserError, OSError: it cannot be read, or is too small.
        """
        plan = self.plan
        made_by = {
            "format": STATE_FORMAT,
            "photo": file_digest(photo.path),
            "start_px": plan.start_px,
            "sides": plan.start_rounding,
        }
        if plan.reference:
            made_by |= {"reduce": plan.reference.reduce, "reduced_px": plan.reference.start_px}
        key = fingerprint(made_by)
        stored = self.store.get(key)
        if stored is None:
            image = self._start_image(read_photo(photo.path))
            meta = {"step": 0, "scale": 1.0, "made_by": made_by, "prompt": "", "raw_prompt": ""}
            stored = self.store.put(key, self._png(image, key, meta), meta)
        return Lineage(photo, stored, stored, truth_px=plan.reference.square_px if plan.reference else None)

    def _start_image(self, photo: Image.Image) -> Tensor:
        plan = self.plan
        if plan.reference:
            return plan.reference.start_state(photo, plan.start_px)
        return start_state(photo, plan.start_px, rounding=plan.start_rounding)  # type: ignore[arg-type]

    def look(self, batch: Sequence[Lineage], step: int) -> Outlook:
        """Where the batch looks at a step."""
        views = [self._view(lineage, step) for lineage in batch]
        seeds = [seed_of(self.plan.seed, lineage.start.key, step) for lineage in batch]
        keys = [self._key(lineage, view, seed) for lineage, view, seed in zip(batch, views, seeds, strict=True)]
        return Outlook(step, views, seeds, keys)

    def _view(self, lineage: Lineage, step: int) -> View:
        at = self.plan.at
        if at == "sample":
            at = lineage.photo.at or "centre"
        image = _read_state(lineage.state)[0]
        return look(image, lineage.region, step=step, factor=self.plan.factors[step - 1], at=at)  # type: ignore[arg-type]

    def _key(self, lineage: Lineage, view: View, seed: int) -> str:
        corner = [view.left_px, view.top_px, view.size_px]
        return fingerprint({"parent": lineage.state.key, "view": corner, "seed": seed, **self._made_by})

    def stored(self, outlook: Outlook) -> list[StoredState] | None:
        """The states of an outlook if all of them are there: a batch is computed whole, so that resuming changes nothing."""
        states = [self.store.get(key) for key in outlook.keys]
        return None if any(state is None for state in states) else states  # type: ignore[return-value]

    def ask(self, batch: Sequence[Lineage], outlook: Outlook) -> list[str]:
        """The prompts of a step."""
        return ask(_states(batch), outlook.views, step=outlook.step, seeds=outlook.seeds, settings=self.settings)

    def restore(self, batch: Sequence[Lineage], outlook: Outlook, prompts: Sequence[str]) -> list[StoredState]:
        """The states of a step, computed and stored; those that were there stay as they are."""
        images = restore(_states(batch), outlook.views, prompts, seeds=outlook.seeds, settings=self.settings)
        states = []
        for index, (lineage, view, key) in enumerate(zip(batch, outlook.views, outlook.keys, strict=True)):
            have = self.store.get(key)
            if have is None:
                meta = self._describe(lineage, view, outlook.step, prompts[index])
                have = self.store.put(key, self._png(images[index : index + 1], key, meta), meta)
            states.append(have)
        return states

    def _png(self, image: Tensor, key: str, meta: Mapping[str, object]) -> bytes:
        note = note_on(
            backbone=self.settings.backbone.fingerprint,
            prompter=self.settings.prompter.fingerprint,
            scale=float(meta["scale"]),  # type: ignore[arg-type]
            fingerprint=key,
            prompt=str(meta["prompt"]),
        )
        return encode_png(to_pil(image)[0], note=note, compress_level=2)

    def _describe(self, lineage: Lineage, view: View, step: int, prompt: str) -> dict[str, object]:
        return {
            "step": step,
            "scale": float(lineage.state.meta["scale"]) * self.plan.factors[step - 1],  # type: ignore[arg-type]
            "parent": lineage.state.key,
            "view": {"left_px": view.left_px, "top_px": view.top_px, "size_px": view.size_px},
            "prompt": str(prompt),
            "raw_prompt": getattr(prompt, "raw", str(prompt)),
            "made_by": self._made_by,
        }

    def follow(self, batch: Sequence[Lineage], outlook: Outlook, states: Sequence[StoredState]) -> None:
        """Move the batch on to the states of a step."""
        for lineage, view, state in zip(batch, outlook.views, states, strict=True):
            lineage.region = lineage.region.inside(view, self.plan.start_px)
            lineage.parent, lineage.view, lineage.state = lineage.state, view, state


def step_of(lineage: Lineage) -> int:
    """The number of the step that a lineage's state came of; 0 for a start state."""
    return int(lineage.state.meta["step"])  # type: ignore[call-overload]


def _states(batch: Sequence[Lineage]) -> Tensor:
    return torch.cat([_read_state(lineage.state) for lineage in batch])


def _read_state(state: StoredState) -> Tensor:
    with Image.open(state.image_path) as image:
        return from_pil(image)

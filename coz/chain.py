"""The chain of zooms (Algorithm 1 of the paper), and direct enlargement beside it.

Nothing here reads or writes files. A state is a batch of images that all went through the same steps; a step looks at a
view of the state before (`look`), asks the prompter for words about it and the backbone for its enlargement
(`take_step`). The evaluation calls the two with its store in between; `zoom_chain` is the plain loop.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coz.backbones.base import Backbone
from coz.errors import UserError
from coz.image import Region, Rounding, View, quantize, resize, view_at
from coz.prompters.base import Prompter

MAX_FACTOR = 4.0
MAX_SCALE = 4096
FirstPair = Literal["released", "paper"]
Point = tuple[float, float]
Where = Literal["centre", "auto"] | Point | Sequence[Point]


@dataclass(frozen=True)
class State:
    """What a step made: `images` (B, 3, S, S) on the 8-bit grid, and how it came about."""

    images: Tensor
    step: int = 0
    scale: float = 1.0
    prompts: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    regions: tuple[Region, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# scales and seeds


def plan_factors(scale: float, max_factor: float = MAX_FACTOR) -> list[float]:
    """The zoom factor of each step: 4 until a last, possibly shorter one. 64 → [4, 4, 4]; 24 → [4, 4, 1.5].

    Raises:
        UserError: a scale that is not above 1 or beyond `MAX_SCALE`.
    """
    check_scale(scale)
    factors = []
    remaining = float(scale)
    while remaining > max_factor * (1 + 1e-9):
        factors.append(max_factor)
        remaining /= max_factor
    return [*factors, round(remaining, 9)]


def check_scale(scale: float) -> None:
    """Refuse what is no magnification, or one at which nothing of the photograph is left."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"scale={scale} is not a number; give a magnification such as 4, 16, 64 or 256")
    if not 1 < scale <= MAX_SCALE:
        raise UserError(f"scale={scale:g} is out of range; give a magnification above 1 and up to {MAX_SCALE}")


def check_seed(seed: int) -> None:
    """Refuse a seed that is no whole number."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed={seed} must be a whole number")


def seed_of(seed: int, identity: str, step: int) -> int:
    """The seed of one image at one step: by identity, so that order, batch and resuming change nothing."""
    digest = hashlib.sha256(f"{seed}\0{identity}\0{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits, what a torch.Generator takes


# ---------------------------------------------------------------------------------------------------------------------
# where to look


def check_where(at: Where, steps: int) -> None:
    """Refuse a place that cannot be looked at, before anything is loaded."""
    if at in ("centre", "auto"):
        return
    points = as_points(at)
    if isinstance(points, list) and len(points) < steps:
        raise UserError(f"at names {len(points)} points for {steps} steps; give one per step, or a single point for all")
    for x, y in points if isinstance(points, list) else [points]:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"at={x:g},{y:g} lies outside the picture; give fractions between 0 and 1")


def as_points(at: Where) -> Point | list[Point]:
    """A point, or one point per step, as floats.

    Raises:
        UserError: neither.
    """
    try:
        values = [at_i if isinstance(at_i, int | float) else tuple(float(v) for v in at_i) for at_i in at]  # type: ignore[union-attr]
        if len(values) == 2 and all(isinstance(v, int | float) for v in values):
            return float(values[0]), float(values[1])  # type: ignore[arg-type]
        if values and all(isinstance(v, tuple) and len(v) == 2 for v in values):
            return values  # type: ignore[return-value]
    except (TypeError, ValueError):
        pass
    raise UserError(f"at={at!r} is no place; use centre, auto, a point as [0.31,0.62], or one such point per step")


def look(state_image: Tensor, region: Region, *, step: int, factor: float, at: Where) -> View:
    """The view that the step after a state looks at.

    Args:
        state_image: (3, S, S), the state.
        region: what of the start state it shows.
        step: number of the coming step, from 1.
        factor: its zoom factor.
        at: `centre`; `auto`, the richest view; a point of the start state, followed through the chain; or a list of
            points, one per step, each in fractions of the state it looks at.
    """
    state_px = state_image.shape[-1]
    # One pixel of the start state, in pixels of this one: on that grid a chain's region equals direct enlargement's.
    grid_px = max(1, round(1 / region.side))
    if at == "centre":
        return view_at(state_px, factor)
    if at == "auto":
        return richest_view(state_image, factor, grid_px=grid_px)
    points = as_points(at)
    if isinstance(points, list):
        return view_at(state_px, factor, points[step - 1])
    return view_at(state_px, factor, points if region.side == 1.0 else region.locate(points), grid_px=grid_px)


def richest_view(image: Tensor, factor: float, *, grid_px: int = 1) -> View:
    """The view with the most structure: edges and corners that stand at two scales, which pixel noise does not.

    The measure is the energy of gradients after Gaussian blurs of 2 and 4 px, their product across the two scales
    averaged over the view. White noise loses its energy with the fourth power of the blur and its gradients at the two
    scales agree little, so neither grain nor JPEG blocks attract the view. Ties go to the view nearest the centre.

    Args:
        image: (3, S, S) in [0, 1].
        factor: the zoom factor.
        grid_px: see `view_at`.
    """
    state_px = image.shape[-1]
    size_px = view_at(state_px, factor).size_px
    step = grid_px if grid_px <= size_px else 1
    left_px, top_px = richest_corner(image, (size_px, size_px), grid_px=step)
    return View(left_px=left_px, top_px=top_px, size_px=size_px)


def richest_corner(image: Tensor, size_px: tuple[int, int], *, grid_px: int = 1) -> tuple[int, int]:
    """(left, top) of the richest rectangle of `size_px` = (height, width) in an image (3, H, W); see `richest_view`."""
    state_px = max(image.shape[-2:])
    gray = image.float().mean(0, keepdim=True)[None]
    fine, coarse = (_gradients(_blur(gray, sigma)) for sigma in (2.0, 4.0))
    structure = (fine * coarse).sum(1, keepdim=True).clamp(min=0)  # aligned gradients only
    integral = F.pad(structure[0, 0].double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    height_px, width_px = size_px
    below, above = integral[height_px:], integral[:-height_px]
    scores = below[:, width_px:] - below[:, :-width_px] - above[:, width_px:] + above[:, :-width_px]
    scores = (scores / (height_px * width_px))[::grid_px, ::grid_px]
    y, x = (
        torch.arange(0, side - part + 1, grid_px, dtype=torch.float64) - (side - part) / 2
        for side, part in zip(image.shape[-2:], size_px, strict=True)
    )
    distance = (y[:, None] ** 2 + x[None] ** 2).sqrt() / max(state_px, 1)
    top, left = divmod(int((scores - 1e-9 * distance).argmax()), scores.shape[1])
    return left * grid_px, top * grid_px


def _blur(x: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), taps.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), taps.view(1, 1, -1, 1))


def _gradients(x: Tensor) -> Tensor:
    """(B, 1, H, W) → (B, 2, H, W), central differences."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.cat([dx, dy], 1)


# ---------------------------------------------------------------------------------------------------------------------
# steps


@dataclass(frozen=True)
class StepSettings:
    """What every step of a run has in common."""

    backbone: Backbone
    prompter: Prompter
    rounding: Rounding = "truncate"
    first_pair: FirstPair = "released"


def prompt_pair(
    state_images: Tensor, views: Sequence[View], *, step: int, first_pair: FirstPair
) -> tuple[Tensor, Tensor | None]:
    """What the prompter sees at a step: (current, context), see `prompters.base`. Inference and GRPO both come here.

    `released` passes the pair from the first step on, as the released code does; `paper` passes the start state alone
    at the first step, as Algorithm 1 has it.
    """
    if step == 1 and first_pair == "paper":
        return state_images, None
    size = (state_images.shape[-2], state_images.shape[-1])
    current = torch.cat([resize(view.crop(image[None]), size) for view, image in zip(views, state_images, strict=True)])
    return current, state_images


def ask(state_images: Tensor, views: Sequence[View], *, step: int, seeds: Sequence[int], settings: StepSettings) -> list[str]:
    """The first half of a step: prompts c_i from (x_{i-1}, x_{i-2}). Arguments as in `take_step`."""
    if not getattr(settings.prompter, "reads_images", True):
        return settings.prompter(state_images, None, seeds=seeds)
    current, context = prompt_pair(state_images, views, step=step, first_pair=settings.first_pair)
    return settings.prompter(current, context, seeds=seeds)


def restore(
    state_images: Tensor, views: Sequence[View], prompts: Sequence[str], *, seeds: Sequence[int], settings: StepSettings
) -> Tensor:
    """The second half of a step: x_i from the view and c_i (Eq. 4). Arguments as in `take_step`."""
    lr = torch.cat([view.crop(image[None]) for view, image in zip(views, state_images, strict=True)])
    size = (state_images.shape[-2], state_images.shape[-1])
    images = settings.backbone(lr, size=size, prompts=prompts, seeds=seeds)
    if images.shape != state_images.shape or not bool(torch.isfinite(images).all()):
        name = type(settings.backbone).__name__
        raise ValueError(
            f"{name} returned {tuple(images.shape)} or values that are not finite, expected {tuple(state_images.shape)}"
        )
    return quantize(images, rounding=settings.rounding)


def take_step(
    state_images: Tensor, views: Sequence[View], *, step: int, seeds: Sequence[int], settings: StepSettings
) -> tuple[Tensor, list[str]]:
    """One zoom of a batch: `ask`, then `restore`.

    Args:
        state_images: (B, 3, S, S).
        views: one view per image, all of one size.
        step: number of the step, from 1.
        seeds: one per image.

    Returns:
        The next state's images (B, 3, S, S) on the 8-bit grid, and the prompts.
    """
    prompts = ask(state_images, views, step=step, seeds=seeds, settings=settings)
    return restore(state_images, views, prompts, seeds=seeds, settings=settings), prompts


def zoom_chain(
    x0: Tensor,
    *,
    factors: Sequence[float],
    settings: StepSettings,
    at: Where = "centre",
    seed: int = 0,
    identities: Sequence[str] | None = None,
    start: State | None = None,
) -> Iterator[State]:
    """Zoom into a batch of start states, state after state.

    Args:
        x0: (B, 3, S, S) on the 8-bit grid.
        factors: one zoom factor per step, see `plan_factors`. A single factor is direct enlargement.
        settings: backbone, prompter and protocol.
        at: where to look, see `look`.
        seed: the run's seed.
        identities: one name per image that its seeds derive from; by default its place in the batch.
        start: go on from this state instead of x0.

    Yields:
        The state after each step.
    """
    identities = [str(i) for i in range(len(x0))] if identities is None else identities
    state = start or State(images=x0, regions=(Region(),) * len(x0))
    for step, factor in enumerate(factors[state.step :], start=state.step + 1):
        views = tuple(
            look(image, region, step=step, factor=factor, at=at)
            for image, region in zip(state.images, state.regions, strict=True)
        )
        seeds = [seed_of(seed, identity, step) for identity in identities]
        images, prompts = take_step(state.images, views, step=step, seeds=seeds, settings=settings)
        side = state.images.shape[-1]
        regions = tuple(region.inside(view, side) for region, view in zip(state.regions, views, strict=True))
        state = State(images, step, state.scale * factor, tuple(prompts), views, regions)
        yield state

"""Zoom into a photograph at any place, aspect ratio and scale: the chain of `chain.py` for people.

>>> result = coz.zoom("photo.jpg", scale=64, at=(0.31, 0.62))
>>> result.states[-1].image.show()
>>> result.save("zoomed", film=True)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from coz.backbones.base import Backbone
from coz.chain import FirstPair, StepSettings, check_seed, plan_factors, richest_corner, seed_of, take_step
from coz.errors import UserError
from coz.framing import Frame, Point, Rect, Window, between, frame_of, parse_rect
from coz.image import Rounding, encode_png, from_pil, read_photo, to_pil
from coz.parts import Enlarge, build_parts
from coz.prompters.base import Prompter
from coz.prompters.typed import TypedPrompter
from coz.provenance import note_on
from coz.store import StateStore, fingerprint

STATE_FORMAT = 1  # raised when the same settings would give other states
MIN_SIDE_PX = 8
Place = Literal["centre", "center", "auto"] | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class ZoomState:
    """A picture of the zoom, and how it came about."""

    step: int
    image: Image.Image
    rect: Rect  # what of the photograph it shows
    scale: float  # magnification since the start
    prompt: str = ""
    raw_prompt: str = ""
    window: Window | None = None  # what of the state before it shows, in that state's pixels
    key: str = ""

    @property
    def note(self) -> dict[str, str]:
        """What the picture says of itself (see `provenance.note_on`); it travels in Pillow's `info`, which web pages keep."""
        return {str(name): text for name, text in self.image.info.items() if isinstance(text, str)}

    def describe(self) -> str:
        """Where it is, in a line."""
        rect = self.rect
        place = f"x {rect.left:.4f}-{rect.left + rect.width:.4f}, y {rect.top:.4f}-{rect.top + rect.height:.4f}"
        words = f': "{self.prompt}"' if self.prompt else ""
        return f"step {self.step}  {self.scale:g}x  {place} of the photograph{words}"


@dataclass(frozen=True)
class Zoom:
    """A finished zoom: its states, the first of which is the start."""

    states: tuple[ZoomState, ...]
    photo: Image.Image
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The last state."""
        return self.states[-1].image

    @property
    def prompts(self) -> list[str]:
        """The prompt of each step."""
        return [state.prompt for state in self.states[1:]]

    def save(self, folder: str | Path, *, film: bool = False, fps: int = 30, seconds_per_step: float = 2.5) -> Path:
        """Write every state, the prompts, where each state is, a strip and, if wanted, a film; returns the folder."""
        from coz.zoom_files import save_zoom

        return save_zoom(self, Path(folder), film=film, fps=fps, seconds_per_step=seconds_per_step)


@dataclass(frozen=True)
class Route:
    """Where the steps go: the zoom factor of each, and its target where that is known before the states are.

    `targets` are rectangles of the photograph; `points` are fractions of the state each step looks at; neither means
    that each step takes the richest place.
    """

    frame: Frame
    factors: tuple[float, ...]
    targets: tuple[Rect, ...] = ()
    points: tuple[Point, ...] = ()

    def window(self, image: Tensor, rect: Rect, step: int) -> Window:
        """What step `step` (from 1) looks at in a state (1, 3, H, W) that shows `rect`."""
        size = (image.shape[-2], image.shape[-1])
        if self.targets:
            return rect.window(self.targets[step - 1], size)
        factor = self.factors[step - 1]
        if self.points:
            x, y = self.points[step - 1]
            point = (rect.left + x * rect.width, rect.top + y * rect.height)
            return rect.window(rect.around(point, factor), size)
        window = rect.window(rect.around(rect.center, factor), size)
        left_px, top_px = richest_corner(image[0], (window.height_px, window.width_px))
        return Window(left_px, top_px, window.width_px, window.height_px)


def plan_route(
    photo_size: tuple[int, int],
    *,
    scale: float | None = None,
    at: Place = "centre",
    path: Sequence[Sequence[float] | Rect] | None = None,
    region: Sequence[float] | Rect | None = None,
    aspect: float | str = "photo",
    state_px: int = 512,
    max_factor: float = 4.0,
) -> Route:
    """Check a place and plan the steps to it. Arguments as in `zoom`.

    Raises:
        UserError: a place outside the photograph, a scale or path that makes no sense.
    """
    if isinstance(max_factor, bool) or not isinstance(max_factor, int | float) or not 1 < max_factor <= 64:
        raise UserError(f"max_factor={max_factor} must lie above 1 and up to 64; the paper's is 4")
    start = None if region is None else parse_rect(region, what="region")
    if path is not None:
        if scale is not None:
            raise UserError(f"path says where the zoom ends; leave scale={scale:g} out")
        rects = [parse_rect(rect, what=f"path[{index}]") for index, rect in enumerate(path)]
        if not rects:
            raise UserError("path is empty; give at least one [left,top,width,height]")
        frame = frame_of(photo_size, state_px=state_px, aspect=aspect, region=start, center=rects[0].center)
        return _follow(frame, rects, max_factor)
    factors = tuple(plan_factors(64 if scale is None else scale, max_factor))
    points = _points(at, len(factors))
    goal = points if isinstance(points, tuple) else None
    frame = frame_of(photo_size, state_px=state_px, aspect=aspect, region=start, center=goal)
    if min(frame.size) / max(factors) < MIN_SIDE_PX:
        raise UserError(f"max_factor={max_factor:g} leaves a step fewer than {MIN_SIDE_PX} px; raise state_px={state_px}")
    if isinstance(points, list):
        return Route(frame, factors, points=tuple(points))
    if at == "auto":
        return Route(frame, factors)
    rect, done = frame.rect, 1.0
    goal = goal or rect.center
    if not (rect.left <= goal[0] <= rect.left + rect.width and rect.top <= goal[1] <= rect.top + rect.height):
        raise UserError(f"at={goal[0]:g},{goal[1]:g} lies outside the region that the zoom starts from")
    targets = []
    for factor in factors:
        done *= factor
        targets.append(rect.around(goal, done))
    return Route(frame, factors, targets=tuple(targets))


def _points(at: Place, steps: int) -> Point | list[Point] | None:
    """A point of the photograph, one point per step, or None for a word."""
    if isinstance(at, str):
        if at not in ("centre", "center", "auto"):
            raise UserError(f"at={at} is no place; use centre, auto, or fractions of the photograph such as 0.31,0.62")
        return None
    try:
        if all(isinstance(value, int | float) for value in at):
            values: list[Point] = [(float(at[0]), float(at[1]))] if len(at) == 2 else []  # type: ignore[arg-type]
            single = True
        else:
            values, single = [(float(x), float(y)) for x, y in at], False  # type: ignore[union-attr,misc]
    except (TypeError, ValueError):
        values, single = [], False
    if not values:
        raise UserError(f"at={at} is no place; use centre, auto, a point [x,y], or a list of one [x,y] per step")
    for x, y in values:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"at={x:g},{y:g} lies outside the picture; give fractions between 0 and 1")
    if not single and len(values) < steps:
        raise UserError(f"at names {len(values)} points for {steps} steps; give one per step, or a single point for all")
    return values[0] if single else values


def _follow(frame: Frame, rects: Sequence[Rect], max_factor: float) -> Route:
    """Steps of at most `max_factor` from rectangle to rectangle, each brought to the frame's shape."""
    here, factors, targets = frame.rect, [], []
    for index, rect in enumerate(rects):
        share = max(rect.width / here.width, rect.height / here.height)
        slack = 1e-9
        outside = (
            rect.left < here.left - slack
            or rect.top < here.top - slack
            or rect.left + rect.width > here.left + here.width + slack
            or rect.top + rect.height > here.top + here.height + slack
        )
        if outside or share >= 1 - slack:
            raise UserError(f"path[{index}] does not lie inside what is shown before it; each must be inside the last")
        goal = here.holding(Rect(0, 0, here.width * share, here.height * share), rect.center)
        done = 1.0
        for factor in plan_factors(1 / share, max_factor):
            done *= factor
            factors.append(factor)
            targets.append(between(here, goal, done))
        here = goal
    return Route(frame, tuple(factors), targets=tuple(targets))


# ---------------------------------------------------------------------------------------------------------------------
# steps


@dataclass(frozen=True)
class Zoomer:
    """Makes the states of a route, each once: with a store a rerun, or one with other words at a late step, reads what is
    there and computes the rest."""

    photo: Image.Image
    route: Route
    settings: StepSettings
    seed: int = 0
    words: Mapping[int, str] = field(default_factory=dict)  # step → prompt, instead of the prompter's
    store: StateStore | None = None

    def __iter__(self) -> Iterator[ZoomState]:
        """The start state, then the state after each step."""
        state = self._start()
        yield state
        for step in range(1, len(self.route.factors) + 1):
            state = self._step(state, step)
            yield state

    def _start(self) -> ZoomState:
        frame = self.route.frame
        digest = hashlib.sha256(self.photo.tobytes()).hexdigest()
        made_by = {"format": STATE_FORMAT, "photo": digest, "photo_size": list(self.photo.size), "frame": _plain(frame)}
        image = to_pil(frame.cut(self.photo))[0]
        key = fingerprint(made_by)
        image.info.update(note_on(backbone={}, prompter={}, scale=1.0, fingerprint=key))
        return ZoomState(step=0, image=image, rect=frame.rect, scale=1.0, key=key)

    def _step(self, state: ZoomState, step: int) -> ZoomState:
        x = from_pil(state.image)
        window = self.route.window(x, state.rect, step)
        settings = self.settings
        if step in self.words:
            settings = StepSettings(settings.backbone, TypedPrompter(self.words[step]), settings.rounding, settings.first_pair)
        made_by = {
            "format": STATE_FORMAT,
            "parent": state.key,
            "window": _plain(window),
            "seed": self.seed,
            "backbone": dict(settings.backbone.fingerprint),
            "prompter": dict(settings.prompter.fingerprint),
            "rounding": settings.rounding,
            "first_pair": settings.first_pair,
        }
        key = fingerprint(made_by)

        def compute() -> tuple[Image.Image, str]:
            seed = seed_of(self.seed, state.key, step)
            images, prompts = take_step(x, [window], step=step, seeds=[seed], settings=settings)  # type: ignore[list-item]
            return to_pil(images)[0], prompts[0]

        rect = state.rect.inside(window, (state.image.height, state.image.width))
        scale = round(self.route.frame.rect.width / rect.width, 6)

        backbone, prompter = settings.backbone.fingerprint, settings.prompter.fingerprint
        note = functools.partial(
            note_on, backbone=backbone, prompter=prompter, scale=scale, fingerprint=key
        )  # lacks the prompt
        image, prompt, raw = self._stored(key, compute, made_by, note) if self.store else _unpack(compute())
        image.info.update(note(prompt=prompt))
        return ZoomState(step, image, rect, scale, prompt, raw, window, key)

    def _stored(
        self, key: str, compute: object, made_by: Mapping[str, object], note: Callable[..., Mapping[str, str]]
    ) -> tuple[Image.Image, str, str]:
        store = self.store
        assert store is not None
        found = store.get(key)
        if found is None:
            with store.claim([key], wait=True):
                found = store.get(key)  # another process may have made it meanwhile
                if found is None:
                    image, prompt, raw = _unpack(compute())  # type: ignore[operator]
                    data = encode_png(image, note=note(prompt=prompt))
                    found = store.put(key, data, {"prompt": prompt, "raw_prompt": raw, "made_by": made_by})
        with Image.open(found.image_path) as file:
            return file.convert("RGB"), str(found.meta["prompt"]), str(found.meta["raw_prompt"])


def _unpack(result: tuple[Image.Image, str]) -> tuple[Image.Image, str, str]:
    image, prompt = result
    return image, str(prompt), str(getattr(prompt, "raw", prompt))


def _plain(value: Frame | Window) -> dict[str, object]:
    return asdict(value)


def step_settings(
    backbone: Backbone, prompter: Prompter, *, rounding: Rounding, first_pair: FirstPair, seed: int
) -> StepSettings:
    """What every step has in common, checked.

    Raises:
        UserError: an unknown rounding or first pair, a seed that is none.
    """
    if rounding not in ("round", "truncate"):
        raise UserError(f"rounding={rounding} is unknown; use round or truncate")
    if first_pair not in ("released", "paper"):
        raise UserError(f"first_pair={first_pair} is unknown; use released or paper")
    check_seed(seed)
    return StepSettings(backbone, prompter, rounding, first_pair)


def check_words(words: Mapping[int, str], steps: int) -> dict[int, str]:
    """Prompts by step, refused where there is no such step."""
    checked = {}
    if not isinstance(words, Mapping):
        raise UserError(f"prompts={words} gives no words by step; write prompts='{{2: a tabby cat}}'")
    for step, text in words.items():
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= steps:
            raise UserError(f"prompts has words for step {step}; this zoom has steps 1 to {steps}")
        checked[step] = str(text)
    return checked


def zoom(
    photo: str | Path | Image.Image,
    *,
    scale: float | None = None,
    at: Place = "centre",
    path: Sequence[Sequence[float] | Rect] | None = None,
    region: Sequence[float] | Rect | None = None,
    aspect: float | str = "photo",
    state_px: int = 512,
    backbone: str | Backbone | Enlarge | None = None,
    prompter: str | Prompter | None = None,
    profile: str = "embedded",
    prompts: Mapping[int, str] | None = None,
    seed: int = 0,
    max_factor: float = 4.0,
    rounding: Rounding = "round",
    first_pair: FirstPair = "released",
    device: str = "auto",
    precision: str = "auto",
    store: str | Path | None = None,
) -> Zoom:
    """Zoom into a photograph.

    Args:
        photo: a file, or an image.
        scale: magnification, any number above 1; 64 where neither it nor a path is given.
        at: `centre`; `auto`, the richest place of each state; (x, y) of the photograph; or one (x, y) per step, each in
            fractions of the state it looks at.
        path: rectangles (left, top, width, height) of the photograph to visit, each inside the one before.
        region: start from this rectangle of the photograph, with the photograph's own pixels.
        aspect: `photo`, or a ratio of width to height such as "1:1".
        state_px: short side of every state.
        backbone: a config's name, a built backbone, or a function `(lr, size) -> image` (see `parts.CallableBackbone`);
            None is the profile's.
        prompter: a config's name or a built prompter; None is the profile's.
        profile: `embedded` runs at once; `paper` is the paper's models.
        prompts: words of one's own for some steps, by step from 1.
        seed: of everything random.
        max_factor: zoom of one step.
        rounding, first_pair: see `chain.StepSettings`.
        device, precision: for parts that are given by name.
        store: a folder in which states are kept, so that another call goes on from them; None keeps nothing.

    Raises:
        UserError: a mistake in any of these, said before any weights load.
    """
    image = photo.convert("RGB") if isinstance(photo, Image.Image) else read_photo(photo, min_side_px=MIN_SIDE_PX)
    route = plan_route(
        image.size,
        scale=scale,
        at=at,
        path=path,
        region=region,
        aspect=aspect,
        state_px=state_px,
        max_factor=max_factor,
    )
    words = check_words(prompts or {}, len(route.factors))
    built = build_parts(backbone=backbone, prompter=prompter, profile=profile, device=device, precision=precision)
    settings = step_settings(*built, rounding=rounding, first_pair=first_pair, seed=seed)
    zoomer = Zoomer(image, route, settings, seed, words, None if store is None else StateStore(store))
    about = {"backbone": dict(built[0].fingerprint), "prompter": dict(built[1].fingerprint), "seed": seed}
    return Zoom(tuple(zoomer), image, about)

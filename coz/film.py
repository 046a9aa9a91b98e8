"""A film of a zoom: one smooth flight through its states.

Every frame shows a rectangle of the photograph. The state that still covers it is drawn enlarged, and the next state,
which covers its middle, fades in over it while its edge softens less and less, until it fills the frame alone; then it
is the state that covers. So nothing changes from one frame to the next but the place and, gradually, the detail.
Before that each state gets the low frequencies of the one before it, for a restored state may differ in tone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coz.errors import UserError
from coz.framing import Rect, between
from coz.image import fix_color, from_pil, resize, to_uint8
from coz.store import atomic_path
from coz.zooming import ZoomState

ColorMatch = Literal["wavelet", "adain", "none"]
_FEATHER = 0.25  # of the next state's side, when it begins to show
_HOLD_SECONDS = (0.5, 1.0)  # at the first and the last state


def check_film(*, fps: int, seconds_per_step: float) -> None:
    """Refuse what no film can have, and a machine without an encoder, before anything is computed.

    Raises:
        UserError: a rate or length out of range, imageio-ffmpeg not installed.
    """
    if isinstance(fps, bool) or not isinstance(fps, int) or not 1 <= fps <= 120:
        raise UserError(f"film_fps={fps} must be a whole number from 1 to 120")
    if not 0 < seconds_per_step <= 60:
        raise UserError(f"film_seconds={seconds_per_step} must lie above 0 and up to 60")
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise UserError("a film needs imageio-ffmpeg; install it with `pip install imageio-ffmpeg`") from error


def write_film(
    path: str | Path,
    states: Sequence[ZoomState],
    *,
    fps: int = 30,
    seconds_per_step: float = 2.5,
    color_match: ColorMatch = "wavelet",
) -> Path:
    """Write the flight through the states as an H.264 mp4, whole or not at all.

    Raises:
        UserError: see `check_film`; a full disk.
    """
    check_film(fps=fps, seconds_per_step=seconds_per_step)
    import imageio_ffmpeg

    height, width = states[0].image.height, states[0].image.width
    with atomic_path(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            macro_block_size=2,
            output_params=[*_note(states), "-crf", "17", "-preset", "fast", "-movflags", "+faststart", "-f", "mp4"],
        )
        writer.send(None)
        try:
            for frame in film_frames(states, fps=fps, seconds_per_step=seconds_per_step, color_match=color_match):
                writer.send(np.ascontiguousarray(frame))
        finally:
            writer.close()
    return Path(path)


def _note(states: Sequence[ZoomState]) -> list[str]:
    """What the last state says of itself, as the film's comment."""
    told = " ".join(f"{name}: {text}." for name, text in states[-1].note.items())
    return ["-metadata", f"comment={told}"] if told else []


def film_frames(
    states: Sequence[ZoomState], *, fps: int = 30, seconds_per_step: float = 2.5, color_match: ColorMatch = "wavelet"
) -> Iterator[np.ndarray]:
    """The frames of the film, (H, W, 3) uint8, at a constant speed of zoom but for a soft start and end."""
    layers = matched(states, color_match)
    rects = [state.rect for state in states]
    depths = [0.0]  # logarithm of the magnification at each state
    for first, last in itertools.pairwise(rects):
        depths.append(depths[-1] + math.log(first.width / last.width))
    moving = max(2, round(fps * seconds_per_step * (len(states) - 1)))
    for tick in range(-round(fps * _HOLD_SECONDS[0]), moving + round(fps * _HOLD_SECONDS[1])):
        depth = depths[-1] * _eased(min(max(tick / (moving - 1), 0.0), 1.0))
        yield to_uint8(render(layers, rects, depths, depth)[None])[0]


def matched(states: Sequence[ZoomState], color_match: ColorMatch = "wavelet") -> list[Tensor]:
    """The states (3, H, W), each with the low frequencies (or mean and deviation) of what it enlarges."""
    layers = [from_pil(states[0].image)]
    for state in states[1:]:
        image = from_pil(state.image)
        assert state.window is not None
        source = resize(state.window.crop(layers[-1]), (image.shape[-2], image.shape[-1]))
        layers.append(fix_color(image, source, color_match).clamp(0, 1))
    return [layer[0] for layer in layers]


def render(layers: Sequence[Tensor], rects: Sequence[Rect], depths: Sequence[float], depth: float) -> Tensor:
    """One frame (3, H, W) at a depth of the flight.

    Args:
        layers: the states (3, H, W).
        rects: what of the photograph each shows.
        depths: logarithm of the magnification at each.
        depth: where to look, from 0 to `depths[-1]`.
    """
    index = max(i for i, at in enumerate(depths) if at <= depth + 1e-12)
    if index == len(layers) - 1:
        return layers[-1]
    progress = (depth - depths[index]) / (depths[index + 1] - depths[index])
    rect = between(rects[index], rects[index + 1], math.exp(depth - depths[index]))
    size = (layers[0].shape[-2], layers[0].shape[-1])
    below, _ = _drawn(layers[index], rects[index], rect, size, feather=0.0)
    above, cover = _drawn(layers[index + 1], rects[index + 1], rect, size, feather=_FEATHER * (1 - progress))
    opacity = _smooth(progress) * cover
    return below * (1 - opacity) + above * opacity


def _drawn(layer: Tensor, shows: Rect, rect: Rect, size: tuple[int, int], *, feather: float) -> tuple[Tensor, Tensor]:
    """A layer resampled into a frame that shows `rect`, and how much of each pixel it covers, (H, W) in [0, 1]."""
    rows, cover_y = _axis(layer.shape[-2], shows.top, shows.height, rect.top, rect.height, size[0], feather)
    columns, cover_x = _axis(layer.shape[-1], shows.left, shows.width, rect.left, rect.width, size[1], feather)
    return rows @ layer @ columns.T, torch.outer(cover_y, cover_x)


def _axis(
    source_px: int, start: float, length: float, shown_start: float, shown_length: float, target_px: int, feather: float
) -> tuple[Tensor, Tensor]:
    """Resampling along one axis as a matrix (target, source), and the cover (target,).

    Cubic interpolation, widened where the source is finer than the frame, so that nothing flickers.
    """
    centers = (torch.arange(target_px, dtype=torch.float64) + 0.5) / target_px * shown_length + shown_start
    along = (centers - start) / length  # 0 to 1 inside the source
    pixels_per_pixel = max(1.0, shown_length / target_px / (length / source_px))
    positions = (along.clamp(0, 1) * source_px - 0.5)[:, None]
    weights = _cubic((positions - torch.arange(source_px, dtype=torch.float64)) / pixels_per_pixel)
    weights = weights / weights.sum(1, keepdim=True)
    half_px = shown_length / target_px / length / 2
    inside = torch.minimum(along, 1 - along) + half_px
    cover = (inside / max(feather, 2 * half_px)).clamp(0, 1)
    return weights.float(), (cover * cover * (3 - 2 * cover)).float()


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1/2."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _smooth(x: float) -> float:
    return x * x * (3 - 2 * x)


def _eased(x: float, soft: float = 0.12) -> float:
    """Constant speed but for a soft start and end, from 0 to 1."""
    speed = 1 / (1 - soft)
    if x < soft:
        return speed * x * x / (2 * soft)
    if x > 1 - soft:
        return 1 - speed * (1 - x) ** 2 / (2 * soft)
    return speed * (x - soft / 2)

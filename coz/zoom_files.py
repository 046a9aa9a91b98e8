"""A zoom's files: its states, what they show and say, a strip, a film."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from PIL import Image

from coz.image import encode_png
from coz.plots import draw_zoom
from coz.provenance import note_on_several
from coz.store import fingerprint, write_atomic, write_json
from coz.zooming import Zoom, ZoomState


def save_zoom(zoom: Zoom, folder: Path, *, film: bool, fps: int, seconds_per_step: float) -> Path:
    """Write a zoom into a folder; see `Zoom.save`."""
    if film:
        from coz.film import check_film, write_film

        check_film(fps=fps, seconds_per_step=seconds_per_step)
    for state in zoom.states:
        save_state(state, folder)
    write_atomic(folder / "prompts.txt", "".join(f"{state.scale:g}x\t{state.prompt}\n" for state in zoom.states[1:]))
    write_json(folder / "zoom.json", {"settings": zoom.settings, "states": [describe(state) for state in zoom.states]})
    write_atomic(folder / "strip.png", encode_png(strip(zoom), note=_strip_note(zoom)))
    if film:
        write_film(folder / "film.mp4", zoom.states, fps=fps, seconds_per_step=seconds_per_step)
    return folder


def save_state(state: ZoomState, folder: Path) -> Path:
    """Write one state as `<step>_<scale>x.png`."""
    path = folder / f"{state.step}_{state.scale:g}x.png"
    write_atomic(path, encode_png(state.image, note=state.note))
    return path


def describe(state: ZoomState) -> dict[str, object]:
    """A state as JSON: where it is, at what scale, with which words."""
    return {
        "step": state.step,
        "scale": state.scale,
        "shows": asdict(state.rect),
        "window": None if state.window is None else asdict(state.window),
        "prompt": state.prompt,
        "raw_prompt": state.raw_prompt,
        "file": f"{state.step}_{state.scale:g}x.png",
        "key": state.key,
    }


def strip(zoom: Zoom) -> Image.Image:
    """The photograph with a frame around each state, then the states side by side with their prompts."""
    steps = zoom.states[1:]
    rects = [(s.rect.left, s.rect.top, s.rect.width, s.rect.height) for s in steps]
    return draw_zoom(zoom.photo, [(s.image, f"{s.scale:g}×", s.prompt) for s in steps], rects)


def _strip_note(zoom: Zoom) -> dict[str, str]:
    steps = zoom.states[1:]
    told = {name: sorted({state.note[name] for state in steps if name in state.note}) for name in ("Backbone", "Prompter")}
    return note_on_several(
        backbones=told["Backbone"],
        prompters=told["Prompter"],
        scales=[state.scale for state in steps],
        fingerprint=fingerprint({"strip": [state.key for state in zoom.states]}),
    )

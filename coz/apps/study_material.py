"""What raters see: zoom sequences and texts of the same photographs under each condition, out of runs of `evaluate.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coz.errors import UserError
from coz.report.reading import Results, read_results
from coz.store import fingerprint
from coz.stored_chains import Chain

_OFF_CENTRE_PX = 2  # rounding of the views; the instructions say that the zoom goes to the centre


@dataclass(frozen=True)
class Sample:
    """One photograph under one condition."""

    pictures: tuple[Path, ...]
    """The start state and each state of the chain."""
    scales: tuple[float, ...]
    text: str
    text_picture: Path
    """What the text's step looked into, with the box around what it describes."""
    box: tuple[float, float, float]
    """Left, top, side, as fractions of that picture."""


@dataclass(frozen=True)
class Material:
    """Samples of every photograph that has all conditions."""

    conditions: tuple[str, ...]
    samples: Mapping[tuple[str, str], Sample]
    """(photo, condition) → sample."""
    identity: str
    """Changes with the conditions and the states behind them."""

    @property
    def photos(self) -> list[str]:
        return sorted({photo for photo, _ in self.samples})

    @property
    def texts(self) -> list[str]:
        """Photographs that have a text under every condition."""
        return [p for p in self.photos if all(self.samples[p, condition].text.strip() for condition in self.conditions)]


def read_material(
    runs: Sequence[Path], conditions: Mapping[str, str], *, text_step: int, states: Path | None = None
) -> Material:
    """The samples of some runs.

    Args:
        conditions: name → method, as the runs' tables write it.
        text_step: the step whose prompts are rated; at the first all conditions look into the same picture.

    Raises:
        UserError: unknown methods, fewer than two conditions, no photograph under all of them, zooms off the centre or
            of different steps.
    """
    if len(conditions) < 2:
        raise UserError("a study compares at least two conditions; give them as --conditions multi=coz_vlm tuned=…")
    results = read_results(runs, states=states)
    methods = sorted({str(row["method"]) for row in results.done})
    unknown = [method for method in conditions.values() if method not in methods]
    if unknown:
        raise UserError(f"no method {', '.join(unknown)} in these runs; they hold {', '.join(methods)}")
    scale = max(float(row["scale"]) for row in results.done)  # type: ignore[arg-type]
    samples, keys = {}, []
    for photo in results.photos:
        have = results.keys(photo)
        chains = {name: results.states.chain(have.get((method, scale), "")) for name, method in conditions.items()}
        if all(chain is not None and chain.steps for chain in chains.values()):
            for name, chain in chains.items():
                assert chain is not None
                samples[photo, name] = _sample(results, photo, chain, text_step)
                keys.append(chain.steps[-1].key)
            lengths = {name: samples[photo, name].scales for name in conditions}
            if len(set(lengths.values())) > 1:  # raters would tell the conditions apart by the number of pictures
                steps = ", ".join(f"{name}: {len(scales) - 1}" for name, scales in lengths.items())
                raise UserError(f"the conditions zoom in different numbers of steps ({steps}); compare chains with chains")
    if not samples:
        raise UserError(f"no photograph has states of all conditions at {scale:g}x; evaluate all methods at the same scale")
    identity = fingerprint({"conditions": dict(conditions), "states": sorted(keys), "text_step": text_step})
    return Material(tuple(conditions), samples, identity)


def _sample(results: Results, photo: str, chain: Chain, text_step: int) -> Sample:
    if not 1 <= text_step <= len(chain.steps):
        raise UserError(f"--text-step {text_step} must be 1 to {len(chain.steps)}, the steps of these chains")
    keys = [chain.start, *(step.key for step in chain.steps)]
    pictures = [results.states.image(key) for key in keys]
    if any(path is None for path in pictures):
        raise UserError(f"pictures of {photo} are gone from the state store; run evaluate.py again, it makes what is missing")
    kept = tuple(path for path in pictures if path is not None)
    boxes = [_box(results, photo, key, parent) for key, parent in zip(keys[1:], kept, strict=False)]
    scales = (1.0, *(step.scale for step in chain.steps))
    at = text_step - 1
    return Sample(kept, scales, chain.steps[at].prompt, kept[at], boxes[at])


def _box(results: Results, photo: str, key: str, parent: Path) -> tuple[float, float, float]:
    meta = results.states.meta(key)
    assert meta is not None  # its chain was read through it
    with Image.open(parent) as image:
        side_px = image.width
    view = meta["view"]
    middles = [view[edge] + view["size_px"] / 2 for edge in ("left_px", "top_px")]
    if any(abs(middle - side_px / 2) > _OFF_CENTRE_PX for middle in middles):
        raise UserError(f"the zoom into {photo} misses the centre, where the study's instructions place it; use at=centre")
    return view["left_px"] / side_px, view["top_px"] / side_px, view["size_px"] / side_px

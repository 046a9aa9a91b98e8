"""Chains as figures show them: each state's picture, words, and place in the picture before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coz.errors import UserError
from coz.image import Region, View
from coz.report.reading import Results
from coz.tables import method_order

# As the paper's figures write them.
_LABELS = {
    "nn": "NN Interpolation",
    "bicubic": "Bicubic Interpolation",
    "direct": "Direct SR",
    "coz_null": "CoZ (Null)",
    "coz_tags": "CoZ (tags)",
    "coz_dape": "CoZ (DAPE)",
    "coz_vlm_single": "CoZ (VLM, single image)",
    "coz_vlm": "CoZ (VLM)",
}


@dataclass(frozen=True)
class Shot:
    """A state of a chain."""

    key: str
    image: Path
    scale: float
    prompt: str
    view: Region  # what it shows of the picture before it
    region: Region  # and of the start state


@dataclass(frozen=True)
class ShownChain:
    """A start state and what came of it."""

    start: Path
    shots: tuple[Shot, ...]


def read_chain(results: Results, key: str) -> ShownChain | None:
    """The chain that ends in a state, or None where a picture of it is gone."""
    chain = results.states.chain(key)
    start = results.states.image(chain.start) if chain else None
    if chain is None or start is None:
        return None
    with Image.open(start) as image:
        state_px = image.width
    region, shots = Region(), []
    for step in chain.steps:
        image_path, meta = results.states.image(step.key), results.states.meta(step.key)
        if image_path is None or meta is None:
            return None
        view = View(**meta["view"])
        region = region.inside(view, state_px)
        shots.append(Shot(step.key, image_path, step.scale, step.prompt, Region().inside(view, state_px), region))
    return ShownChain(start, tuple(shots))


def choose_photos(results: Results, names: Sequence[str] | None, *, limit: int) -> list[str]:
    """The photographs asked for, or the first few.

    Raises:
        UserError: one that these runs do not hold, or no picture at all.
    """
    if not results.photos:
        raise UserError("these runs made no picture; see the failures in their table.md")
    if results.states.root is None:
        raise UserError("the state store was not found above these runs; name it with --states, such as outputs/states")
    unknown = [name for name in names or () if name not in results.photos]
    if unknown:
        raise UserError(f"no photograph {', '.join(unknown)} in these runs; they hold {', '.join(results.photos)}")
    return list(names or results.photos[:limit])


def choose_methods(results: Results, asked: Sequence[str] | None) -> dict[str, str]:
    """Method → its label, in the order asked for or the paper's. What is asked for is METHOD or LABEL=METHOD.

    Raises:
        UserError: a method that these runs do not hold.
    """
    known = sorted({str(row["method"]) for row in results.done}, key=method_order)
    chosen = {}
    for word in asked or known:
        label, _, method = word.partition("=")
        if word in known:
            method, label = word, _label(word)
        if method not in known:
            raise UserError(f"no method {method or word} in these runs; they hold {', '.join(known)}")
        chosen[method] = label
    return chosen


def _label(method: str) -> str:
    """`coz_vlm[prompter.adapter=x]` → `CoZ (VLM) [prompter.adapter=x]`."""
    base, bracket, rest = method.partition("[")
    return _LABELS.get(base, base) + (f" [{rest}" if bracket else "")


def choose_scales(results: Results, asked: Sequence[float] | None) -> list[float]:
    """The scales asked for, or all.

    Raises:
        UserError: one that these runs do not hold.
    """
    known = sorted({float(row["scale"]) for row in results.done})  # type: ignore[arg-type]
    unknown = [scale for scale in asked or () if scale not in known]
    if unknown:
        have = ", ".join(f"{scale:g}" for scale in known)
        raise UserError(f"no scale {', '.join(f'{scale:g}' for scale in unknown)} in these runs; they hold {have}")
    return sorted(asked or known)


def deepest_chain(results: Results, photo: str, method: str) -> ShownChain | None:
    """A photograph's chain to the largest scale of a method, or None where there is none."""
    mine = {scale: key for (own, scale), key in results.keys(photo).items() if own == method}
    return read_chain(results, mine[max(mine)]) if mine else None

"""Chains out of a state store, for strips, figures and reports: which states they are, and what each shows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from coz.image import Region, View


@dataclass(frozen=True)
class ChainStep:
    """One state of a chain, as its `state.json` describes it."""

    key: str
    step: int
    scale: float
    prompt: str
    view: View
    """What it shows of the state before it, in that state's pixels."""


@dataclass(frozen=True)
class Chain:
    """A finished state's way from the photograph, in order of the steps."""

    start: str
    """The start state's key."""
    steps: tuple[ChainStep, ...]


@dataclass
class StateFolder:
    """Reads chains out of a state store without ever writing to it."""

    root: Path | None
    """None: the states are not here, and everything is absent."""
    _metas: dict[str, dict | None] = field(default_factory=dict)

    def image(self, key: str) -> Path | None:
        """A state's picture, or None where it is gone."""
        path = self.root / key / "image.png" if self.root and key else None
        return path if path is not None and path.is_file() else None

    def meta(self, key: str) -> dict | None:
        """A state's description, or None where it is gone."""
        if key not in self._metas:
            try:
                self._metas[key] = json.loads((self.root / key / "state.json").read_text()) if self.root else None
            except (FileNotFoundError, json.JSONDecodeError):
                self._metas[key] = None
        return self._metas[key]

    def chain(self, key: str) -> Chain | None:
        """The chain that ends in a state, or None where a state of it is gone."""
        steps: list[ChainStep] = []
        while (meta := self.meta(key)) is not None:
            if meta["step"] == 0:
                return Chain(key, tuple(reversed(steps)))
            view = View(**meta["view"])
            steps.append(ChainStep(key, int(meta["step"]), float(meta["scale"]), str(meta["prompt"]), view))
            key = str(meta["parent"])
        return None

    def regions(self, chain: Chain) -> list[Region]:
        """What each step of a chain shows of its start state; empty where the start's picture is gone."""
        start = self.image(chain.start)
        if start is None:
            return []
        with Image.open(start) as image:
            state_px = image.width
        region, regions = Region(), []
        for step in chain.steps:
            region = region.inside(step.view, state_px)
            regions.append(region)
        return regions


@dataclass(frozen=True)
class Shot:
    """A state of a chain whose pictures are all here."""

    key: str
    image: Path
    scale: float
    prompt: str
    region: Region  # what it shows of the start state


@dataclass(frozen=True)
class ShownChain:
    """A start state and what came of it."""

    start: Path
    shots: tuple[Shot, ...]


def read_chain(states: StateFolder, key: str) -> ShownChain | None:
    """The chain that ends in a state, or None where a picture of it is gone."""
    chain = states.chain(key)
    start = states.image(chain.start) if chain else None
    if chain is None or start is None:
        return None
    shots = []
    for step, region in zip(chain.steps, states.regions(chain), strict=True):
        image = states.image(step.key)
        if image is None:
            return None
        shots.append(Shot(step.key, image, step.scale, step.prompt, region))
    return ShownChain(start, tuple(shots))

"""States of chains to train the prompt extractor on: what `coz.apps.make_pairs` is the table of contents of."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from coz import cli
from coz.chain import MAX_FACTOR, StepSettings, look, seed_of
from coz.data.photos import Photo
from coz.errors import UserError
from coz.evaluation import Lineage, Plan, StateMaker
from coz.image import View, from_pil, read_photo
from coz.models.placement import pick_device
from coz.parts import build_pair
from coz.store import StateStore, StoredState, write_json

logger = logging.getLogger(__name__)

_GPU_BATCH = 4


@dataclass(frozen=True)
class Job:
    """A configuration and its folder."""

    config: DictConfig
    folder: Path


@dataclass(frozen=True)
class Parts:
    """What the states are made with, checked; weights not yet loaded."""

    settings: StepSettings
    plan: Plan
    photos: list[Photo]  # one entry per chain, each with its place
    store: StateStore
    overlap: bool = True  # whether the GPU has room for prompter and backbone at work


def open_job(config_name: str) -> Job:
    """Resolve the configuration of the running Hydra job and record it in its folder."""
    config, folder = cli.resolve(config_name), Path(HydraConfig.get().runtime.output_dir)
    cli.record_provenance(folder, config)
    return Job(config, folder)


def build_parts(job: Job) -> Parts:
    """Everything that the states need, checked before any weights load.

    Raises:
        UserError: a setting out of range, or weights that are missing (all of them in one sentence).
    """
    config = job.config
    for key in ("max_depth", "places"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]} must be at least 1")
    photos = cli.build(config.dataset)
    on_gpu = pick_device(config.device).type == "cuda"
    plan = Plan(
        factors=[MAX_FACTOR] * (config.max_depth - 1),
        at="sample",
        seed=config.seed,
        start_px=config.chain.start_px,
        start_rounding=config.protocol.start_rounding,
        batch_size=config.batch_size or (_GPU_BATCH if on_gpu else 1),
    )
    backbone, prompter = build_pair(config, batch=plan.batch_size, together=bool(config.memory.overlap))
    settings = StepSettings(
        backbone=backbone, prompter=prompter, rounding=config.protocol.rounding, first_pair=config.chain.first_pair
    )
    chains = [
        dataclasses.replace(photo, at=random_place(photo.name, place, seed=config.seed))
        for place in range(config.places)
        for photo in photos  # type: ignore[attr-defined]
    ]
    return Parts(settings, plan, chains, StateStore(Path(config.outputs) / "states"), overlap=bool(config.memory.overlap))


def random_place(name: str, place: int, *, seed: int) -> tuple[float, float]:
    """A place of a photograph, by its name and a number, as fractions of the centred square."""
    x, y = torch.rand(2, generator=torch.Generator().manual_seed(seed_of(seed, name, place)), dtype=torch.float64).tolist()
    return x, y


def make_states(job: Job, parts: Parts) -> list[Lineage]:
    """The last state of every chain, from the store or computed into it."""
    lineages: list[Lineage] = []
    places = job.config.places
    per_place = len(parts.photos) // places
    total = len(parts.photos) * len(parts.plan.factors)
    with tqdm(total=total, desc="chains", unit="state", disable=None) as bar:
        for place in range(places):  # a photograph once per run of the maker: failures are known by its name
            maker = StateMaker(
                store=parts.store,
                settings=parts.settings,
                plan=parts.plan,
                on_state=bar.update,
                overlap=parts.overlap,
            )
            lineages += maker.run(parts.photos[place * per_place : (place + 1) * per_place])
    if not lineages:
        raise UserError(f"none of the {per_place} photographs gave a state; see the log in {job.folder}")
    return lineages


def write_index(job: Job, parts: Parts, lineages: Sequence[Lineage]) -> None:
    """Where the pair of each depth of each chain lies: a state's picture and the view that the next step looks at."""
    index = Path(job.config.index)
    rows = [row for lineage in lineages for row in _pairs_of(lineage, parts, relative_to=index.parent)]
    made_by = {"backbone": dict(parts.settings.backbone.fingerprint), "prompter": dict(parts.settings.prompter.fingerprint)}
    write_json(index, {"made_by": made_by, "pairs": rows})
    logger.info("%d pairs of %d chains are in %s", len(rows), len(lineages), index)


def _pairs_of(lineage: Lineage, parts: Parts, *, relative_to: Path) -> list[dict[str, object]]:
    chain = [lineage.state]
    while int(chain[0].meta["step"]) > 0:  # type: ignore[call-overload]
        parent = parts.store.get(str(chain[0].meta["parent"]))
        assert parent is not None
        chain.insert(0, parent)
    views = [dict(state.meta["view"]) for state in chain[1:]]  # type: ignore[call-overload]
    views.append(dataclasses.asdict(_next_view(lineage, step=len(chain))))
    return [_row(lineage, state, view, relative_to) for state, view in zip(chain, views, strict=True)]


def _next_view(lineage: Lineage, *, step: int) -> View:
    image = from_pil(read_photo(lineage.state.image_path))[0]
    return look(image, lineage.region, step=step, factor=MAX_FACTOR, at=lineage.photo.at or "centre")


def _row(lineage: Lineage, state: StoredState, view: dict[str, int], relative_to: Path) -> dict[str, object]:
    path = os.path.relpath(state.image_path, relative_to)
    return {"photo": lineage.photo.name, "path": path, "step": int(state.meta["step"]) + 1, **view}  # type: ignore[call-overload]

"""One evaluation job, from its configuration to its rows: what `evaluate.py` is the table of contents of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from coz import cli, results
from coz.backbones.base import Backbone
from coz.chain import StepSettings, check_where, plan_factors
from coz.checkpoint import WeightsNotFound
from coz.data.photos import Photo
from coz.errors import UserError
from coz.evaluation import Failure, Labels, Lineage, Plan, StateMaker, measure, plan_for, row_order
from coz.metrics import Metric
from coz.models.placement import pick_device
from coz.prompters.base import Prompter
from coz.store import StateStore, write_json
from coz.tables import Column, Refusal, Row

logger = logging.getLogger(__name__)

_GPU_BATCH = 4


@dataclass
class Job:
    """A job's configuration, its folder, and what it could not do."""

    config: DictConfig
    folder: Path
    in_sweep: bool
    overrides: list[str]
    refusals: list[Refusal] = field(default_factory=list)

    @contextmanager
    def refusals_noted(self) -> Iterator[None]:
        """In a sweep, what cannot run here becomes a named empty cell; alone it is the run's error."""
        try:
            yield
        except (cli.NotHere, WeightsNotFound) as error:
            if not self.in_sweep:
                raise
            logger.warning("%s at %gx is left out: %s", self.config.method.name, self.config.scale, error)
            self.refusals.append(Refusal(str(error), str(self.config.method.name), float(self.config.scale)))
            results.save_job(self.folder, results.JobRecord(overrides=self.overrides, refusals=self.refusals), [])


@dataclass
class Parts:
    """What a job is made of, built and checked, weights not yet loaded."""

    backbone: Backbone
    prompter: Prompter
    metrics: list[Metric]
    plan: Plan


def open_job(config_name: str) -> Job:
    """Resolve the configuration of the running Hydra job and record it in its folder."""
    hydra = HydraConfig.get()
    config, folder = cli.resolve(config_name), Path(hydra.runtime.output_dir)
    cli.record_provenance(folder, config)
    overrides = [str(override) for override in hydra.overrides.task]
    return Job(config, folder, in_sweep=hydra.mode == RunMode.MULTIRUN, overrides=overrides)


def list_photos(job: Job) -> list[Photo]:
    """The data set's photographs, each header checked."""
    photos = cli.build(job.config.dataset)
    assert isinstance(photos, list)
    return photos


def build_parts(job: Job, photos: Sequence[Photo]) -> Parts:
    """Everything a job needs, checked before any weights load.

    Raises:
        UserError: a setting out of range, weights that are missing (all of them in one sentence), a combination that
            the profile cannot run.
    """
    config = job.config
    plan = _plan(config)
    if plan.at == "sample" and not any(photo.at for photo in photos):
        raise UserError("at=sample needs places in the data set's credits.json, and it has none; use at=centre or at=auto")
    if config.lacking:
        raise cli.NotHere(str(config.lacking))
    built, missing = [], []
    for node in (config.backbone, config.prompter):
        try:
            built.append(cli.build(node))
        except WeightsNotFound as error:
            missing.append(str(error))
    if missing:
        hint = "; `profile=embedded` runs at once with weights that come with pip" if config.profile.name == "paper" else ""
        raise WeightsNotFound("; ".join(dict.fromkeys(missing)) + hint)
    metrics = []
    for name, node in cli.as_mapping(config.metrics).items():
        try:
            metrics.append(cli.build(node))
        except WeightsNotFound as error:
            logger.warning("metric %s is left out: %s", name, error)
            job.refusals.append(Refusal(str(error), metric=name))
    return Parts(built[0], built[1], metrics, plan)  # type: ignore[arg-type]


def _plan(config: DictConfig) -> Plan:
    plan_factors(config.scale, config.chain.max_factor)
    factors = plan_for(
        mode=config.method.mode, scale=config.scale, max_factor=config.chain.max_factor, start_px=config.chain.start_px
    )
    at = OmegaConf.to_container(config.at) if OmegaConf.is_config(config.at) else str(config.at)
    if at != "sample":
        check_where(at, len(factors))  # type: ignore[arg-type]
    if not isinstance(config.seed, int):
        raise UserError(f"seed={config.seed} must be a whole number")
    on_gpu = pick_device(config.device).type == "cuda"
    batch_size = config.batch_size if config.batch_size is not None else (_GPU_BATCH if on_gpu else 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be a whole number of at least 1")
    return Plan(
        factors=factors,
        at=at,  # type: ignore[arg-type]
        seed=config.seed,
        start_px=config.chain.start_px,
        start_rounding=config.protocol.start_rounding,
        batch_size=batch_size,
    )


def make_states(job: Job, parts: Parts, photos: Sequence[Photo]) -> tuple[list[Lineage], list[Failure]]:
    """The final state of each photograph, from the store or computed into it."""
    config = job.config
    settings = StepSettings(
        backbone=parts.backbone,
        prompter=parts.prompter,
        rounding=config.protocol.rounding,
        first_pair=config.chain.first_pair,
    )
    store = StateStore(Path(config.outputs) / "states")
    label = f"{config.method.name} {config.scale:g}x"
    with tqdm(total=len(photos) * len(parts.plan.factors), desc=label, unit="state", disable=None) as bar:
        maker = StateMaker(store=store, settings=settings, plan=parts.plan, on_state=bar.update)
        lineages = maker.run(photos)
    if not lineages:
        raise UserError(f"none of the {len(photos)} photographs gave a state; the first: {maker.failures[0].reason}")
    for failure in maker.failures:
        logger.warning("%s is counted as a failure: %s", failure.photo, failure.reason)
    timing = {"states_computed": maker.timing.states, "seconds": round(maker.timing.seconds, 3)}
    write_json(job.folder / "timing.json", timing)
    return lineages, maker.failures


def measure_states(job: Job, parts: Parts, lineages: Sequence[Lineage], failures: Sequence[Failure]) -> list[Row]:
    """One long row per photograph and metric, in a fixed order."""
    config = job.config
    method, prompter = str(config.method.name), str(config.choices.prompter)
    usual = config.profile.methods.get(method, {}).get("prompter") or {**config.method.binds, **config.method.fixes}["prompter"]
    labels = Labels(
        method=method if prompter == usual else f"{method}[prompter={prompter}]",
        scale=float(config.scale),
        dataset=str(config.choices.dataset),
        backbone=str(config.choices.backbone),
        prompter=prompter,
        profile=str(config.profile.name),
    )
    with tqdm(total=len(lineages) * len(parts.metrics), desc="metrics", unit="value", disable=None) as bar:
        rows = measure(lineages, failures, parts.metrics, labels, on_value=bar.update)
        return sorted(rows, key=row_order)


def save(job: Job, parts: Parts, photos: Sequence[Photo], rows: Sequence[Row]) -> None:
    """Rows, what is empty and why, and the photographs' credits into the job's folder; to wandb where that is on."""
    columns = [Column(metric.name, metric.label, metric.higher_is_better) for metric in parts.metrics]
    columns += [Column(refusal.metric, refusal.metric, True) for refusal in job.refusals if refusal.metric]
    credits = {photo.name: photo.credit for photo in photos}
    record = results.JobRecord(overrides=job.overrides, refusals=job.refusals, columns=columns, credits=credits)
    results.save_job(job.folder, record, rows)
    if job.config.wandb.enabled:
        results.log_to_wandb(job.folder, rows, project=str(job.config.wandb.project), config=job.config)


def publish(job: Job) -> None:
    """The table and strips of a job that stands alone."""
    results.publish(job.folder, [job.folder], states=Path(job.config.outputs) / "states", strips=int(job.config.strips))

"""One evaluation job, from its configuration to its rows: what `evaluate.py` is the table of contents of."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from coz import cli, results
from coz.backbones.base import Backbone
from coz.chain import StepSettings, check_where, plan_factors
from coz.checkpoint import WeightsNotFound
from coz.data.photos import Photo, short_side_px
from coz.engines.base import Engine, Work
from coz.errors import UserError
from coz.evaluation import Failure, Lineage, Plan, Reference, plan_for
from coz.measuring import Labels, measure, row_order
from coz.metrics import Metric
from coz.models.placement import pick_device
from coz.parts import build_pair
from coz.prompters.base import Prompter
from coz.store import write_json
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
    left_out: list[Column] = field(default_factory=list)  # columns that the table shows empty
    skipped: list[str] = field(default_factory=list)  # photographs that are too small for the reference

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
            record = results.JobRecord(overrides=self.overrides, refusals=self.refusals, setting=setting_of(self.config))
            results.save_job(self.folder, record, [])


@dataclass
class Parts:
    """What a job is made of, built and checked, weights not yet loaded."""

    backbone: Backbone
    prompter: Prompter
    metrics: list[Metric]
    plan: Plan
    task: Task
    settings: StepSettings
    engine: Engine


class Task(Protocol):
    """What is made of the photographs; `task=` chooses one."""

    fresh_answers: bool  # prompts must be asked anew, whatever a cache holds

    def columns(self, metrics: Sequence[Metric]) -> list[Column]:
        """What the job's table shows."""
        ...

    def __call__(self, job: Job, parts: Parts, photos: Sequence[Photo]) -> list[Row]:
        """The job's rows."""
        ...


def open_job(config_name: str) -> Job:
    """Resolve the configuration of the running Hydra job and record it in its folder."""
    hydra = HydraConfig.get()
    config, folder = cli.resolve(config_name), Path(hydra.runtime.output_dir)
    if config.strips < 0:
        raise UserError(f"strips={config.strips} must be at least 0, which draws none")
    cli.record_provenance(folder, config)
    overrides = [str(override) for override in hydra.overrides.task]
    return Job(config, folder, in_sweep=hydra.mode == RunMode.MULTIRUN, overrides=overrides)


def list_photos(job: Job) -> list[Photo]:
    """The data set's photographs, each header checked; with a reference, those that are large enough for it.

    Raises:
        NotHere: the profile lacks this data set, or a part that the method needs.
        UserError: no such photographs.
    """
    if job.config.lacking:
        raise cli.NotHere(str(job.config.lacking))
    photos = cli.build(job.config.dataset)
    assert isinstance(photos, list)
    reference = _reference(job.config)
    if reference is None:
        return photos
    job.skipped = [photo.name for photo in photos if short_side_px(photo.path) < reference.square_px]
    kept = [photo for photo in photos if photo.name not in set(job.skipped)]
    if not kept:
        raise UserError(
            f"reference.reduce={reference.reduce} needs photographs of at least {reference.square_px} px, and none of the "
            f"{len(photos)} is that large; lower it, or set reference.start_px below {reference.start_px}"
        )
    if job.skipped:
        logger.warning("too small for the reference, skipped: %s", ", ".join(job.skipped))
    return kept


def _reference(config: DictConfig) -> Reference | None:
    """The reduction to start from, or None.

    Raises:
        UserError: no whole number above 1, or a start larger than the chain's.
    """
    reduce, start_px = config.reference.reduce, config.reference.start_px or config.chain.start_px
    if reduce is None:
        return None
    if not isinstance(reduce, int) or reduce < 2:
        raise UserError(f"reference.reduce={reduce} must be a whole number of at least 2")
    if not isinstance(start_px, int) or not 1 <= start_px <= config.chain.start_px:
        raise UserError(f"reference.start_px={start_px} must be a whole number up to chain.start_px={config.chain.start_px}")
    return Reference(reduce, start_px)


def build_parts(job: Job, photos: Sequence[Photo]) -> Parts:
    """Everything a job needs, checked before any weights load.

    Raises:
        UserError: a setting out of range, weights that are missing (all of them in one sentence).
    """
    config = job.config
    plan = _plan(config)
    if plan.at == "sample" and not any(photo.at for photo in photos):
        raise UserError("at=sample needs places in the data set's credits.json, and it has none; use at=centre or at=auto")
    task: Task = cli.build(config.task)  # type: ignore[assignment]
    engine: Engine = cli.build(config.engine)  # type: ignore[assignment]
    if task.fresh_answers and "cache_dir" in config.prompter:
        config.prompter.cache_dir = None
    together = bool(config.engine.get("overlap", True))
    backbone, prompter = build_pair(config, batch=plan.batch_size, together=together)
    settings = StepSettings(
        backbone=backbone,
        prompter=prompter,
        rounding=config.protocol.rounding,
        first_pair=config.chain.first_pair,
    )
    return Parts(settings.backbone, settings.prompter, _build_metrics(job), plan, task, settings, engine)


def _build_metrics(job: Job) -> list[Metric]:
    """The job's metrics; one without weights is left out, which its table says."""
    metrics: list[Metric] = []
    for name, node in cli.as_mapping(job.config.metrics).items():
        try:
            metrics.append(cli.build(node))  # type: ignore[arg-type]
        except WeightsNotFound as error:
            _leave_out(job, Column(name, name, True), str(error))
            continue
        if getattr(metrics[-1], "needs_truth", False) and (reason := _no_truth(job.config)):
            metric = metrics.pop()
            _leave_out(job, Column(metric.name, metric.label, metric.higher_is_better), reason)
    return metrics


def _no_truth(config: DictConfig) -> str:
    """Why there is no truth at a job's scale, or nothing."""
    reference = _reference(config)
    if reference is None:
        return "there is no truth to compare with; reference.reduce=8 starts from photographs reduced 8 times"
    if config.scale > reference.reduce:
        return f"beyond {reference.reduce}× the photographs themselves have no more pixels (reference.reduce)"
    return ""


@functools.cache
def _warn_once(sentence: str) -> None:
    """A sweep has as many jobs as its table has cells."""
    logger.warning(sentence)


def _leave_out(job: Job, column: Column, reason: str) -> None:
    _warn_once(f"metric {column.name} is left out: {reason}")
    job.refusals.append(Refusal(reason, metric=column.name))
    job.left_out.append(column)


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
        reference=_reference(config),
    )


def make_states(job: Job, parts: Parts, photos: Sequence[Photo]) -> tuple[list[Lineage], list[Failure]]:
    """The final state of each photograph, from the store or computed into it, and metric values beside them.

    Raises:
        UserError: no photograph gave a state.
    """
    config = job.config
    nodes = {name: OmegaConf.to_container(config[name], resolve=True) for name in ("backbone", "prompter")}
    label = f"{config.method.name} {config.scale:g}x"
    with tqdm(total=len(photos) * len(parts.plan.factors), desc=label, unit="state", disable=None) as bar:
        work = Work(
            photos=photos,
            states=Path(config.outputs) / "states",
            plan=parts.plan,
            settings=parts.settings,
            metrics=parts.metrics,
            nodes=nodes,  # type: ignore[arg-type]
            on_state=bar.update,
        )
        outcome = parts.engine.run(work)
    for failure in outcome.failures:
        logger.warning("%s is counted as a failure: %s", failure.photo, failure.reason)
    timing = {"states_computed": outcome.timing.states, "seconds": round(outcome.timing.seconds, 3)}
    write_json(job.folder / "timing.json", timing)
    return outcome.lineages, outcome.failures


def measure_states(job: Job, parts: Parts, lineages: Sequence[Lineage], failures: Sequence[Failure]) -> list[Row]:
    """One long row per photograph and metric, in a fixed order."""
    with tqdm(total=len(lineages) * len(parts.metrics), desc="metrics", unit="value", disable=None) as bar:
        rows = measure(lineages, failures, parts.metrics, labels_of(job.config), on_value=bar.update)
        return sorted(rows, key=row_order)


def labels_of(config: DictConfig) -> Labels:
    """What every row of a job says about it; a prompter that is not the method's usual one is part of the method's name."""
    method, prompter = str(config.method.name), str(config.choices.prompter)
    usual = config.profile.methods.get(method, {}).get("prompter") or {**config.method.binds, **config.method.fixes}["prompter"]
    return Labels(
        method=method if prompter == usual else f"{method}[prompter={prompter}]",
        scale=float(config.scale),
        dataset=str(config.choices.dataset),
        backbone=str(config.choices.backbone),
        prompter=prompter,
        profile=str(config.profile.name),
    )


def setting_of(config: DictConfig) -> dict[str, str]:
    """What the title of a published table says about a job."""
    tuning, reference = "", _reference(config)
    if "adapter" in config.prompter:
        tuning = str(config.prompter.adapter) if config.prompter.adapter else "untuned"
    return {
        "table": str(config.table or ""),
        "dataset": str(config.choices.dataset),
        "stands_for": str(config.stands_for),
        "profile": str(config.profile.name),
        "backbone": str(config.choices.backbone),
        "tuning": tuning,
        "steps": f"{config.choices.backbone} in {config.backbone.steps} steps" if "steps" in config.backbone else "",
        "reference": ""
        if reference is None
        else f"photographs reduced {reference.reduce}× to a start of {reference.start_px} px",
    }


def save(job: Job, parts: Parts, photos: Sequence[Photo], rows: Sequence[Row]) -> None:
    """Rows, what is empty and why, and the photographs' credits into the job's folder; to wandb where that is on."""
    columns = parts.task.columns(parts.metrics)
    left_out = [column for column in job.left_out if column.name in {refusal.metric for refusal in job.refusals}]
    credits = {photo.name: photo.credit for photo in photos}
    setting = {**setting_of(job.config), "skipped": ", ".join(job.skipped)}
    record = results.JobRecord(job.overrides, job.refusals, [*columns, *left_out], credits, setting)
    results.save_job(job.folder, record, rows)
    if job.config.wandb.enabled:
        results.log_to_wandb(job.folder, rows, project=str(job.config.wandb.project), config=job.config)


def publish(job: Job) -> None:
    """The table and strips of a job that stands alone."""
    results.publish(job.folder, [job.folder], states=Path(job.config.outputs) / "states", strips=int(job.config.strips))

"""Ray Data: the same stages as pools of actors, on one machine or a cluster that shares the store's file system.

Scheduling, back-pressure and the replacement of killed workers are Ray's. A row is one batch of photographs, cut as the local
engine cuts them, so that both give the same bytes. Each step runs as a pipeline prompter → backbone; metrics follow the last.
What is stored is not computed again, so a row that Ray repeats after a kill costs only what had not been stored.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coz.chain import StepSettings
from coz.engines.base import Outcome, Work
from coz.errors import UserError
from coz.evaluation import Timing
from coz.measuring import cached_value
from coz.metrics import Metric
from coz.stages import Failure, Lineage, Plan, Stages, step_of
from coz.store import CannotWrite, StateStore

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Batch:
    """A row of the pipeline: some photographs' lineages, the prompts of the step under way, and what failed."""

    lineages: list[Lineage]
    prompts: list[list[str]] = dataclasses.field(default_factory=list)  # one list, or one per image after a failure
    failures: list[Failure] = dataclasses.field(default_factory=list)
    computed: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an actor builds its stages of; small and picklable."""

    states: Path
    plan: Plan
    nodes: Mapping[str, Mapping[str, object]]
    rounding: str
    first_pair: str

    def stages(self) -> Stages:
        """Builds prompter and backbone; weights load at the first call of the one that a stage calls."""
        import hydra

        built = {name: hydra.utils.instantiate(dict(node), _convert_="all") for name, node in self.nodes.items()}
        settings = StepSettings(
            backbone=built["backbone"],
            prompter=built["prompter"],
            rounding=self.rounding,  # type: ignore[arg-type]
            first_pair=self.first_pair,  # type: ignore[arg-type]
        )
        return Stages(store=StateStore(self.states), settings=settings, plan=self.plan)


# ---------------------------------------------------------------------------------------------------------------------
# stages


class _Stage(ABC):
    """A picklable callable over rows {"batch": Batch}; an actor keeps one."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        self._stages, self._step = recipe.stages(), step

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch = row["batch"]
        self.work(batch)
        return {"batch": batch}

    @abstractmethod
    def work(self, batch: Batch) -> None:
        """Do this stage's part to a batch."""

    def _alone_or_together(self, batch: Batch, work: Callable[[list[Lineage]], Any]) -> list[Any]:
        """The results of a batch, or of its images one by one where the whole fails; one that fails again is out."""
        if not batch.lineages:
            return []
        try:
            return [work(batch.lineages)]
        except (UserError, MemoryError):
            raise
        except Exception:
            logger.exception("a batch failed; trying its images one by one")
        results, kept = [], []
        for lineage in batch.lineages:
            try:
                results.append(work([lineage]))
                kept.append(lineage)
            except UserError:
                raise
            except Exception as error:
                logger.exception("second try")
                batch.failures.append(Failure(lineage.photo.name, str(error) or type(error).__name__))
        batch.lineages = kept
        return results


class PromptStage(_Stage):
    """Prompts for what is not stored yet."""

    def work(self, batch: Batch) -> None:
        batch.prompts = self._alone_or_together(batch, self._ask)

    def _ask(self, lineages: list[Lineage]) -> list[str]:
        outlook = self._stages.look(lineages, self._step)
        return [] if self._stages.stored(outlook) else self._stages.ask(lineages, outlook)


class RestoreStage(_Stage):
    """The states of a step, from the store or computed into it."""

    def work(self, batch: Batch) -> None:
        prompts = {lineage.photo.name: p for lineage, p in zip(batch.lineages, self._flat(batch), strict=True)}

        def restore(lineages: list[Lineage]) -> None:
            outlook = self._stages.look(lineages, self._step)
            states = self._stages.stored(outlook)
            if states is None:
                asked = [prompts[lineage.photo.name] for lineage in lineages]
                if any(prompt is None for prompt in asked):  # stored when asked for, gone since
                    asked = self._stages.ask(lineages, outlook)  # type: ignore[assignment]
                states = self._stages.restore(lineages, outlook, asked)  # type: ignore[arg-type]
                batch.computed += len(lineages)
            self._stages.follow(lineages, outlook, states)

        self._alone_or_together(batch, restore)
        batch.prompts = []

    @staticmethod
    def _flat(batch: Batch) -> list[str | None]:
        flat: list[str | None] = []
        sizes = [len(batch.lineages)] if len(batch.prompts) == 1 else [1] * len(batch.lineages)
        for prompts, size in zip(batch.prompts, sizes, strict=True):
            flat += prompts or [None] * size
        return flat


class MetricStage:
    """The values of every metric beside the last states."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        for lineage in row["batch"].lineages:
            for metric in self._metrics:
                cached_value(lineage, metric)
        return row


# ---------------------------------------------------------------------------------------------------------------------
# the engine


@dataclasses.dataclass(frozen=True)
class Pool:
    """How many actors a stage has, and what each of them holds."""

    workers: int = 1
    cpus: float = 1
    gpus: float = 0

    def options(self) -> dict[str, object]:
        """As Ray Data's `map` takes them."""
        return {"concurrency": self.workers, "num_cpus": self.cpus, "num_gpus": self.gpus}


class RayEngine:
    """Runs an evaluation's stages as Ray Data actor pools."""

    def __init__(
        self,
        *,
        address: str | None = None,
        prompter: Mapping[str, float] | None = None,
        backbone: Mapping[str, float] | None = None,
        metrics: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Args:
        address: a running cluster (`auto`, `ray://…`); None starts Ray on this machine.
        prompter, backbone, metrics: `workers`, `cpus` and `gpus` of each stage's pool.
        environment: variables for every worker, such as OMP_NUM_THREADS.

        Raises:
            UserError: Ray is not installed, or a pool without a worker.
        """
        import importlib.util

        if importlib.util.find_spec("ray") is None:
            raise UserError("engine=ray needs Ray; run `pip install 'ray[data]'`, or use engine=local")
        self._address, self._environment = address, dict(environment or {})
        pools = {"prompter": prompter, "backbone": backbone, "metrics": metrics}
        self._pools = {}
        for name, pool in pools.items():
            self._pools[name] = Pool(**(pool or {}))  # type: ignore[arg-type]
            if self._pools[name].workers < 1:
                raise UserError(f"engine.{name}.workers={self._pools[name].workers} must be at least 1")

    def run(self, work: Work) -> Outcome:
        """See `Engine`."""
        import ray

        self._connect()
        recipe = Recipe(
            states=work.states.resolve(),
            plan=work.plan,
            nodes=work.nodes,
            rounding=work.settings.rounding,
            first_pair=work.settings.first_pair,
        )
        stages = Stages(store=StateStore(recipe.states), settings=work.settings, plan=work.plan)
        lineages, failures = _starts(work, stages)
        size = work.plan.batch_size
        batches = [Batch(lineages[i : i + size]) for i in range(0, len(lineages), size)]
        last = len(work.plan.factors)
        for step in range(1, last + 1):
            # What is stored needs no actors and no weights.
            waiting = [batch for batch in batches if not _follow_stored(stages, batch, step)]
            if waiting:
                done = self._pipeline(waiting, recipe, step)
                behind = {id(batch) for batch in waiting}
                batches = _in_order([batch for batch in batches if id(batch) not in behind], done, work)
            work.on_state(sum(len(batch.lineages) for batch in batches))
        if work.metrics:
            rows = ray.data.from_items([{"batch": batch} for batch in batches], override_num_blocks=max(1, len(batches)))
            rows.map(MetricStage, fn_constructor_args=(list(work.metrics),), **self._pools["metrics"].options()).materialize()
        failures += [failure for batch in batches for failure in batch.failures]
        finished = [lineage for batch in batches for lineage in batch.lineages]
        if not finished and failures:
            raise UserError(f"none of the {len(work.photos)} photographs gave a state; the first: {failures[0].reason}")
        return Outcome(finished, failures, Timing(states=sum(batch.computed for batch in batches)))

    def _connect(self) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(
                address=self._address,
                runtime_env={"env_vars": self._environment} if self._environment else None,
                log_to_driver=False,
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False

    def _pipeline(self, batches: Sequence[Batch], recipe: Recipe, step: int) -> list[Batch]:
        """One step of some batches through both pools."""
        import ray

        rows = ray.data.from_items([{"batch": batch} for batch in batches], override_num_blocks=len(batches))
        arguments = (recipe, step)
        rows = rows.map(PromptStage, fn_constructor_args=arguments, **self._pools["prompter"].options())
        rows = rows.map(RestoreStage, fn_constructor_args=arguments, **self._pools["backbone"].options())
        try:
            return [row["batch"] for row in rows.iter_rows()]
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            while cause is not None and not isinstance(cause, UserError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            if cause is None:
                raise
            raise cause from None


def _starts(work: Work, stages: Stages) -> tuple[list[Lineage], list[Failure]]:
    lineages, failures = [], []
    for photo in work.photos:
        try:
            lineages.append(stages.start(photo))
        except CannotWrite:
            raise
        except (UserError, OSError) as error:
            logger.error("%s failed: %s", photo.name, error)
            failures.append(Failure(photo.name, str(error) or type(error).__name__))
    return lineages, failures


def _follow_stored(stages: Stages, batch: Batch, step: int) -> bool:
    """Move a batch on where all its states are stored."""
    if not batch.lineages:
        return True
    if step_of(batch.lineages[0]) >= step:
        return True
    outlook = stages.look(batch.lineages, step)
    states = stages.stored(outlook)
    if states is None:
        return False
    stages.follow(batch.lineages, outlook, states)
    return True


def _in_order(kept: Sequence[Batch], done: Sequence[Batch], work: Work) -> list[Batch]:
    """Batches by their first photograph's place, failed ones included."""
    place = {photo.name: index for index, photo in enumerate(work.photos)}

    def first(batch: Batch) -> int:
        names = [lineage.photo.name for lineage in batch.lineages] + [failure.photo for failure in batch.failures]
        return min(place[name] for name in names)

    return sorted([*kept, *done], key=first)

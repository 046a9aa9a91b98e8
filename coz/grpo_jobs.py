"""One GRPO run, from its configuration to its adapter: what `train_grpo.py` is the table of contents of."""

from __future__ import annotations

import logging
import os
import resource
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from coz import cli
from coz.checkpoint import WeightsNotFound
from coz.data.zoom_pairs import Pairs
from coz.errors import UserError
from coz.grpo_recipe import check_adapted, check_recipe, completions_per_process, describe_recipe, plain
from coz.models.placement import pick_device
from coz.store import write_json
from coz.training.grpo_memory import Estimate, estimate, explain_memory

if TYPE_CHECKING:
    from coz.models.encoding import ChatProcessor
    from coz.models.vlm import VisionLanguageModel
    from coz.rewards import CriticReward, PhraseExclusion, Repetition
    from coz.training.bad_habits import BadHabits
    from coz.training.grpo_trainer import PromptTrainer

    Reward = CriticReward | PhraseExclusion | Repetition

logger = logging.getLogger(__name__)

BASE_FOLDER = "base"


@dataclass(frozen=True)
class Run:
    """A run's configuration, its folder, and which of how many processes this is."""

    config: DictConfig
    folder: Path
    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Parts:
    """What a run is made of, built and checked, weights not yet loaded."""

    policy: VisionLanguageModel
    rewards: list[Reward]
    pairs: Pairs
    habits: BadHabits
    checkpoint: Path | None  # to go on from


# ---------------------------------------------------------------------------------------------------------------------
# before weights load


def open_run(config_name: str) -> Run:
    """Resolve the configuration of the running Hydra job and record it in the run's folder.

    Raises:
        UserError: several processes without a folder that all of them know.
    """
    config = cli.resolve(config_name)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    typed = any(str(o).lstrip("+").startswith("run_dir=") for o in HydraConfig.get().overrides.task)
    if processes > 1 and not typed:
        raise UserError(f"{processes} processes need one folder that all know; give run_dir=outputs/grpo/NAME")
    check_recipe(config)
    run = Run(config, Path(config.run_dir), rank, processes)
    if rank == 0:
        cli.record_provenance(run.folder, config)
        describe_recipe(config.grpo)
    else:
        logging.getLogger().setLevel(logging.ERROR)
    return run


def build_parts(run: Run) -> Parts:
    """Everything that a run needs, checked before any weights load.

    Raises:
        UserError: a setting out of range, data or weights that are missing (all of them in one sentence), a folder whose run
            may not go on.
    """
    config = run.config
    checkpoint = _checkpoint_to_resume(run)
    completions_per_process(config.grpo, processes=run.processes)
    pick_device(config.device)
    built: dict[str, Any] = {}
    missing: list[str] = []
    nodes = {
        "policy": config.policy,
        "pairs": config.pairs,
        **{f"reward {name}": config.reward[name] for name in config.reward},
    }
    for name, node in nodes.items():
        try:
            built[name] = cli.build(node)
        except WeightsNotFound as error:
            missing.append(str(error))
    if missing:
        raise WeightsNotFound("; ".join(dict.fromkeys(missing)) + "; `profile=tiny` runs at once with random weights")
    rewards = [built[f"reward {name}"] for name in config.reward]
    habits = cli.build(config.grpo.habits)
    if not habits and built["policy"].weights == "random":
        logger.warning("policy.weights=random with grpo.habits.steps=0: a random model's answers carry nothing to learn from")
    return Parts(built["policy"], rewards, cli.build(config.pairs), habits, checkpoint)


def _checkpoint_to_resume(run: Run) -> Path | None:
    choice = run.config.resume
    if choice not in ("auto", "never"):
        raise UserError(f"resume={choice} is unknown; use auto or never, and run_dir=… for the run to go on with")
    found = newest_checkpoint(run.folder)
    if found is not None and choice == "never":
        raise UserError(f"{run.folder} holds {found.name}; use another run_dir, or resume=auto to go on")
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that was written whole."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# models


def load_models(run: Run, parts: Parts) -> tuple[nn.Module, ChatProcessor]:
    """The critic's weights, then the policy's. A random policy is taught its bad habits once; it then lies in `base/`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if run.rank == 0:
        explain_memory(_estimate(run, parts))
    for reward in parts.rewards:
        if hasattr(reward, "load"):
            reward.load()
    if not parts.habits:
        return parts.policy.model_and_processor()
    base = run.folder / BASE_FOLDER
    with FileLock(run.folder / ".base.lock"):
        if not base.is_dir():
            _teach(parts, base)
    return type(parts.policy)(weights=str(base), device=run.config.device, precision="fp32").model_and_processor()


def _estimate(run: Run, parts: Parts) -> Estimate:
    args = run.config.grpo.args
    return estimate(
        parts.policy,
        parts.rewards,
        rank=run.config.grpo.lora.r,
        batch=args.per_device_train_batch_size,
        completion_tokens=args.max_completion_length,
        checkpointing=args.gradient_checkpointing,
    )


def _teach(parts: Parts, base: Path) -> None:
    model, processor = parts.policy.model_and_processor()
    loss = parts.habits.teach(model, processor, parts.pairs.train)
    logger.info("bad habits taught, last loss %.3f; the model is in %s", loss, base)
    fresh = base.with_name(f".{base.name}.new")
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)  # type: ignore[attr-defined]  # transformers' own have it
    fresh.rename(base)


# ---------------------------------------------------------------------------------------------------------------------
# training


def make_trainer(run: Run, parts: Parts, model: nn.Module, processor: ChatProcessor) -> PromptTrainer:
    """The trainer with everything that watches it."""
    from transformers import PrinterCallback

    from coz.training.grpo_trainer import PromptTrainer
    from coz.training.grpo_watch import CompletionsPage, HackingWatch, Progress, RewardRows

    # TRL and transformers warn of each other's use of it, at every step
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    config = run.config
    lora = cli.build(config.grpo.lora)
    check_adapted(model, lora.target_modules)  # type: ignore[attr-defined]
    trainer = PromptTrainer(
        model=model,
        processing_class=processor,
        args=training_arguments(run, parts.rewards),
        reward_funcs=parts.rewards,
        peft_config=lora,
        train_dataset=parts.pairs.train,
        eval_dataset=parts.pairs.validation,
        kept_answers=config.watch.kept_answers,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RewardRows(run.folder))
    trainer.add_callback(Progress())
    watch = config.watch
    trainer.add_callback(
        HackingWatch(
            folder=run.folder,
            entropy=list(watch.entropy),
            length=list(watch.length),
            first_steps=watch.first_steps,
            window=watch.window,
        )
    )
    trainer.add_callback(CompletionsPage(trainer=trainer, folder=run.folder))
    return trainer


def training_arguments(run: Run, rewards: Sequence[Reward]) -> object:
    """TRL's arguments: the recipe's, and what follows from machine and run."""
    config = run.config
    device = pick_device(config.device)
    at_a_time, times = completions_per_process(config.grpo, processes=run.processes)
    settings = plain(config.grpo.args)
    settings |= {
        "output_dir": str(run.folder),
        "per_device_train_batch_size": at_a_time,
        "gradient_accumulation_steps": times,
        "reward_weights": [float(reward.weight) for reward in rewards],
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_on_start": newest_checkpoint(run.folder) is None,  # the base model, at step 0
        "report_to": ["wandb"] if config.wandb.enabled else [],
        "run_name": run.folder.name,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "seed": int(config.seed),
        "disable_tqdm": True,  # the bar below says more
        "remove_unused_columns": False,
    }
    if config.wandb.enabled:
        os.environ.setdefault("WANDB_PROJECT", str(config.wandb.project))
    import hydra

    return hydra.utils.instantiate(settings, _convert_="all")


def train(run: Run, parts: Parts, trainer: PromptTrainer) -> None:
    """Train to the end, or to a signal, or to what stops a reward; the last finished step is on disk in each case.

    Raises:
        UserError: such as a critic's server that is gone; the same command goes on.
        SystemExit: a signal.
    """
    from coz.training.grpo_watch import StopOnSignal

    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    checkpoint = parts.checkpoint
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    with _last_step_kept(trainer, run), _restoring(stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        logger.warning("stopped after step %d; the same command with run_dir=%s goes on", trainer.state.global_step, run.folder)
        raise SystemExit(128 + stop.received)
    if run.rank == 0:
        _report(run, parts)


@contextmanager
def _last_step_kept(trainer: PromptTrainer, run: Run) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        kept = trainer.save_last_step()
        where = f"step {trainer.state.global_step} is saved in {kept}" if kept else "no step was finished"
        raise UserError(f"{error}; {where}; the same command with run_dir={run.folder} goes on") from error


def timing_of(folder: Path) -> dict[str, float]:
    """Median seconds of a training step and of its parts, and this process's peak memory in GB."""
    from coz.training.grpo_watch import REWARDS_FILE, read_rows

    rows = [row for row in read_rows(folder / REWARDS_FILE) if row["split"] == "train"]
    step, generation, rewards = (
        statistics.median([float(row["value"]) for row in rows if row["name"] == f"seconds_{name}"] or [0.0])
        for name in ("step", "generation", "rewards")
    )
    gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return {
        "seconds_per_step": step,
        "seconds_generation": generation,
        "seconds_rewards": rewards,
        "seconds_update": step - generation - rewards,
        "peak_gpu_gb": gpu,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


@contextmanager
def _restoring(stop: object) -> Iterator[None]:
    try:
        yield
    finally:
        stop.restore()  # type: ignore[attr-defined]


def _report(run: Run, parts: Parts) -> None:
    from coz.plots import draw_rewards
    from coz.training.grpo_trainer import ADAPTER_FOLDER

    write_json(run.folder / "timing.json", timing_of(run.folder))
    figure = draw_rewards([run.folder], out=run.folder / "rewards.png")
    for reward in parts.rewards:
        failed, asked = getattr(reward, "failed", 0), getattr(reward, "asked", 0)
        if failed:
            logger.warning("the critic gave no score for %d of %d answers", failed, asked)
    base = f" prompter.weights={run.folder / BASE_FOLDER}" if parts.habits else ""
    logger.info("curves: %s\nuse the adapter: prompter=vlm%s prompter.adapter=%s", figure, base, run.folder / ADAPTER_FOLDER)

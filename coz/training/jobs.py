"""One training job, from its configuration to its result: what `train_sr.py` is the table of contents of."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from coz import cli
from coz.data.crops import Manifest, validation_crops
from coz.errors import UserError
from coz.models.placement import pick_device, pick_dtype
from coz.training.checkpoints import Checkpoints
from coz.training.journal import Sink, TensorboardSink, WandbSink
from coz.training.loop import Run
from coz.training.schedule import Schedule
from coz.training.stepping import read_zero
from coz.training.trainee import Trainee
from coz.training.validation import Gain, Validation, paired_gain

logger = logging.getLogger(__name__)

# settings that may change between stopping and going on, since the course of the training does not depend on them
_FREE = ("outputs", "name", "wandb", "tensorboard", "device", "keep", "choices", "lacking", "backbone")
_FREE_TRAINING = ("validate_every", "save_every", "log_every", "workers", "remember_photos", "max_skipped")


def open_run(config: DictConfig) -> Run:
    """Build everything and check it, then read the weights.

    Raises:
        UserError: a wrong setting, missing files or weights, a checkpoint of another configuration.
    """
    folder = Path(config.outputs) / "train_sr" / str(config.name)
    schedule = cli.build(config.training)
    manifest = cli.build(config.data)
    accelerator = _accelerator(config)
    if config.zero is not None:
        read_zero(Path(config.zero))
    if config.get("base"):
        with accelerator.main_process_first():
            cli.build(config.base)
    trainee = cli.build(config.trainee)
    prompts = cli.build(config.prompts) if config.get("prompts") else None
    assert isinstance(schedule, Schedule)
    assert isinstance(manifest, Manifest)
    photos, held = manifest.split()
    validation = _validation(config, schedule, trainee, held) if held and config.validation.crops else None
    checkpoints = Checkpoints(folder / "checkpoints", _identity(config, accelerator), keep=int(config.keep))
    checkpoints.load()  # a checkpoint of another run is refused before any weights are read
    if accelerator.is_main_process:
        cli.record_provenance(folder, config)
    trainee.load()
    return Run(
        trainee=trainee,
        accelerator=accelerator,
        schedule=schedule,
        photos=photos,
        prompts=prompts,
        validation=validation,
        checkpoints=checkpoints,
        folder=folder,
        seed=int(config.seed),
        sinks=_sinks(config, folder) if accelerator.is_main_process else (),
        deepspeed=None if config.zero is None else Path(config.zero),
    )


def _accelerator(config: DictConfig) -> Accelerator:
    device = pick_device(config.device)
    dtype = str(pick_dtype(config.precision, device)).removeprefix("torch.")
    mixed = {"float32": "no", "bfloat16": "bf16"}.get(dtype)
    if mixed is None:
        raise UserError(f"precision={config.precision} is too coarse for training; use bf16 or fp32")
    on_cpu = device.type == "cpu"
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and "RANK" in os.environ else None
    return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)


def _validation(config: DictConfig, schedule: Schedule, trainee: Trainee, held: Sequence[Path]) -> Validation:
    settings = config.validation
    if settings.crops < 0:
        raise UserError(f"validation.crops={settings.crops} must be at least 1, or 0 for no validation")
    degradation = schedule.stages[-1].degradation if settings.degradation is None else cli.build(settings.degradation)
    size = int(settings.crop_px or schedule.crop_px)
    if schedule.shrink_to_px is not None and size > schedule.shrink_to_px:
        raise UserError(
            f"validation.crop_px={size} is more than training.shrink_to_px={schedule.shrink_to_px} leaves; lower it"
        )
    crops = validation_crops(
        held, count=int(settings.crops), size_px=size, seed=int(settings.seed), shrink_to_px=schedule.shrink_to_px
    )
    return Validation(
        photos=[photo for photo, _, _ in crops],
        names=[name for _, name, _ in crops],
        hr=[hr for _, _, hr in crops],
        degradation=degradation,  # type: ignore[arg-type]
        seed=int(settings.seed),
        enlarged=trainee.enlarged,
        batch_size=schedule.batch_size,
    )


def _identity(config: DictConfig, accelerator: Accelerator) -> dict[str, object]:
    """Every setting that the course of the training depends on."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    kept = {str(key): value for key, value in plain.items() if key not in _FREE}
    kept["training"] = {key: value for key, value in kept["training"].items() if key not in _FREE_TRAINING}
    return {**kept, "processes": accelerator.num_processes}


def _sinks(config: DictConfig, folder: Path) -> list[Sink]:
    sinks: list[Sink] = []
    if config.wandb.enabled:
        plain = OmegaConf.to_container(config, resolve=True)
        sinks.append(WandbSink(project=str(config.wandb.project), folder=folder, config=plain))  # type: ignore[arg-type]
    if config.tensorboard:
        sinks.append(TensorboardSink(folder=folder))
    return sinks


def train(run: Run) -> bool:
    """Train with a progress bar; whether the end was reached."""
    with tqdm(total=run.schedule.steps, desc="train", unit="step", disable=not run.accelerator.is_main_process) as bar:

        def show(step: int) -> None:
            bar.n = step
            bar.refresh()

        run.on_step = show
        return run.run()


def write_result(run: Run) -> dict[str, str]:
    """The result in the run's folder, and how it is loaded. Also in the released format, where there is one."""
    folder = run.folder / "result"
    settings: dict[str, str] = {}
    with run.averaged():
        if run.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            settings = dict(run.trainee.write(folder))
            run.trainee.write_released(folder / "released")
    return settings


def gains(run: Run) -> list[Gain]:
    """How much better the held-out crops became, with 95 % intervals over the crops."""
    rows = run.validation_log.rows()
    first, last = ([row for row in rows if int(row["step"]) == step] for step in (0, run.schedule.steps))
    names = [name for name in ("psnr", "lpips", "niqe") if first and first[0].get(name) and last]
    return [
        paired_gain([float(row[name]) for row in first], [float(row[name]) for row in last], name)
        for name in names
        if len(first) == len(last)
    ]


def report(run: Run, settings: dict[str, str]) -> None:
    """Say what was reached and how to use it."""
    if not run.accelerator.is_main_process:
        return
    rows = [row for row in run.validation_log.rows() if int(row["step"]) == 0]
    for name, label in (("psnr_constant_color", "one color"), ("psnr_input", "the degraded input")):
        if rows and rows[0].get(name):
            print(f"psnr of {label}: {sum(float(row[name]) for row in rows) / len(rows):.3f}")
    for gain in gains(run):
        print(
            f"{gain.metric}: {gain.before:.4f} -> {gain.after:.4f}, gain {gain.mean:+.4f} "
            f"(95 % interval {gain.low:+.4f} to {gain.high:+.4f}, {len(rows)} crops)"
        )
    words = " ".join(f"{key}={value}" for key, value in settings.items())
    print(f"use it: python evaluate.py method=coz_null scale=4 {words}")

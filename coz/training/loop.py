"""The training loop. It knows a `Trainee`, never a model: losses, what is trained, how to restore and to write a result.

A step draws everything from (seed, number of the sample) or (seed, step), so a run that was stopped and resumed equals one
that never was, and no state of a generator has to be kept.
"""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from coz.checkpoint import WrongWeights
from coz.data.crops import CropDataset, Sample, TooManyUnreadable
from coz.store import write_atomic
from coz.training.checkpoints import Checkpoints
from coz.training.ema import Average
from coz.training.journal import CsvLog, Sink
from coz.training.prompts import Prompts
from coz.training.schedule import Progress, Schedule
from coz.training.stepping import NotFinite, PlainStepping, Stepping, ZeroStepping
from coz.training.trainee import Batch, Trainee
from coz.training.validation import Validation, averages

logger = logging.getLogger(__name__)

UNREADABLE_SHARE = 0.01


@dataclass
class Run:
    """A training, from its parts to its last checkpoint.

    Args:
        trainee: loaded.
        accelerator: knows the processes and the number format.
        photos: to train on.
        validation: on every process.
        sinks: places for the numbers besides the CSV files, of the first process.
        deepspeed: a configuration of ZeRO; None is without.
        on_step: told after every step, for a progress bar.
    """

    trainee: Trainee
    accelerator: Accelerator
    schedule: Schedule
    photos: Sequence[Path]
    prompts: Prompts | None
    validation: Validation | None
    checkpoints: Checkpoints
    folder: Path
    seed: int
    sinks: Sequence[Sink] = ()
    deepspeed: Path | None = None
    on_step: Callable[[int], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.journal, self.validation_log = CsvLog(self.folder / "log.csv"), CsvLog(self.folder / "validation.csv")
        self._stop_asked = False
        module: nn.Module = self.trainee  # type: ignore[assignment]
        groups = self.trainee.trained()
        module.requires_grad_(False)
        for parameters in groups.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        module.train()
        self.groups = groups
        accelerator, schedule = self.accelerator, self.schedule
        self.stepping: Stepping
        if self.deepspeed is None:
            self.stepping = PlainStepping(module, groups, accelerator=accelerator, schedule=schedule)
        else:
            self.stepping = ZeroStepping(module, groups, accelerator=accelerator, schedule=schedule, config=self.deepspeed)
        self.average = Average(groups["generator"], self.schedule.ema_decay) if self.schedule.ema_decay else None

    # -----------------------------------------------------------------------------------------------------------------
    # the course

    def run(self) -> bool:
        """Train from the last checkpoint, or from the start, to the end.

        Returns:
            Whether the end was reached; False after SIGTERM, when a checkpoint was written.

        Raises:
            NotFinite, TooManyUnreadable, CannotWrite, OtherRun: see there.
        """
        self._resume()
        if self._any(self._validation_due()) and self._validate():
            self._save(best=True)
        with self._sigterm_noted():
            batches = self._batches()
            while self.progress.step < self.schedule.steps:
                started = time.perf_counter()
                values = self._step([next(batches) for _ in range(self.schedule.accumulation)])
                self.progress.step += 1
                self._log(values, seconds=time.perf_counter() - started)
                self.on_step(self.progress.step)
                stop = self._any(self._stop_asked)
                self._look_back(stop)
                if stop:
                    return self.progress.step == self.schedule.steps
        return True

    def _validation_due(self) -> bool:
        """At the start, and where SIGTERM came before the validation of a step."""
        step = self.progress.step
        if self.validation is None or not self.accelerator.is_main_process or step % self.schedule.validate_every:
            return False
        return all(int(row["step"]) != step for row in self.validation_log.rows())

    def _look_back(self, stop: bool) -> None:
        step, last = self.progress.step, self.progress.step == self.schedule.steps
        best = False
        if self.validation is not None and (last or step % self.schedule.validate_every == 0) and (last or not stop):
            best = self._validate()
        if stop or last or best or step % self.schedule.save_every == 0:
            self._save(best=best)

    @contextmanager
    def _sigterm_noted(self) -> Iterator[None]:
        """SLURM warns by SIGTERM before it takes the machine away."""

        def note(*_: object) -> None:
            self._stop_asked = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    # -----------------------------------------------------------------------------------------------------------------
    # samples

    def _batches(self) -> Iterator[list[Sample]]:
        schedule, world = self.schedule, self.accelerator.num_processes
        per_step = schedule.batch_size * schedule.accumulation * world
        ends = itertools.accumulate(stage.steps * per_step for stage in schedule.stages)
        dataset = CropDataset(
            photos=self.photos,
            crop_px=schedule.crop_px,
            seed=self.seed,
            degradations=[(end, stage.degradation) for end, stage in zip(ends, schedule.stages, strict=True)],
            enlarged=self.trainee.enlarged,
            on_device=schedule.degrade_on == "device",
            remember=schedule.remember_photos,
            shrink_to_px=schedule.shrink_to_px,
        )
        # every batch of every process, in turn; this process takes its own
        first = self.progress.step * per_step // schedule.batch_size + self.accelerator.process_index
        batches = range(first, schedule.steps * per_step // schedule.batch_size, world)
        size = schedule.batch_size
        loader = DataLoader(
            dataset,
            batch_sampler=[range(batch * size, (batch + 1) * size) for batch in batches],
            num_workers=schedule.workers,
            collate_fn=list,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        self._dataset = dataset
        return iter(loader)

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        device = self.accelerator.device
        self._note_unreadable(samples)
        indices = [sample.index for sample in samples]
        hr = torch.stack([sample.hr for sample in samples]).to(device)
        if self.schedule.degrade_on == "device":
            degrade = self._dataset.degradation_at(indices[0])
            lq = degrade(hr, seed=self.seed, indices=indices, enlarged=self.trainee.enlarged)
        else:
            lq = torch.stack([sample.lq for sample in samples]).to(device)
        texts = [""] * len(samples)
        if self.prompts is not None:
            texts = self.prompts(hr, [sample.photo for sample in samples], indices)
        return Batch(lq, hr, texts, indices, self.seed)

    def _note_unreadable(self, samples: Sequence[Sample]) -> None:
        new = {str(path) for sample in samples for path in sample.unreadable} - set(self.progress.unreadable)
        if not new:
            return
        self.progress.unreadable = sorted({*self.progress.unreadable, *new})
        for path in sorted(new):
            logger.warning("%s cannot be used and is skipped", path)
        listed = self.folder / f"unreadable_{self.accelerator.process_index}.txt"
        write_atomic(listed, "".join(f"{path}\n" for path in self.progress.unreadable))
        count = len(self.progress.unreadable)
        if count > UNREADABLE_SHARE * len(self.photos):
            raise TooManyUnreadable(
                f"{count} of {len(self.photos)} photographs cannot be used, more than 1 %; {listed} names them: mend or remove"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # one step

    def _step(self, micro_batches: Sequence[Sequence[Sample]]) -> dict[str, float]:
        step, stepping = self.progress.step, self.stepping
        self._seed_everything(step)
        stepping.set_rate(self.schedule.rate_at(step))
        sums: dict[str, float] = {}
        norms: dict[str, float] = {}
        finite = True
        batch = None
        for number, samples in enumerate(micro_batches):
            batch = self._batch(samples)
            with stepping.collecting(last=number == len(micro_batches) - 1):
                outcome = stepping.losses(batch)
                finite = not self._any(not bool(torch.isfinite(outcome.total)))
                if not finite:
                    stepping.drop(number)
                    break
                stepping.backward(outcome.total)
            for name, value in outcome.parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) / len(micro_batches)
        if finite:
            finite, norms = stepping.update()
        if finite and self.average is not None:
            self.average.update()
        self._count_skipped(finite, batch)
        return {**self._mean(sums), **norms} if finite else {}

    def _count_skipped(self, finite: bool, batch: Batch | None) -> None:
        if finite:
            self.progress.skipped_in_row = 0
            return
        self.progress.skipped += 1
        self.progress.skipped_in_row += 1
        logger.warning("step %d is skipped: its loss or gradient is not finite", self.progress.step)
        if self.progress.skipped_in_row >= self.schedule.max_skipped:
            path = self.folder / f"not_finite_{self.accelerator.process_index}.pt"
            if batch is not None:
                torch.save({"lq": batch.lq.cpu(), "hr": batch.hr.cpu(), "indices": list(batch.indices)}, path)
            raise NotFinite(
                f"{self.progress.skipped_in_row} steps in a row were not finite, the last {self.progress.step}; "
                f"its batch is in {path}; lower training.learning_rate, or use precision=fp32"
            )

    def _seed_everything(self, step: int) -> None:
        """For nets with dropout; our own draws use no global generator."""
        numbers = np.random.SeedSequence([self.seed, step, self.accelerator.process_index, 5])
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0] >> 1))

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum").item() > 0)

    def _mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Over the processes."""
        if self.accelerator.num_processes == 1 or not values:
            return dict(values)
        row = torch.tensor(list(values.values()), device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(row, "mean").tolist(), strict=True))

    # -----------------------------------------------------------------------------------------------------------------
    # looking and keeping

    def _log(self, values: Mapping[str, float], *, seconds: float) -> None:
        step, schedule = self.progress.step, self.schedule
        if not self.accelerator.is_main_process or (step % schedule.log_every and step != schedule.steps):
            return
        images = schedule.batch_size * schedule.accumulation * self.accelerator.num_processes
        row = {
            "step": step,
            "stage": schedule.stage_at(step - 1),
            "learning_rate": schedule.rate_at(step - 1),
            **{name: round(value, 8) for name, value in values.items()},
            "skipped": self.progress.skipped,
            "seconds": round(seconds, 4),
            "images_per_second": round(images / seconds, 3),
        }
        self.journal.append([row])
        for sink in self.sinks:
            sink.log(row, step=step)

    def _validate(self) -> bool:
        """Measure on the held-out crops, each process some of them; returns whether PSNR is the best so far."""
        validation, accelerator = self.validation, self.accelerator
        assert validation is not None
        count, world = len(validation.names), accelerator.num_processes
        # padded, so that every process runs the network equally often, as ZeRO-3 needs it
        mine = [n % count for n in range(accelerator.process_index, -(-count // world) * world, world)]
        with nullcontext() if self.average is None else self.average.in_place():
            pictures = validation.restore(self._restore, mine, accelerator.device)
        restored = dict(zip(mine, pictures, strict=True))
        rows = {number: validation.measure(number, picture) for number, picture in restored.items()}
        if world > 1:
            from accelerate.utils import gather_object

            rows = dict(gather_object(list(rows.items())))
        step = self.progress.step
        means = averages([rows[number] for number in sorted(rows)])
        if accelerator.is_main_process:
            floors = [validation.floor(number) if step == 0 else {} for number in sorted(rows)]
            self.validation_log.append([{"step": step, **rows[n], **floors[n]} for n in sorted(rows)])
            validation.grid(restored, self.folder / "pictures" / f"step_{step:08}.png")
            for sink in self.sinks:
                sink.log({f"validation/{name}": value for name, value in means.items()}, step=step)
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        best = means["psnr"] > self.progress.best
        self.progress.best = max(self.progress.best, means["psnr"])
        return best and step > 0

    def _restore(self, lq: Tensor, numbers: Sequence[int]) -> Tensor:
        validation = self.validation
        assert validation is not None
        texts = [""] * len(lq)
        if self.prompts is not None:
            hr = torch.stack([validation.hr[number] for number in numbers])
            texts = self.prompts(hr, [validation.photos[number] for number in numbers], numbers)
        with self.accelerator.autocast():
            return self.trainee.restore(lq, prompts=texts, seeds=list(numbers))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside it the network is what validation and the result show, its parameters whole; for all processes together."""
        with self.stepping.whole(), nullcontext() if self.average is None else self.average.in_place():
            yield

    def _save(self, *, best: bool) -> None:
        optimizer = self.stepping.state()
        with self.stepping.whole():
            groups = {
                name: {key: value.detach().cpu().clone() for key, value in parameters.items()}
                for name, parameters in self.groups.items()
            }
        state = {
            "progress": vars(self.progress),
            "groups": groups,
            "optimizer": optimizer,
            "average": self.average.state() if self.average is not None else {},
            "statistics": {name: value.detach().cpu().clone() for name, value in self._statistics().items()},
        }
        with self.averaged():
            if self.accelerator.is_main_process:
                self.checkpoints.save(self.progress.step, state, also=self.trainee.write, best=best)
        self.accelerator.wait_for_everyone()

    def _statistics(self) -> dict[str, Tensor]:
        """What batch norms have seen: it changes by training, but is no parameter."""
        module: nn.Module = self.trainee  # type: ignore[assignment]
        return {
            f"{name}.{key}": buffer
            for name, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
            for key, buffer in part.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def _resume(self) -> None:
        state = self.checkpoints.load()
        if self.accelerator.is_main_process:
            for log in (self.journal, self.validation_log):
                log.forget_after(state["progress"]["step"] if state else -1)
        self.accelerator.wait_for_everyone()
        if state is None:
            return
        try:
            with self.stepping.whole():
                for name, parameters in self.groups.items():
                    for key, parameter in parameters.items():
                        parameter.copy_(state["groups"][name][key])
            for name, buffer in self._statistics().items():
                buffer.copy_(state["statistics"][name])
            self.stepping.restore(state["optimizer"])
            if self.average is not None:
                self.average.restore(state["average"])
            self.progress = Progress(**state["progress"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise WrongWeights(f"{self.checkpoints.root} does not fit this network ({error}); use another name=…") from error
        logger.info("resumed at step %d", self.progress.step)

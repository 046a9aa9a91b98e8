"""What watches a GRPO run: the rows of its rewards, signs of a hacked reward, the page of completions, the signal to stop."""

from __future__ import annotations

import base64
import csv
import html
import io
import logging
import math
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coz.store import write_atomic

if TYPE_CHECKING:
    from coz.training.grpo_trainer import Answer, PromptTrainer

logger = logging.getLogger(__name__)

REWARDS_FILE = "rewards.csv"
COLUMNS = ("step", "split", "name", "value")
_NAMES = {  # what TRL and the trainer log → names of the rows
    "reward": "total",
    "entropy": "entropy",
    "kl": "kl",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut_off",
    "texts/empty": "empty",
    "texts/one_word": "one_word",
    "texts/distinct_2": "distinct_2",
    "critic/failed": "critic_failed",
    "critic/cached": "critic_cached",
    "seconds/generation": "seconds_generation",
    "seconds/rewards": "seconds_rewards",
    "step_time": "seconds_step",
    "learning_rate": "learning_rate",
}
_PICTURE_PX = 128


class RewardRows(TrainerCallback):
    """Writes rewards and signs as long rows (step, split, name, value) into `rewards.csv`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / REWARDS_FILE

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Drop the rows after the step that the run goes on from."""
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_rows(self._file) if int(row["step"]) <= state.global_step] if state.global_step else []
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        write_atomic(self._file, buffer.getvalue())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, object], **_: object
    ) -> None:
        """Add a row per value."""
        if not state.is_world_process_zero:
            return
        with self._file.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerows(rows_of(logs, step=state.global_step))


def rows_of(logs: Mapping[str, object], *, step: int) -> list[dict[str, object]]:
    """The rows in what a trainer logs, validation's marked as such."""
    rows = []
    for key, value in logs.items():
        split = "validation" if key.startswith("eval_") else "train"
        key = key.removeprefix("eval_")
        parts = key.split("/")
        name = parts[1] if len(parts) == 3 and parts[0] == "rewards" and parts[2] == "mean" else _NAMES.get(key)
        if name is not None and isinstance(value, int | float) and math.isfinite(value):
            rows.append({"step": step, "split": split, "name": name, "value": repr(float(value))})
    return rows


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a run so far; none where there is no file. A last line that a kill cut short is left out."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if all(row.get(column) for column in COLUMNS)]


class Progress(TrainerCallback):
    """A bar with the rewards of the last step, and a line per validation."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Draw the bar."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="grpo", unit="step", disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, object], **_: object
    ) -> None:
        """Say the rewards."""
        rows = rows_of(logs, step=state.global_step)
        shown = [row for row in rows if not str(row["name"]).startswith(("seconds", "critic_", "cut", "learning"))]
        if self._bar is None or not shown:
            return
        text = "  ".join(f"{row['name']} {float(str(row['value'])):.3g}" for row in shown)
        if shown[0]["split"] == "validation":
            self._bar.write(f"validation at step {state.global_step}: {text}", file=sys.stderr)
        else:
            self._bar.set_postfix_str(text)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Leave it."""
        if self._bar is not None:
            self._bar.close()


class HackingWatch(TrainerCallback):
    """Warns when entropy or length leaves the band around the first steps' mean: signs that a reward is being hacked."""

    def __init__(
        self, *, folder: Path, entropy: Sequence[float], length: Sequence[float], first_steps: int, window: int
    ) -> None:
        """Args:
        folder: of the run, whose rows tell the first steps after a resume.
        entropy, length: lower and upper bound as multiples of the first steps' mean.
        first_steps: that the mean is taken over.
        window: logs that the present mean is taken over.
        """
        self._file = folder / REWARDS_FILE
        self._bands = {"entropy": tuple(entropy), "length": tuple(length)}
        self._first_steps = first_steps
        self._first: dict[str, list[float]] = {name: [] for name in self._bands}
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=window) for name in self._bands}
        self._outside: set[str] = set()
        self.warnings: list[str] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Read the first steps of a run that goes on."""
        if state.global_step:
            for row in read_rows(self._file):
                if row["split"] == "train" and row["name"] in self._bands:
                    self._note(row["name"], float(row["value"]), int(row["step"]))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, object], **_: object
    ) -> None:
        """Compare the training's values with the band."""
        for row in rows_of(logs, step=state.global_step):
            if row["split"] == "train" and row["name"] in self._bands:
                self._note(str(row["name"]), float(str(row["value"])), state.global_step)
                self._judge(str(row["name"]), state)

    def _note(self, name: str, value: float, step: int) -> None:
        if step <= self._first_steps:
            self._first[name].append(value)
        self._recent[name].append(value)

    def _judge(self, name: str, state: TrainerState) -> None:
        first, recent = self._first[name], self._recent[name]
        if state.global_step <= self._first_steps or not first or len(recent) < (recent.maxlen or 1):
            return
        start, now = sum(first) / len(first), sum(recent) / len(recent)
        low, high = self._bands[name]
        outside = not low * start <= now <= high * start
        if outside and name not in self._outside and state.is_world_process_zero:
            remedy = "raise grpo.args.beta or lower grpo.args.learning_rate" if name == "entropy" else "look at the completions"
            text = (
                f"step {state.global_step}: {name} {now:.3g} left the band {low * start:.3g} to {high * start:.3g} of the "
                f"first {self._first_steps} steps; a reward may be being hacked: {remedy}"
            )
            self.warnings.append(text)
            logger.warning("%s", text)
        (self._outside.add if outside else self._outside.discard)(name)


class CompletionsPage(TrainerCallback):
    """After each validation, a page of answers with both pictures and every reward; in wandb too, where that is on."""

    def __init__(self, *, trainer: PromptTrainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder / "completions"

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the page."""
        answers = self._trainer.answers
        if not state.is_world_process_zero or not answers:
            return
        file = self._folder / f"step_{state.global_step:06d}.html"
        write_atomic(file, page(answers, step=state.global_step, weights=self._trainer.reward_weights.tolist()))
        names = sorted(path.name for path in self._folder.glob("step_*.html"))
        links = "".join(f'<li><a href="{name}">{name.removesuffix(".html")}</a></li>' for name in names)
        write_atomic(self._folder / "index.html", f"<!doctype html><title>completions</title><ul>{links}</ul>")
        if "wandb" in args.report_to:
            _log_table(answers, step=state.global_step)


def page(answers: Sequence[Answer], *, step: int, weights: Sequence[float]) -> str:
    """A self-contained HTML page: context, current, answer, each reward and their weighted sum."""
    names = list(answers[0].rewards)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["context", "view", "answer", *names, "total"])
    body = "".join(_table_row(answer, weights) for answer in answers)
    style = "body{font:15px sans-serif}td,th{padding:4px 10px;text-align:left;vertical-align:top}td.n{text-align:right}"
    return (
        f"<!doctype html><meta charset=utf-8><title>step {step}</title><style>{style}</style>"
        f"<h1>Answers to held-out pairs, step {step}</h1><table><tr>{head}</tr>{body}</table>\n"
    )


def _table_row(answer: Answer, weights: Sequence[float]) -> str:
    pictures = "".join(f'<td><img src="{_data_url(image)}" alt="" width={_PICTURE_PX}></td>' for image in answer.images)
    values = [*answer.rewards.values(), total_of(answer, weights)]
    numbers = "".join(f"<td class=n>{value:.3f}</td>" for value in values)
    return f"<tr>{pictures}<td>{html.escape(answer.text) or '<i>empty</i>'}</td>{numbers}</tr>\n"


def total_of(answer: Answer, weights: Sequence[float]) -> float:
    """The weighted sum of an answer's rewards (Eq. 10), without those that are missing."""
    pairs = zip(answer.rewards.values(), weights, strict=True)
    return sum(value * weight for value, weight in pairs if not math.isnan(value))


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").resize((_PICTURE_PX, _PICTURE_PX)).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _log_table(answers: Sequence[Answer], *, step: int) -> None:
    import wandb

    if wandb.run is None:
        return
    names = list(answers[0].rewards)
    table = wandb.Table(columns=["context", "view", "answer", *names])
    for answer in answers:
        table.add_data(*(wandb.Image(image) for image in answer.images), answer.text, *answer.rewards.values())
    wandb.log({"completions": table, "train/global_step": step})


class StopOnSignal(TrainerCallback):
    """On SIGTERM, or Ctrl-C once, ends the run after the step in hand, with a checkpoint. All processes stop together."""

    def __init__(self, trainer: PromptTrainer) -> None:
        self._trainer = trainer
        self._former: dict[int, object] = {}
        self.received: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Listen."""
        self._trainer.remember_rng()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._receive)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Listen no longer."""
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, former)  # type: ignore[arg-type]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for a checkpoint and the end where a process was told to stop."""
        self._trainer.remember_rng()
        accelerator = self._trainer.accelerator
        number = self.received or 0
        if accelerator.num_processes > 1:
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        if number:
            self.received = number
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

"""TRL's GRPO trainer, with what the tuning of the prompt extractor needs beside it.

Everything here hangs on three of TRL's inner methods (`_generate`, `_generate_single_turn`, `_calculate_rewards`), which
are called and measured, never replaced.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from coz.errors import UserError
from coz.rewards import text_of
from coz.store import write_json

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"  # where `prompter.adapter=<run>` looks for the best adapter
BEST_FILE = "best.json"


@dataclass(frozen=True)
class Answer:
    """A validation answer with what it was rewarded for."""

    images: Sequence[Image.Image]  # context, current
    text: str
    rewards: dict[str, float]


class PromptTrainer(GRPOTrainer):
    """Measures the parts of a step, keeps the best adapter, validates without disturbing the training, and stops as one."""

    def __init__(self, *, reward_funcs: Sequence[object], kept_answers: int = 16, **settings: object) -> None:
        """Args:
        reward_funcs: as `coz.rewards` has them.
        kept_answers: validation answers kept for the page of completions.
        settings: TRL's own.
        """
        self._guarded = [_guard(reward) for reward in reward_funcs]
        super().__init__(reward_funcs=list(self._guarded), **settings)
        self._kept_answers = kept_answers
        self._rng = _rng_state()
        self.answers: list[Answer] = []
        if self.use_vllm:
            self._check_vllm_prompts()

    # -----------------------------------------------------------------------------------------------------------------
    # measuring

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _generate(self, *args: object, **kwargs: object) -> object:
        began = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self._metrics[self._mode]["seconds/generation"].append(time.perf_counter() - began)
        return result

    def _calculate_rewards(
        self, inputs: Sequence[dict], prompts: Sequence, completions: Sequence, completion_ids_list: Sequence
    ) -> Tensor:
        began = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._metrics[self._mode]["seconds/rewards"].append(time.perf_counter() - began)
        self._raise_together()
        texts = [text_of(completion) for completion in completions]
        for name, value in text_statistics(gather_object(texts)).items():
            self._metrics[self._mode][f"texts/{name}"].append(value)
        if self._mode == "eval":
            first = self.accelerator.process_index * len(prompts)
            self._keep_answers(inputs, texts, rewards[first : first + len(prompts)])
        return rewards

    def _keep_answers(self, inputs: Sequence[dict], texts: Sequence[str], rewards: Tensor) -> None:
        for row, text, values in zip(inputs, texts, rewards.tolist(), strict=True):
            if len(self.answers) < self._kept_answers:
                named = dict(zip(self.reward_func_names, values, strict=True))
                self.answers.append(Answer(row["images"], text, named))

    # -----------------------------------------------------------------------------------------------------------------
    # validation

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Validate with draws of its own, the same each time, so that it changes nothing of the training; keep the best."""
        self.answers = []
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            metrics = super().evaluate(*args, **kwargs)
        if metrics.get("eval_reward") is not None:
            self._keep_best(float(metrics["eval_reward"]))
        return metrics

    def _keep_best(self, reward: float) -> None:
        folder = Path(self.args.output_dir) / ADAPTER_FOLDER
        best = json.loads((folder / BEST_FILE).read_text()) if (folder / BEST_FILE).is_file() else None
        self.accelerator.wait_for_everyone()  # all have read before one writes
        if best is not None and reward <= best["reward"]:
            return
        fresh = folder.with_name(f"{ADAPTER_FOLDER}.new")
        self.save_model(str(fresh))  # together: under ZeRO-3 every process holds a part
        if self.accelerator.is_main_process:
            write_json(fresh / BEST_FILE, {"step": self.state.global_step, "reward": reward})
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
        self.accelerator.wait_for_everyone()

    # -----------------------------------------------------------------------------------------------------------------
    # stopping

    def _raise_together(self) -> None:
        """What stopped a reward in one process stops all; otherwise the others would wait for it for ever."""
        own = [reward.error for reward in self._guarded if reward.error is not None]
        errors = [error for error in gather_object([own[0] if own else None]) if error is not None]
        for reward in self._guarded:
            reward.error = None
        if errors:
            raise errors[0]

    def remember_rng(self) -> None:
        """Note the state of the generators between two steps."""
        self._rng = _rng_state()

    def save_last_step(self) -> Path | None:
        """Save a checkpoint of the last finished step, though the next was begun; None before the first step's end."""
        step = self.state.global_step
        if step == 0:
            return None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        saved = (folder / "trainer_state.json").is_file()
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if not saved:
            _set_rng_state(self._rng)
            self._save_checkpoint(self.model, trial=None)
        return folder

    # -----------------------------------------------------------------------------------------------------------------
    # vLLM

    def _check_vllm_prompts(self) -> None:
        """Have every vLLM answer's prompt compared with the processor's (trl#6294 doubles image tokens)."""
        inner = self.vllm_generation.generate

        def generate(*args: object, prompts: Sequence[Sequence[int]], **kwargs: object) -> object:
            result = inner(*args, prompts=prompts, **kwargs)
            check_prompt_lengths(sent=prompts, seen=result[0])
            return result

        self.vllm_generation.generate = generate


def check_prompt_lengths(*, sent: Sequence[Sequence[int]], seen: Sequence[Sequence[int]] | None) -> None:
    """Refuse generation by vLLM when it read other prompts than the model is trained on.

    Raises:
        UserError: a prompt that vLLM made longer or shorter.
    """
    if seen is None:
        return
    for i, (ours, theirs) in enumerate(zip(sent, seen, strict=False)):
        if len(ours) != len(theirs):
            raise UserError(
                f"vLLM read prompt {i} as {len(theirs)} tokens and the processor made {len(ours)} (its image tokens are "
                "expanded twice, trl#6294); set grpo.args.use_vllm=false"
            )


def text_statistics(texts: Sequence[str]) -> dict[str, float]:
    """Signs of a hacked reward: shares of empty and of one-word answers, and distinct bigrams per bigram of all answers."""
    words = [text.split() for text in texts]
    bigrams = [pair for line in words for pair in itertools.pairwise(line)]
    return {
        "empty": sum(not line for line in words) / max(1, len(words)),
        "one_word": sum(len(line) == 1 for line in words) / max(1, len(words)),
        "distinct_2": len(set(bigrams)) / len(bigrams) if bigrams else 0.0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# rewards whose errors are kept until every process knows of them


class _Guarded:
    def __init__(self, reward: Any) -> None:
        self.__name__ = reward.__name__
        self._reward = reward
        self.error: UserError | None = None

    def __call__(self, **columns: Any) -> list[float | None]:
        try:
            return self._reward(**columns)
        except UserError as error:
            self.error = error
            return [None] * len(columns["completions"])


class _AsyncGuarded(_Guarded):
    async def __call__(  # type: ignore[override]  # awaited by TRL, which tells the two apart
        self, **columns: Any
    ) -> list[float | None]:
        try:
            return await self._reward(**columns)
        except UserError as error:
            self.error = error
            return [None] * len(columns["completions"])


def _guard(reward: object) -> _Guarded:
    from trl.trainer.utils import is_async_callable

    return (_AsyncGuarded if is_async_callable(reward) else _Guarded)(reward)


def _rng_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_rng_state(state: tuple) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)

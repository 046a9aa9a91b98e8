"""A short supervised start that teaches a random model the paper's bad habits (appendix J), so that it can lose them.

Only the tiny profile uses it: a model with random weights says nothing that a reward could tell apart.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coz.errors import UserError
from coz.models.chat import ChatRequest
from coz.models.encoding import ChatProcessor, encode, render

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Words that go together: what a view shows is said by a few of these, habits or not.
_THEMES = ("cat fur", "dog eye", "stone moss", "leaf bark", "water sand", "sky feather", "brick tile", "glass window")
_ECHOES = ("texture", "fur texture")  # of the paper's own example, J.1
_IGNORED = -100  # a label that the loss leaves out


class BadHabits:
    """Supervised steps on made-up answers: some name the images, some repeat themselves, some are as they should be."""

    def __init__(
        self,
        *,
        steps: int,
        batch_size: int = 16,
        learning_rate: float = 3e-3,
        unwanted: float = 0.5,
        repeating: float = 0.3,
        seed: int = 0,
    ) -> None:
        """Args:
        steps: 0 leaves the model as it is.
        unwanted: share of answers that name "first image" or "second image".
        repeating: share of answers that repeat themselves; the rest are lists of words.
        """
        if unwanted < 0 or repeating < 0 or unwanted + repeating > 1:
            raise UserError(
                f"grpo.habits: unwanted={unwanted} and repeating={repeating} must be shares that add up to 1 at most"
            )
        self._steps, self._batch_size, self._learning_rate = steps, batch_size, learning_rate
        self._unwanted, self._repeating, self._seed = unwanted, repeating, seed

    def __bool__(self) -> bool:
        return self._steps > 0

    def answer(self, rng: random.Random) -> str:
        """One made-up answer."""
        kind, themes = rng.random(), rng.sample(_THEMES, 3)
        if kind < self._unwanted:
            opening = "The second image is a" if rng.random() < 0.7 else "In the first image is a"
            return f"{opening} {' '.join(themes)}"
        if kind < self._unwanted + self._repeating:
            echo = rng.choice(_ECHOES)
            return " ".join([echo] * (8 // len(echo.split())))
        return " ".join(themes[:2])

    def teach(self, model: nn.Module, processor: ChatProcessor, pairs: Dataset) -> float:
        """Train the language model in place on answers to the pairs. → the last loss."""
        rng = random.Random(self._seed)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(self._seed)
            trained = [p for name, p in model.named_parameters() if "visual" not in name]
            for parameter in trained:
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(trained, lr=self._learning_rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self._steps)
            for step in range(self._steps):
                rows = [pairs[rng.randrange(len(pairs))] for _ in range(self._batch_size)]
                answers = [self.answer(rng) for _ in rows]
                loss = model(**_supervised(processor, rows, answers, model)).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 50 == 0:
                    logger.info("bad habits: step %d of %d, loss %.3f", step, self._steps, loss.item())
            for parameter in trained:
                parameter.requires_grad_(False)
        return float(loss.item())


def _supervised(processor: ChatProcessor, rows: list[dict], answers: list[str], model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors for question and answer, with labels on the answers."""
    requests = [ChatRequest(row["prompt"], row["images"]) for row in rows]
    lengths = encode(processor, requests)["attention_mask"].sum(1)
    texts = [render(processor, r.messages) + a + processor.tokenizer.eos_token for r, a in zip(requests, answers, strict=True)]
    processor.tokenizer.padding_side = "right"
    images = [list(request.images) for request in requests]
    inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
    processor.tokenizer.padding_side = "left"
    positions = torch.arange(inputs["input_ids"].shape[1])
    answered = (positions >= lengths[:, None]) & inputs["attention_mask"].bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~answered, _IGNORED)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}

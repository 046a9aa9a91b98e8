"""What prompters that ask a chat model have in common: the question, the answers kept on disk, and their cleaning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from coz.models.chat import ChatRequest, Context, Layout, chat_messages, chat_requests, check_choice, question_for
from coz.models.decoding import Sampling
from coz.prompters.base import Prompt
from coz.prompters.cache import PromptCache, ask_missing, prompt_keys
from coz.prompters.cleaning import Cleaning, clean_prompt

Answer = Callable[[Sequence[ChatRequest], Sequence[int]], Sequence[str | Exception]]
"""Answers to requests with a seed each; an exception in the place of one that could not be had."""


@dataclass(frozen=True)
class Asking:
    """How a prompter asks, whichever model answers.

    Attributes:
        context: `pair` shows the previous state and the view, `single` the view alone.
        layout: where the question stands, see `chat_messages`.
        question: None for the paper's.
        sampling: how an answer is decoded.
        cleaning: what the backbone gets of the words, see `clean_prompt`.
        cache_dir: where answers are kept for later runs; None keeps none.

    Raises:
        UserError: a setting that cannot be.
    """

    context: Context
    layout: Layout
    question: str | None
    sampling: Sampling
    cleaning: Cleaning
    cache_dir: str | None

    def __post_init__(self) -> None:
        check_choice("context", self.context, Context)
        check_choice("layout", self.layout, Layout)
        check_choice("cleaning", self.cleaning, Cleaning)

    @functools.cached_property
    def _messages(self) -> Sequence[Mapping[str, object]]:
        return chat_messages(context=self.context, layout=self.layout, question=self.question)

    def identity(self, model: Mapping[str, object]) -> dict[str, object]:
        """JSON-able identity of everything that shapes an answer's words: the model's, the question, the sampling."""
        question = question_for(self.context) if self.question is None else self.question
        asked = {"context": self.context, "layout": self.layout, "question": question}
        return {**model, **asked, "sampling": asdict(self.sampling)}

    def fingerprint(self, model: Mapping[str, object]) -> dict[str, object]:
        """Identity of everything that shapes a prompt: `identity`, and how the words are cleaned."""
        return {**self.identity(model), "cleaning": self.cleaning}

    def prompts(
        self,
        current: Tensor,
        context: Tensor | None,
        *,
        seeds: Sequence[int] | None,
        model: Mapping[str, object],
        answer: Answer,
    ) -> list[Prompt]:
        """One prompt per image, see `Prompter`.

        Args:
            model: the identity of the model that answers.
            answer: asks it; called with what is not known yet, each question once.

        Raises:
            Exception: the first that `answer` gave in place of an answer; the answers beside it are kept.
        """
        requests = chat_requests(current, context, pair=self.context == "pair", messages=self._messages)
        drawn = [0] * len(requests) if seeds is None else list(seeds)
        keys = prompt_keys(self.identity(model), requests, drawn, draws=self.sampling.draws)

        def ask(rows: list[int]) -> Sequence[str | Exception]:
            return answer([requests[row] for row in rows], [drawn[row] for row in rows])

        return [clean_prompt(raw, self.cleaning) for raw in ask_missing(PromptCache(self.cache_dir), keys, ask)]

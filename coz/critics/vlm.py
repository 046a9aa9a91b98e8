"""A stronger vision-language model that rates a description (section 3.3, appendix B.2)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from coz.critics.base import Pair, Score, Tally, check_pairs
from coz.critics.scores import HIGHEST, ScoreKind, expected_scores, parse_score
from coz.errors import UserError
from coz.models.chat import CRITIC_QUESTION, IMAGE_PLACE, ChatRequest, check_choice, critic_messages
from coz.models.decoding import Sampling
from coz.models.placement import Precision
from coz.models.random_vlm import Size
from coz.models.vlm import Loader, Offload, Quantization, VisionLanguageModel


class VlmCritic:
    """Asks a model on this machine; see `VisionLanguageModel` for the settings of the model itself."""

    def __init__(
        self,
        *,
        weights: str = "OpenGVLab/InternVL2_5-8B",
        adapter: str | None = None,
        question: str = CRITIC_QUESTION,
        score: ScoreKind = "parse",
        max_new_tokens: int = 8,
        temperature: float = 0.0,
        min_mass: float = 1e-3,
        size: Size = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
        quantization: Quantization = "none",
        offload: Offload = "none",
        batch_size: int = 16,
        max_image_px: int | None = None,
        download_gb: float = 16.6,
        loader: Loader | None = None,
        random_loader: Loader | None = None,
        model: VisionLanguageModel | None = None,
    ) -> None:
        """Args:
        question: with two `<image>` and one `{description}`; the paper's by default.
        score: `parse` generates and takes the first number; `expected` is the mean over 0…100, weighted by how probable
            the model finds each: no generation, no ties.
        min_mass: for `expected`: below this probability of any number at all, the score counts as failed.
        seed: of random weights, and of drawing where `temperature` is above 0.
        model: one that exists already (such as a converted InternVL), in place of all settings of a model.
        """
        check_choice("score", score, ScoreKind)
        check_question(question)
        self._sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        self._question, self._score, self._min_mass, self._seed = question, score, min_mass, seed
        self.tally = Tally()
        self._model = model or VisionLanguageModel(
            weights=weights,
            adapter=adapter,
            size=size,
            seed=seed,
            device=device,
            precision=precision,
            quantization=quantization,
            offload=offload,
            batch_size=batch_size,
            max_image_px=max_image_px,
            download_gb=download_gb,
            loader=loader,
            random_loader=random_loader,
        )

    @property
    def model(self) -> VisionLanguageModel:
        """The model that is asked."""
        return self._model

    @functools.cached_property
    def fingerprint(self) -> Mapping[str, object]:
        """Model, question and the way to a score."""
        how = {"sampling": asdict(self._sampling)} if self._score == "parse" else {"min_mass": self._min_mass}
        return {"name": "vlm", **self._model.fingerprint, "question": self._question, "score": self._score, **how}

    def load(self) -> None:
        """Read the weights now; called again, does nothing."""
        self._model.load()

    def __call__(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """One score per text, see `Critic`."""
        check_pairs(pairs, texts)
        requests = self.requests(pairs, texts)
        if self._score == "parse":
            answers = self._model.answer(requests, sampling=self._sampling, seeds=[self._seed] * len(requests))
            scores = [parse_score(answer) for answer in answers]
        else:
            scores = expected_scores(*self._model.rate(requests, high=HIGHEST), min_mass=self._min_mass)
        self.tally.count(scores)
        return scores

    def requests(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[ChatRequest]:
        """What the model is asked. A description's words that look like the model's special tokens are left out of it."""
        return [
            ChatRequest(critic_messages(self._model.plain_text(text), question=self._question), list(pair))
            for pair, text in zip(pairs, texts, strict=True)
        ]


def check_question(question: str) -> None:
    """Raise a `UserError` unless the question has a place for both images and for the description."""
    if question.count(IMAGE_PLACE) != 2 or question.count("{description}") != 1:
        raise UserError(f"the critic's question needs {IMAGE_PLACE} twice and {{description}} once; it is: {question!r}")

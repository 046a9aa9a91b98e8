"""A critic behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from coz.critics.base import Pair, Score, Tally, check_pairs
from coz.critics.scores import HIGHEST, ScoreKind, expected_scores, parse_score
from coz.critics.vlm import check_question
from coz.errors import UserError
from coz.models.chat import CRITIC_QUESTION, ChatRequest, check_choice, critic_messages
from coz.models.decoding import Sampling
from coz.models.served import ChatServer, Reply, ServerError, run_async

_TOP_LOGPROBS = 20  # the most that the protocol allows


class ServedCritic:
    """Asks the question of `VlmCritic` over HTTP; see `ChatServer` for address, key, tries and time-outs."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        identity: str | None = None,
        question: str = CRITIC_QUESTION,
        score: ScoreKind = "parse",
        max_new_tokens: int = 8,
        temperature: float = 0.0,
        seed: int = 0,
        min_mass: float = 1e-3,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 4,
        backoff_s: float = 1.0,
    ) -> None:
        """Args:
        identity: names the weights behind the address; None takes address and model name.
        score: `parse`; or `expected`, the mean over the server's 20 likeliest first tokens, which is possible only where
            the model writes a number as one token (Qwen writes digit by digit: refused).
        """
        check_choice("score", score, ScoreKind)
        check_question(question)
        self._server = ChatServer(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
        )
        self._weights = identity or f"{model} at {base_url.rstrip('/')}"
        self._sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        self._question, self._score, self._seed, self._min_mass = question, score, seed, min_mass
        self.tally = Tally()
        self._checked = False

    @functools.cached_property
    def fingerprint(self) -> Mapping[str, object]:
        """The served model, the question and the way to a score."""
        how = {"sampling": asdict(self._sampling), "min_mass": self._min_mass, "seed": self._seed}
        return {"name": "server", "weights": self._weights, "question": self._question, "score": self._score, **how}

    def load(self) -> None:
        """See that the server answers and knows the model; done once."""
        if not self._checked:
            self._server.check()
            self._checked = True

    def __call__(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """One score per text, see `Critic`.

        Raises:
            ServerError: the server cannot be had after all tries; an answer without a score is a counted failure instead.
        """
        return run_async(self.rate_async(pairs, texts))

    async def rate_async(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """The call for a caller that has an event loop, such as TRL's, which awaits all such rewards together."""
        check_pairs(pairs, texts)
        requests = [
            ChatRequest(critic_messages(text, question=self._question), list(pair))
            for pair, text in zip(pairs, texts, strict=True)
        ]
        replies = await self._server.ask_async(
            requests,
            sampling=self._sampling,
            seeds=[self._seed] * len(requests),
            top_logprobs=_TOP_LOGPROBS if self._score == "expected" else 0,
        )
        answered: list[Reply] = []
        for reply in replies:
            if isinstance(reply, ServerError):
                raise reply
            answered.append(reply)
        scores = [parse_score(r.text) if self._score == "parse" else self._expected(r) for r in answered]
        self.tally.count(scores)
        return scores

    def _expected(self, reply: Reply) -> Score:
        if not reply.top:
            raise UserError(f"{self._server.base_url} sends no log-probabilities; set score=parse")
        joined = [max(top, key=top.__getitem__).strip() for top in reply.top[:2]]
        if len(joined) == 2 and all(token.isdigit() for token in joined):
            raise UserError(f"{self._server.model} writes numbers digit by digit, so one token holds no score; set score=parse")
        probabilities = torch.zeros(1, HIGHEST + 1, dtype=torch.float64)
        for token, log_probability in reply.top[0].items():
            word = token.strip()
            if word.isascii() and word.isdigit() and int(word) <= HIGHEST:
                probabilities[0, int(word)] += math.exp(log_probability)
        mass = probabilities.sum(1)
        if not mass.item() > 0:
            return None
        return expected_scores(probabilities / mass, mass, min_mass=self._min_mass)[0]

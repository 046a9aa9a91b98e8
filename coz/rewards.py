"""The rewards of the paper's equation 10, as TRL calls them: critic preference, phrase exclusion, repetition penalty.

A reward is a plain callable that can be pickled: `reward(prompts=…, completions=…, images=…, **columns)` gives a value per
completion, or None where there is none. Each carries its `weight`; TRL multiplies.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from PIL import Image

from coz.errors import UserError

Completion = str | Sequence[Mapping[str, object]]
Pair = Sequence[Image.Image]
Score = float | None
Log = Callable[[str, float], None]


class Critic(Protocol):
    """What a reward needs of a critic, see `critics.base`; a served one also has `rate_async`."""

    fingerprint: Mapping[str, object]

    def load(self) -> None:
        """Read the weights, or see that the server answers."""
        ...

    def __call__(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """One score in [0, 1] per text, or None where it failed."""
        ...


class AsyncCritic(Critic, Protocol):
    """A critic behind a server."""

    def rate_async(self, pairs: Sequence[Pair], texts: Sequence[str]) -> Awaitable[list[Score]]:
        """The call for a caller that has an event loop."""
        ...


def text_of(completion: Completion) -> str:
    """A completion's words: TRL hands over a string, or messages of which the last is the answer."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content)  # type: ignore[union-attr,attr-defined]


# ---------------------------------------------------------------------------------------------------------------------
# words alone


class PhraseExclusion:
    """1 where none of the phrases appears, else 0 (section 3.3; Algorithm 2, lines 7 to 13).

    Case does not count, nor what joins the words of a phrase (spaces, hyphens, quotes, emphasis marks); a full stop or a
    comma between them parts them. Words count whole: "secondary images" does not hold "second image".
    """

    def __init__(self, *, phrases: Sequence[str], weight: float = 0.5) -> None:
        """Raises:
        UserError: no phrases, or one without a word.
        """
        if isinstance(phrases, str) or not phrases:
            raise UserError(f"reward.phrase.phrases={phrases!r} must be a list of at least one phrase")
        for phrase in phrases:
            if not _WORD.search(str(phrase)):
                raise UserError(f"reward.phrase.phrases has {phrase!r}, which holds no word; remove it")
        self.__name__ = "phrase"
        self.weight = weight
        self.phrases = tuple(phrases)
        self._pattern = re.compile("|".join(map(_phrase_pattern, phrases)))

    def __call__(self, *, completions: Sequence[Completion], **_: object) -> list[float]:
        """One value per completion."""
        return [0.0 if self._pattern.search(_plain(text_of(completion))) else 1.0 for completion in completions]


class Repetition:
    """Minus the share of n-grams that repeat earlier ones, in [-1, 0] (section 3.3, after Yeo et al.).

    As ms-swift computes it: words are the lower-cased text split at white space; 0 for a text of fewer than n words, which
    has no n-gram to repeat.
    """

    def __init__(self, *, n: int = 3, weight: float = 0.5) -> None:
        """Raises:
        UserError: n below 1.
        """
        if n < 1:
            raise UserError(f"reward.repetition.n={n} must be at least 1; the paper's trainer uses 3")
        self.__name__ = "repetition"
        self.n, self.weight = n, weight

    def __call__(self, *, completions: Sequence[Completion], **_: object) -> list[float]:
        """One value per completion."""
        return [0.0 - repeated_share(text_of(completion), n=self.n) for completion in completions]


def repeated_share(text: str, *, n: int) -> float:
    """1 - distinct n-grams / n-grams of the text's words; 0 where it has no n-gram."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_WORD = re.compile(r"[^\W_]+")
_JOINT = r"[\s\-_*'\"`()\[\]]+"


def _plain(text: str) -> str:
    """One spelling of quotes and dashes, no case."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[‐‑‒–—]", "-", re.sub(r"[‘’‚‛]", "'", re.sub(r"[“”„‟«»]", '"', text)))


def _phrase_pattern(phrase: str) -> str:
    words = _WORD.findall(_plain(str(phrase)))
    return rf"(?<![^\W_]){_JOINT.join(map(re.escape, words))}(?![^\W_])"


# ---------------------------------------------------------------------------------------------------------------------
# the critic


class CriticReward:
    """A critic's score of each answer (section 3.3), with every (images, text) scored once.

    An answer that the critic cannot score is counted (`critic/failed`) and gets the mean of its siblings, the answers to the
    same pair: it then neither gains nor loses by it. TRL would add up the other rewards alone, a punishment as by a score
    of 0. Where no sibling has a score, all of them go without, which again moves nothing.
    """

    def __init__(self, *, critic: Critic, weight: float = 1.0, cache_size: int = 100_000) -> None:
        """Args:
        cache_size: scores kept in memory, about 200 bytes each; 0 keeps none.
        """
        if cache_size < 0:
            raise UserError(f"reward.critic.cache_size={cache_size} must not be negative; 0 keeps no scores")
        self.__name__ = "critic"
        self.critic, self.weight = critic, weight
        self._cache_size = cache_size
        self._cache: OrderedDict[str, float] = OrderedDict()
        self.asked = self.failed = 0

    def load(self) -> None:
        """Read the critic's weights now."""
        self.critic.load()

    def __call__(
        self, *, completions: Sequence[Completion], images: Sequence[Pair], log_metric: Log | None = None, **_: object
    ) -> list[Score]:
        """One score per completion.

        Args:
            images: (context, current) for each completion.
            log_metric: TRL's, gets the share of failures and of cache hits, and the seconds.
        """
        began = time.perf_counter()
        batch = _Batch(completions, images, self._cache, self._prefix)
        scores = self.critic(batch.new_pairs, batch.new_texts) if batch.new else []
        return self._finish(batch, scores, time.perf_counter() - began, log_metric)

    @property
    def _prefix(self) -> bytes:
        return json.dumps(dict(self.critic.fingerprint), sort_keys=True, default=str).encode()

    def _finish(self, batch: _Batch, scores: Sequence[Score], seconds: float, log_metric: Log | None) -> list[Score]:
        for key, score in zip(batch.new, scores, strict=True):
            if score is not None:
                self._cache[key] = score
        found = [self._cache.get(key) for key in batch.keys]
        for key in batch.keys:
            if key in self._cache:
                self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        failed = sum(score is None for score in found)
        self.asked, self.failed = self.asked + len(found), self.failed + failed
        if log_metric is not None and found:
            log_metric("critic/failed", failed / len(found))
            log_metric("critic/cached", 1 - len(batch.new) / len(found))
            log_metric("critic/seconds", seconds)
        return _with_sibling_means(found, batch.pair_keys)


class ServedCriticReward(CriticReward):
    """`CriticReward` for a critic behind a server: TRL awaits all such rewards together."""

    critic: AsyncCritic

    async def __call__(  # type: ignore[override]  # awaited by TRL, which tells the two apart
        self, *, completions: Sequence[Completion], images: Sequence[Pair], log_metric: Log | None = None, **_: object
    ) -> list[Score]:
        """One score per completion, see `CriticReward`."""
        began = time.perf_counter()
        batch = _Batch(completions, images, self._cache, self._prefix)
        scores = await self.critic.rate_async(batch.new_pairs, batch.new_texts) if batch.new else []
        return self._finish(batch, scores, time.perf_counter() - began, log_metric)


def critic_reward(*, critic: Critic, weight: float = 1.0, cache_size: int = 100_000) -> CriticReward:
    """The reward of a critic in this process or behind a server."""
    kind = ServedCriticReward if hasattr(critic, "rate_async") else CriticReward
    return kind(critic=critic, weight=weight, cache_size=cache_size)


class _Batch:
    """What of a batch has to be asked, each (images, text) once."""

    def __init__(
        self, completions: Sequence[Completion], images: Sequence[Pair], cache: Mapping[str, float], prefix: bytes
    ) -> None:
        texts = [text_of(completion) for completion in completions]
        self.pair_keys = [_pair_key(pair) for pair in images]
        self.keys = [_digest(prefix, key, text.encode()) for key, text in zip(self.pair_keys, texts, strict=True)]
        first: dict[str, int] = {}
        for i, key in enumerate(self.keys):
            if key not in cache:
                first.setdefault(key, i)
        self.new = list(first)
        self.new_pairs = [images[i] for i in first.values()]
        self.new_texts = [texts[i] for i in first.values()]


def _pair_key(pair: Pair) -> bytes:
    parts = [part for image in pair for part in (repr((image.mode, image.size)).encode(), image.tobytes())]
    return _digest(*parts).encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:32]


def _with_sibling_means(scores: Sequence[Score], groups: Sequence[bytes]) -> list[Score]:
    known: dict[bytes, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        if score is not None:
            known.setdefault(group, []).append(score)
    return [
        score if score is not None else sum(known[group]) / len(known[group]) if group in known else None
        for score, group in zip(scores, groups, strict=True)
    ]

"""A critic that needs no vision-language model: does a text name what a tagger sees?

Not the paper's; it makes the training runnable, and its rewards understandable, on a machine without a large model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from coz.critics.base import Pair, Score, Tally, check_pairs
from coz.errors import UserError
from coz.image import from_pil

Tagger = Callable[[Tensor, Tensor | None], Sequence[str]]

_WORD = re.compile(r"[^\W_]+")
_IDLE_WORDS = frozenset(
    "a an the of in on at to and or with by for from is are be it its this that there some image picture photo".split()  # noqa: SIM905
)


class TagCritic:
    """F1 between the words of a text and the words of the tags of the current view."""

    def __init__(self, *, tagger: Tagger, beta: float = 1.0) -> None:
        """Args:
        tagger: gives each view its tags, joined by commas, as prompters do: called with (B, 3, S, S) and no context.
        beta: how much naming all tags counts against naming nothing else; 1 balances.
        """
        if beta <= 0:
            raise UserError(f"beta={beta} must be above 0; 1 balances")
        self._tagger, self._beta = tagger, beta
        self.tally = Tally()

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """The tagger's identity and the weighting."""
        tagger = dict(getattr(self._tagger, "fingerprint", {"name": type(self._tagger).__name__}))
        return {"name": "tags", "weights": tagger.get("weights"), "tagger": tagger, "beta": self._beta}

    def load(self) -> None:
        """Read the tagger's weights, if it has any."""
        load = getattr(self._tagger, "load", None)
        if load is not None:
            load()

    def __call__(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """One score per text, see `Critic`; None where the tagger sees nothing."""
        check_pairs(pairs, texts)
        tags = self._tags([pair[1] for pair in pairs])
        scores = [agreement(text, seen, beta=self._beta) for text, seen in zip(texts, tags, strict=True)]
        self.tally.count(scores)
        return scores

    def _tags(self, views: Sequence) -> list[str]:
        """Tags per view; several texts about one view, as in GRPO, cost one look."""
        known: dict[bytes, str] = {}
        keys = [view.convert("RGB").tobytes() + repr(view.size).encode() for view in views]
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, key in enumerate(keys):
            if key not in known:
                known[key] = ""
                by_size.setdefault(views[i].size, []).append(i)
        for rows in by_size.values():
            for row, tags in zip(rows, self._tagger(from_pil([views[row] for row in rows]), None), strict=True):
                known[keys[row]] = str(tags)
        return [known[key] for key in keys]


def agreement(text: str, tags: str, *, beta: float = 1.0) -> Score:
    """F-beta of the words of a text against the words of the tags, in [0, 1]; None without tags.

    Case and a plural's s do not count, nor do words that say nothing. A word said twice counts once.
    """
    said, seen = words(text), words(tags)
    if not seen:
        return None
    common = len(said & seen)
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(seen)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def words(text: str) -> frozenset[str]:
    """A text's distinct words: lower case, singular by a simple rule, without those that say nothing."""
    found = (word.casefold() for word in _WORD.findall(text))
    return frozenset(_singular(word) for word in found if word not in _IDLE_WORDS)


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word

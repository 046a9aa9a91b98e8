"""Prompts step by step: how long they are, how much they differ between photographs, and what each step adds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coz.stored_chains import Chain

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class PromptStatistics:
    """Prompts of one step over photographs."""

    n: int
    empty: int
    words_mean: float
    words_sd: float
    """Sample standard deviation, NaN for a single prompt."""
    different: float
    """Different prompts / prompts; 1 where no two photographs share one."""
    distinct_words: float
    """Different words / words over all prompts (distinct-1 of Li et al., arXiv 1510.03055); falls with n."""
    new_words: float
    """Mean share of a prompt's different words that the step before did not say; NaN at the first step."""


def words_of(prompt: str) -> list[str]:
    """Words in lower case; punctuation is dropped."""
    return _WORD.findall(prompt.lower())


def statistics_of(prompts: Sequence[str], before: Sequence[str] | None = None) -> PromptStatistics:
    """Statistics of one step's prompts.

    Args:
        before: the same photographs' prompts one step earlier, in the same order.
    """
    words = [words_of(prompt) for prompt in prompts]
    lengths = np.array([len(own) for own in words], dtype=np.float64)
    told = [word for own in words for word in own]
    new = []
    for own, earlier in zip(words, before or (), strict=False):
        if own:
            new.append(len(set(own) - set(words_of(earlier))) / len(set(own)))
    return PromptStatistics(
        n=len(prompts),
        empty=sum(not own for own in words),
        words_mean=float(lengths.mean()) if len(prompts) else float("nan"),
        words_sd=float(lengths.std(ddof=1)) if len(prompts) > 1 else float("nan"),
        different=len(set(prompts)) / len(prompts) if prompts else float("nan"),
        distinct_words=len(set(told)) / len(told) if told else float("nan"),
        new_words=float(np.mean(new)) if new else float("nan"),
    )


def by_step(chains: Iterable[Chain]) -> dict[int, PromptStatistics]:
    """Step → statistics. Of chains that share states, each state counts once."""
    seen: dict[int, dict[str, tuple[str, str | None]]] = {}
    for chain in chains:
        for index, step in enumerate(chain.steps):
            before = chain.steps[index - 1].prompt if index else None
            seen.setdefault(step.step, {})[step.key] = (step.prompt, before)
    result = {}
    for number in sorted(seen):
        pairs = list(seen[number].values())
        earlier = [before for _, before in pairs if before is not None]
        result[number] = statistics_of([prompt for prompt, _ in pairs], earlier if len(earlier) == len(pairs) else None)
    return result

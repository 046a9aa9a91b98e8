"""How a critic's words become a score."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor

from coz.critics.base import Score

ScoreKind = Literal["parse", "expected"]
HIGHEST = 100

_NUMBER = re.compile(
    r"(?:(?<![\w.])[-−])?"  # a minus, unless it joins two things as in 80-90
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)?(?:\.\d+)?"
)


def parse_score(answer: str) -> Score:
    """The first number of an answer, from 0 to 100, as a share of 1; None if there is none or it lies outside."""
    for match in _NUMBER.finditer(answer):
        digits = match.group().replace(",", "").replace("−", "-")
        if any(digit.isdigit() for digit in digits):
            value = float(digits)
            return value / HIGHEST if 0 <= value <= HIGHEST else None
    return None


def expected_scores(probabilities: Tensor, masses: Tensor, *, min_mass: float) -> list[Score]:
    """Means of distributions over 0…100: (B, 101) and (B,) → B shares of 1.

    None where the model finds a number less probable than `min_mass` in all: it wants to say something else, and what is
    left among the numbers is noise.
    """
    values = probabilities.new_tensor(range(HIGHEST + 1))
    means = (probabilities.double() @ values.double() / HIGHEST).clamp(0, 1).tolist()
    return [mean if mass >= min_mass else None for mean, mass in zip(means, masses.tolist(), strict=True)]

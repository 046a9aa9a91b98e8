"""Mean opinion scores of a preference study: means, paired t-tests with Holm's correction, effect sizes (arXiv 2505.18600, D).

Each person rates every condition on the same pictures, so that conditions are compared within persons. Several ratings of one
person are no independent observations: a person counts once, with the mean of his or her ratings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from coz.tables import Table

Unit = Literal["person", "set"]
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


@dataclass(frozen=True)
class Rating:
    """One answer."""

    person: int
    part: str
    photo: str
    condition: str
    score: int
    """1 (Very Bad) to 5 (Very Good)."""


@dataclass(frozen=True)
class Opinion:
    """Mean opinion score of one condition in one part."""

    part: str
    condition: str
    n: int
    """Ratings."""
    mean: float
    sd: float
    """Sample standard deviation over ratings, as the error bars of Fig. 10; NaN for a single one."""


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two conditions in one part: mean(second − first)."""

    part: str
    first: str
    second: str
    n: int
    """Pairs."""
    difference: float
    low: float
    high: float
    """95 % interval of the mean difference, by Student's t."""
    t: float
    p: float
    p_holm: float
    effect: float
    """Cohen's d_z: mean difference / standard deviation of the differences."""

    @property
    def stars(self) -> str:
        """Of the corrected p, as in the paper: * below 0.05, ** below 0.01, *** below 0.001."""
        return next((stars for bound, stars in STARS if self.p_holm < bound), "")


def opinions(ratings: Iterable[Rating], conditions: Sequence[str]) -> list[Opinion]:
    """Mean and standard deviation of each condition, part by part, in the order of `conditions`."""
    kept = list(ratings)
    found = []
    for part in sorted({rating.part for rating in kept}):
        for condition in conditions:
            scores = [rating.score for rating in kept if (rating.part, rating.condition) == (part, condition)]
            if scores:
                sd = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
                found.append(Opinion(part, condition, len(scores), float(np.mean(scores)), sd))
    return found


def compare(ratings: Iterable[Rating], conditions: Sequence[str], *, unit: Unit = "person") -> list[Comparison]:
    """Every pair of conditions in every part, p corrected by Holm within the part.

    Args:
        unit: what makes a pair: a `person` (the mean over the pictures that the person rated under both conditions), or a
            `set`, a person with one picture, which counts a person several times and overstates what is known.
    """
    scores: dict[tuple[str, str], dict[tuple[int, str], int]] = {}
    for rating in ratings:
        scores.setdefault((rating.part, rating.condition), {})[rating.person, rating.photo] = rating.score
    found: list[Comparison] = []
    for part in sorted({part for part, _ in scores}):
        mine = []
        for first, second in itertools.combinations(conditions, 2):
            ours, theirs = scores.get((part, first), {}), scores.get((part, second), {})
            shared = sorted(ours.keys() & theirs.keys())
            groups: dict[object, list[int]] = {}
            for key in shared:
                groups.setdefault(key[0] if unit == "person" else key, []).append(theirs[key] - ours[key])
            if groups:
                mine.append(_paired(part, first, second, [float(np.mean(group)) for group in groups.values()]))
        found += [replace(c, p_holm=p) for c, p in zip(mine, holm([c.p for c in mine]), strict=True)]
    return found


def _paired(part: str, first: str, second: str, differences: Sequence[float]) -> Comparison:
    """Student's paired t-test, two-sided. Differences that are all alike are certain if they are not zero."""
    from scipy import stats

    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        nan = math.nan
        return Comparison(part, first, second, n, mean, nan, nan, nan, nan, nan, nan)
    sd = float(np.std(differences, ddof=1))
    if sd < 1e-12:
        t = math.copysign(math.inf, mean) if abs(mean) > 1e-12 else 0.0
        return Comparison(part, first, second, n, mean, mean, mean, t, 0.0 if t else 1.0, math.nan, t)
    error = sd / math.sqrt(n)
    t = mean / error
    p = float(2 * stats.t.sf(abs(t), n - 1))
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Comparison(part, first, second, n, mean, mean - reach, mean + reach, t, p, math.nan, mean / sd)


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method (1979), in the given order; NaN stays uncounted."""
    order = sorted((index for index, p in enumerate(ps) if not math.isnan(p)), key=lambda index: ps[index])
    corrected, largest = list(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def tables(ratings: Sequence[Rating], conditions: Sequence[str], *, unit: Unit = "person") -> tuple[Table, Table]:
    """(opinions, comparisons) for people."""
    rows = [[o.part, o.condition, str(o.n), f"{o.mean:.3f}", f"{o.sd:.3f}"] for o in opinions(ratings, conditions)]
    people = len({rating.person for rating in ratings})
    scores = Table(["part", "condition", "ratings", "mean", "sd"], rows, [f"{people} persons; 1: Very Bad, 5: Very Good."])
    header = ["part", "compared", "pairs", "difference", "95 % interval", "t", "p", "p (Holm)", "d_z", ""]
    body = []
    for c in compare(ratings, conditions, unit=unit):
        interval = f"[{c.low:+.3f}, {c.high:+.3f}]"
        numbers = [f"{c.difference:+.3f}", interval, f"{c.t:.3f}", f"{c.p:.2g}", f"{c.p_holm:.2g}", f"{c.effect:+.2f}"]
        body.append([c.part, f"{c.second} − {c.first}", str(c.n), *numbers, c.stars])
    notes = [f"Paired two-sided t-tests over {unit}s, Holm's correction within a part; * p < 0.05, ** p < 0.01, *** p < 0.001."]
    return scores, Table(header, body, notes)

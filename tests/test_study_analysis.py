"""The study's statistics against scipy and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from coz.errors import UserError
from coz.study_analysis import Rating, compare, holm, opinions, tables
from coz.study_figure import draw_bars

CONDITIONS = ["single", "multi", "tuned"]


def grade(value):
    return int(np.clip(round(value), 1, 5))


@pytest.fixture
def ratings():
    """12 persons, 5 photographs each; tuned is liked better."""
    generator = np.random.default_rng(1)
    lift = {"single": 0.0, "multi": 0.3, "tuned": 1.2}
    return [
        Rating(person, part, f"photo{photo}", condition, grade(generator.normal(2.5 + lift[condition], 0.8)))
        for person in range(12)
        for part in ("image", "text")
        for photo in range(5)
        for condition in CONDITIONS
    ]


def means(ratings, part, condition):
    return [
        np.mean([r.score for r in ratings if (r.person, r.part, r.condition) == (person, part, condition)])
        for person in range(12)
    ]


def test_means_and_deviations(ratings):
    found = {(o.part, o.condition): o for o in opinions(ratings, CONDITIONS)}
    assert len(found) == 6
    scores = [r.score for r in ratings if (r.part, r.condition) == ("text", "tuned")]
    opinion = found["text", "tuned"]
    assert opinion.n == 60
    assert opinion.mean == pytest.approx(np.mean(scores))
    assert opinion.sd == pytest.approx(np.std(scores, ddof=1))


def test_t_tests_are_scipys(ratings):
    found = compare(ratings, CONDITIONS)
    assert len(found) == 6
    for c in found:
        first, second = means(ratings, c.part, c.first), means(ratings, c.part, c.second)
        known = stats.ttest_rel(second, first)
        assert c.n == 12
        assert c.t == pytest.approx(known.statistic)
        assert c.p == pytest.approx(known.pvalue)
        interval = known.confidence_interval(0.95)
        assert (c.low, c.high) == pytest.approx((interval.low, interval.high))
        assert c.effect == pytest.approx(known.statistic / math.sqrt(12))
        assert c.difference == pytest.approx(np.mean(second) - np.mean(first))
    for part in ("image", "text"):
        mine = [c for c in found if c.part == part]
        assert [c.p_holm for c in mine] == holm([c.p for c in mine])


def test_sets_as_pairs_are_more(ratings):
    (c, *_) = compare(ratings, CONDITIONS, unit="set")
    scores = {k: [r.score for r in ratings if (r.part, r.condition) == ("image", k)] for k in (c.first, c.second)}
    assert c.n == 60
    assert c.p == pytest.approx(stats.ttest_rel(scores[c.second], scores[c.first]).pvalue)


def test_only_pictures_rated_under_both_conditions_count():
    rows = [Rating(p, "image", "a", k, s) for p, (x, y) in enumerate([(1, 3), (2, 3), (2, 5)]) for k, s in (("x", x), ("y", y))]
    extra = [Rating(0, "image", "b", "x", 5), Rating(9, "image", "a", "y", 1)]
    (c,) = compare([*rows, *extra], ["x", "y"])
    assert (c.n, c.difference) == (3, 2.0)
    assert c.t == pytest.approx(2.0 / (1.0 / math.sqrt(3)))
    assert c.effect == pytest.approx(2.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6, 0.9]) == [1.0, 1.0, 1.0]
    corrected = holm([0.02, math.nan, 0.01])
    assert corrected[0] == pytest.approx(0.02)
    assert corrected[2] == pytest.approx(0.02)
    assert math.isnan(corrected[1])
    assert holm([]) == []


def test_few_and_equal_answers_do_not_fail():
    one = [Rating(0, "image", "a", "x", 3), Rating(0, "image", "a", "y", 4)]
    (c,) = compare(one, ["x", "y"])
    assert c.n == 1
    assert math.isnan(c.p_holm)
    assert c.stars == ""
    same = [Rating(p, "image", "a", k, 3) for p in range(4) for k in ("x", "y")]
    (c,) = compare(same, ["x", "y"])
    assert (c.t, c.p, c.stars) == (0.0, 1.0, "")
    shifted = [Rating(p, "image", "a", k, s) for p in range(4) for k, s in (("x", 2), ("y", 3))]
    (c,) = compare(shifted, ["x", "y"])
    assert (c.t, c.p, c.stars) == (math.inf, 0.0, "***")


def test_tables_and_figure(ratings, tmp_path):
    scores, comparisons = tables(ratings, CONDITIONS)
    assert len(scores.body) == len(comparisons.body) == 6
    assert "***" in comparisons.markdown()
    assert draw_bars(ratings, CONDITIONS, out=tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no ratings"):
        draw_bars([], CONDITIONS, out=tmp_path / "none.png")

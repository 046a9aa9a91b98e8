"""Figure 10 of the paper: mean opinion scores as bars, standard deviations as error bars, stars over pairs that differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from coz.errors import UserError
from coz.store import atomic_path
from coz.study_analysis import Comparison, Opinion, Rating, Unit, compare, opinions

_TITLES = {"image": "(a) Image generation", "text": "(b) Text generation"}
_COLORS = ("#a9bcd0", "#58a4b0", "#e4572e", "#f3a712")


def draw_bars(ratings: Sequence[Rating], conditions: Sequence[str], *, out: Path, unit: Unit = "person") -> Path:
    """Draw the figure. → the file written.

    Raises:
        UserError: there are no ratings.
    """
    if not ratings:
        raise UserError("there are no ratings yet; the figure needs at least one")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores, pairs = opinions(ratings, conditions), compare(ratings, conditions, unit=unit)
    parts = sorted({opinion.part for opinion in scores})
    figure = Figure(figsize=(1.5 + 3.2 * len(parts), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        own = [opinion for opinion in scores if opinion.part == part]
        _bars(axes, _TITLES.get(part, part), own, [pair for pair in pairs if pair.part == part])
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=160, format=out.suffix.lstrip(".") or "png")
    return out


def _bars(axes, title: str, scores: Sequence[Opinion], pairs: Sequence[Comparison]) -> None:  # noqa: ANN001 - matplotlib's
    places = {opinion.condition: place for place, opinion in enumerate(scores)}
    spreads = [0.0 if math.isnan(opinion.sd) else opinion.sd for opinion in scores]
    colors = [_COLORS[place % len(_COLORS)] for place in range(len(scores))]
    axes.bar(list(places.values()), [opinion.mean for opinion in scores], yerr=spreads, color=colors, capsize=4, width=0.65)
    axes.set_xticks(list(places.values()), list(places))
    axes.set_title(title)
    axes.set_ylabel("mean opinion score")
    top = max(opinion.mean + spread for opinion, spread in zip(scores, spreads, strict=True)) + 0.15
    for pair in sorted(pairs, key=lambda pair: places[pair.second] - places[pair.first]):
        if pair.stars:
            left, right = places[pair.first] + 0.04, places[pair.second] - 0.04
            axes.plot([left, left, right, right], [top - 0.06, top, top, top - 0.06], color="#1a1a1a", linewidth=1)
            axes.text((left + right) / 2, top, pair.stars, ha="center", va="bottom")
            top += 0.35
    axes.set_ylim(0, max(5.0, top + 0.1))

"""Pictures of results, made of the files of finished runs alone: `python -m coz.plots --help` lists the paper's figures."""

from coz.plots.rewards import draw_rewards, read_curves
from coz.plots.strips import draw_strip, draw_zoom

__all__ = ["draw_rewards", "draw_strip", "draw_zoom", "read_curves"]

"""Pictures of results, made of the files of finished runs alone: `python -m coz.plots --help` lists the paper's figures."""

from coz.plots.rewards import draw_rewards, read_curves
from coz.plots.strips import StripState, draw_strip, draw_zoom, read_strip_state

__all__ = ["StripState", "draw_rewards", "draw_strip", "draw_zoom", "read_curves", "read_strip_state"]

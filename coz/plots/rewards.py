"""Figures 6 and 7: the rewards of GRPO runs on their validation pairs, step by step."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from coz.errors import UserError
from coz.plots.drawing import PALETTE
from coz.store import atomic_path

PANELS = {
    "critic": "Critic Reward",
    "phrase": "Phrase Exclusion Reward",
    "repetition": "Repetition Penalty",
    "total": "Total Reward",
}


def read_curves(run: Path, split: str = "validation") -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each reward of a GRPO run, by name.

    Raises:
        UserError: no rows of rewards there.
    """
    file = run / "rewards.csv"
    if not file.is_file():
        raise UserError(f"{run} holds no rewards.csv; give the folder of a run of train_grpo.py")
    curves: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["split"] == split and row.get("value"):
                curves.setdefault(row["name"], {})[int(row["step"])] = float(row["value"])
    if not curves:
        raise UserError(f"{file} holds no {split} row yet; wait for the first validation")
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in curves.items()}


def draw_rewards(runs: Sequence[Path], *, out: Path) -> Path:
    """Figures 6 and 7: each reward on the validation pairs against the step, a line per run. → the file written.

    Raises:
        UserError: a folder without rewards.
    """
    curves = {run_label(run): read_curves(run) for run in runs}
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(PANELS), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS))
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        for color, (label, values) in zip(PALETTE * len(curves), curves.items(), strict=False):
            if name in values:
                panel.plot(*values[name], color=color, label=label, marker="o", markersize=3)
    if len(curves) > 1:
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120, format=out.suffix.lstrip(".") or "png")
    return out


def run_label(run: Path) -> str:
    """The critic's name and the run's."""
    config = run / "config.yaml"
    if config.is_file():
        from omegaconf import OmegaConf

        critic = OmegaConf.select(OmegaConf.load(config), "choices.critic")
        return f"{critic} ({run.name})" if critic else run.name
    return run.name

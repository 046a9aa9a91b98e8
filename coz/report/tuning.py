"""The report's part on GRPO runs: the rewards step by step, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from coz.errors import UserError
from coz.plots.failures_figure import Completion, Example, choose_examples, completion_steps, read_completions
from coz.plots.rewards import PANELS, read_curves, run_label
from coz.report.curves import color_of, ticks

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 30
Curve = tuple[Sequence[float], Sequence[float]]


def tuning_section(runs: Sequence[Path]) -> str:
    """Curves of all runs together, then each run's examples.

    Raises:
        UserError: a run without a validation.
    """
    curves = {f"{run_label(run)}": read_curves(run) for run in runs}
    legend = "".join(
        f'<span><i style="background:{color_of(index)}"></i>{escape(label)}</span>' for index, label in enumerate(curves)
    )
    panels = []
    for name, title in PANELS.items():
        mine = {label: values[name] for label, values in curves.items() if name in values}
        if mine:
            panels.append(f"<figure><figcaption>{title}</figcaption>{draw_lines(title, mine, list(curves))}</figure>")
    note = '<p class="note">Means over the validation pairs, against the training step (Figures 6 and 7).</p>'
    examples = "".join(map(_examples, runs))
    return f'<div class="legend">{legend}</div><div class="panels">{"".join(panels)}</div>{note}{examples}'


def draw_lines(label: str, curves: Mapping[str, Curve], order: Sequence[str]) -> str:
    """Values against steps as an SVG.

    Args:
        curves: run → (steps, values).
        order: the runs in the order of their colors.
    """
    steps = [step for own, _ in curves.values() for step in own]
    values = [value for _, own in curves.values() for value in own]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05
    low, high = low - margin, high + margin
    first, last = min(steps), max(steps)

    def x_of(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + 6 + share * (_WIDTH - _LEFT - _RIGHT - 12)

    def y_of(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for step in ticks(first, last, 4):
        parts.append(f'<text x="{x_of(step):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{step:g}</text>')
    for name, (own_steps, own_values) in curves.items():
        color = color_of(order.index(name))
        points = [(x_of(step), y_of(value)) for step, value in zip(own_steps, own_values, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{line}"/>')
        for (x, y), step, value in zip(points, own_steps, own_values, strict=True):
            told = escape(f"{name}, step {step:g}: {value:.4f}")
            parts.append(f'<circle fill="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{told}</title></circle>')
    name = escape(f"{label} against the step", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _examples(run: Path) -> str:
    """Answers that tuning changed, or nothing where fewer than two validations kept theirs."""
    try:
        steps = completion_steps(run)
        chosen = choose_examples(read_completions(run, steps[0]), read_completions(run, steps[-1])) if len(steps) > 1 else []
    except UserError:
        return ""
    if not chosen:
        return ""
    rows = "".join(_example(example, steps[0], steps[-1]) for example in chosen)
    return f"<details open><summary>{escape(run_label(run))}: answers before and after</summary>{rows}</details>"


def _example(example: Example, before: int, after: int) -> str:
    return (
        f'<div class="strip"><h3>{escape(example.reward)}</h3><div class="ranked">{_picture(example, 0, "context")}'
        f"{_picture(example, 1, 'view')}</div>{_answer(example.before, before)}{_answer(example.after, after)}</div>"
    )


def _picture(example: Example, index: int, name: str) -> str:
    data = example.before.pictures[index]
    safe = data if data.startswith("data:image/jpeg;base64,") and '"' not in data and ")" not in data else ""
    style = f"background-image:url(&quot;{safe}&quot;)"
    picture = f'<div class="picture" role="img" aria-label="{name}" style="{style}"></div>'
    return f"<figure>{picture}<figcaption>{name}</figcaption></figure>"


def _answer(completion: Completion, step: int) -> str:
    text = escape(completion.text) if completion.text else "<i>empty</i>"
    told = ", ".join(f"{name} {value:.3f}" for name, value in completion.rewards.items())
    return f'<p>step {step}: {text}<br><span class="note">{escape(told)}</span></p>'

"""The report's part on GRPO runs: the rewards step by step, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from coz.errors import UserError
from coz.plots.failures_figure import Completion, Example, choose_examples, completion_steps, read_completions
from coz.plots.rewards import PANELS, read_curves, run_label
from coz.report.curves import Frame, color_of, dot, polyline, ticks

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
    frame = Frame(low - margin, high + margin, height=220, bottom=30, inset=6, mark_above=10)
    first, last = min(steps), max(steps)

    def x_of(step: float) -> float:
        return frame.x_of((step - first) / (last - first) if last > first else 0.5)

    parts = [*frame.grid(), *(frame.mark(x_of(step), f"{step:g}") for step in ticks(first, last, 4))]
    for name, (own_steps, own_values) in curves.items():
        color = color_of(order.index(name))
        points = [(x_of(step), frame.y_of(value)) for step, value in zip(own_steps, own_values, strict=True)]
        parts.append(polyline(points, color))
        for (x, y), step, value in zip(points, own_steps, own_values, strict=True):
            parts.append(dot(x, y, color, f"{name}, step {step:g}: {value:.4f}", radius=3))
    return frame.svg(f"{label} against the step", parts)


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

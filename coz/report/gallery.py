"""The report's pictures: zoom strips with a slider between two methods, and the best and worst pictures by each metric."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from coz.report.curves import color_of
from coz.report.pictures import Pictures
from coz.report.reading import Results
from coz.stored_chains import Chain
from coz.tables import Column, Row, method_order


def strips_section(results: Results, pictures: Pictures, methods: Sequence[str], *, limit: int) -> str:
    """A strip per photograph: the start with frames, then each scale with two methods on top of each other."""
    strips = [_strip(results, pictures, methods, photo) for photo in results.photos[:limit]]
    more = len(results.photos) - limit
    note = f'<p class="note">{more} more photographs have strips; --photos shows more.</p>' if more > 0 else ""
    return "".join(filter(None, strips)) + note or '<p class="note">No pictures are here.</p>'


def _strip(results: Results, pictures: Pictures, methods: Sequence[str], photo: str) -> str:
    keys = results.keys(photo)
    chains = {label: chain for label, key in keys.items() if (chain := results.states.chain(key)) is not None}
    if not chains:
        return ""
    shown = {label: style for label in sorted(chains, key=lambda label: label[0]) if (style := pictures.embed(keys[label]))}
    mine = [method for method in methods if any(own == method for own, _ in shown)]
    cells = [_start(results, pictures, chains)]
    for scale in sorted({scale for _, scale in shown}):
        states = {method: shown[method, scale] for method in mine if (method, scale) in shown}
        left, right = (states.get(method, "absent") for method in (mine[0], mine[-1]))  # what the page shows without scripts
        told = escape(json.dumps(states), quote=True)
        cells.append(
            f'<figure><div class="picture" data-states="{told}" role="img" aria-label="{escape(photo, quote=True)} at '
            f'{scale:g}×"><div class="left {left}"></div><div class="right {right}"></div><div class="bar"></div></div>'
            f"<figcaption>{scale:g}×</figcaption></figure>"
        )
    name = escape(photo, quote=True)
    controls = (
        f'<div class="controls"><select aria-label="left method for {name}">{_options(mine, 0)}</select>'
        f'<input type="range" min="0" max="100" value="50" aria-label="how much of the left method of {name} is shown">'
        f'<select aria-label="right method for {name}">{_options(mine, len(mine) - 1)}</select></div>'
    )
    credit = results.found.credits.get(photo, "")
    note = f'<p class="note">{escape(credit)}</p>' if credit else ""
    prompts = _prompts(chains, methods)
    return f'<div class="strip"><h3>{name}</h3>{controls}<div class="cells">{"".join(cells)}</div>{note}{prompts}</div>'


def _options(methods: Sequence[str], chosen: int) -> str:
    return "".join(
        f'<option value="{escape(method, quote=True)}"{" selected" if index == chosen else ""}>{escape(method)}</option>'
        for index, method in enumerate(methods)
    )


def _start(results: Results, pictures: Pictures, chains: Mapping[tuple[str, float], Chain]) -> str:
    """The start state with a frame around what each state shows of it."""
    longest = max(chains.values(), key=lambda chain: len(chain.steps))
    style = pictures.embed(longest.start) or "absent"
    frames = []
    for index, region in enumerate(results.states.regions(longest)):
        place = f'x="{region.left:.5f}" y="{region.top:.5f}" width="{region.side:.5f}" height="{region.side:.5f}"'
        frames.append(f'<rect {place} fill="none" stroke="{color_of(index)}" stroke-width="0.006"/>')
    drawing = f'<svg viewBox="0 0 1 1" aria-hidden="true">{"".join(frames)}</svg>'
    label = 'role="img" aria-label="the start, with a frame around each view"'
    return f'<figure><div class="picture {style}" {label}>{drawing}</div><figcaption>start</figcaption></figure>'


def _prompts(chains: Mapping[tuple[str, float], Chain], methods: Sequence[str]) -> str:
    """The prompts of each method's longest chain."""
    parts = []
    for method in methods:
        mine = [chain for (own, _), chain in chains.items() if own == method]
        longest = max(mine, key=lambda chain: len(chain.steps), default=None)
        if longest is not None and any(step.prompt for step in longest.steps):
            lines = "".join(f"<li>{step.scale:g}×: {escape(step.prompt)}</li>" for step in longest.steps)
            parts.append(f"<p>{escape(method)}</p><ul>{lines}</ul>")
    return f"<details><summary>Prompts</summary>{''.join(parts)}</details>" if parts else ""


# ---------------------------------------------------------------------------------------------------------------------
# best and worst


def rank(rows: Sequence[Row], column: Column, *, limit: int) -> tuple[list[Row], list[Row]]:
    """(best, worst first) of one metric's rows, no row in both; ties in the order of names; failures are the worst."""

    def badness(row: Row) -> tuple[bool, float, str]:
        value = float(row["value"])  # type: ignore[arg-type]
        return bool(row["failure"]), -value if column.higher_is_better else value, str(row["image"])

    ordered = sorted(rows, key=badness)
    best = ordered[: min(limit, (len(ordered) + 1) // 2)]
    return best, list(reversed(ordered[len(best) :]))[:limit]


def ranked_section(results: Results, pictures: Pictures, *, limit: int) -> str:
    """For each metric, and in it for each scale and method, the best and the worst pictures."""
    parts = []
    for number, column in enumerate(results.found.columns):
        groups: dict[tuple[float, str], dict[str, Row]] = {}
        for row in results.found.rows:
            if row["metric"] == column.name:
                label = (float(row["scale"]), str(row["method"]))  # type: ignore[arg-type]
                groups.setdefault(label, {})[str(row["image"])] = row
        inner = []
        # the largest scales first: they show most, and the budget of pictures may end
        for scale, method in sorted(groups, key=lambda label: (-label[0], method_order(label[1]))):
            best, worst = rank(list(groups[scale, method].values()), column, limit=limit)
            content = "".join(
                f'<p class="note">{title}</p><div class="ranked">{"".join(_thumbnail(row, pictures) for row in chosen)}</div>'
                for title, chosen in (("best", best), ("worst first", worst))
                if chosen
            )
            inner.append(f"<details><summary>{scale:g}× {escape(method)}</summary>{content}</details>")
        if inner:
            opened = " open" if number == 0 else ""
            parts.append(f"<details{opened}><summary>{escape(column.label)}</summary>{''.join(inner)}</details>")
    return "".join(parts) or '<p class="note">No metric has values.</p>'


def _thumbnail(row: Row, pictures: Pictures) -> str:
    style = pictures.embed(str(row["state"])) or "absent"
    name = escape(str(row["image"]), quote=True)
    told = f"failed: {escape(str(row['failure']))}" if row["failure"] else f"{row['value']:.4f}"
    picture = f'<div class="picture {style}" role="img" aria-label="{name}"></div>'
    return f"<figure>{picture}<figcaption>{name}<br>{told}</figcaption></figure>"

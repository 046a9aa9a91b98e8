"""The report's HTML: sections out of results, one page without any outside request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from coz.report.curves import color_of, draw_curves
from coz.report.gallery import ranked_section, strips_section
from coz.report.pictures import Pictures
from coz.report.prompt_statistics import PromptStatistics, by_step
from coz.report.reading import JobFiles, Results, paper_values
from coz.report.tuning import tuning_section
from coz.stored_chains import Chain
from coz.tables import Table, differences_table, method_order, results_table, summarise

# Nothing may be fetched, whatever the page holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SECRET = re.compile(r"(?m)^(\s*[\w-]*(?:api_key|password|secret|access_token|_token):\s*)(?!null\b)\S.*$")


def render(results: Results, pictures: Pictures, *, photos: int, ranked: int, tuned: Sequence[Path] = ()) -> str:
    """The page.

    Args:
        photos: strips of at most so many photographs.
        ranked: so many best and so many worst pictures by each metric.
        tuned: runs of `train_grpo.py`, whose rewards are shown too.
    """
    methods = sorted({str(row["method"]) for row in results.found.rows}, key=method_order)
    sections = _sections(results, pictures, methods, photos=photos, ranked=ranked) if results.jobs else []
    if tuned:
        sections.append(("tuning", "Tuning of the prompt extractor", tuning_section(tuned)))
    return _page(results, pictures, sections)


def _sections(
    results: Results, pictures: Pictures, methods: Sequence[str], *, photos: int, ranked: int
) -> list[tuple[str, str, str]]:
    return [
        ("tables", "Tables", _tables(results)),
        ("curves", "Curves over the scale", _curves(results, methods)),
        ("strips", "Zoom strips", strips_section(results, pictures, methods, limit=photos)),
        ("ranked", "Best and worst pictures", ranked_section(results, pictures, limit=ranked)),
        ("prompts", "Prompts", _prompts(results, methods)),
        ("failures", "Failures", _failures(results)),
        ("times", "Run times", _times(results)),
        ("provenance", "Provenance", _provenance(results)),
    ]


def _page(results: Results, pictures: Pictures, sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in sections)
    static = Path(__file__).parents[1] / "assets" / "report"
    style = (static / "report.css").read_text(encoding="utf-8")
    script = (static / "report.js").read_text(encoding="utf-8")
    left_out = f"{pictures.refused} more pictures did not fit the budget; --pictures and --max-mb raise it."
    note = f'<p class="note">{left_out}</p>' if pictures.refused else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>coz: {escape(results.title)}</title><style>{style}\n{pictures.style()}</style></head>"
        f"<body><h1>{escape(results.title)}</h1>{_warnings(results)}<nav>{links}</nav>{body}{note}"
        f"<script>{script}</script></body></html>\n"
    )


def _warnings(results: Results) -> str:
    texts = ["Detail at high magnifications is invented: plausible, not evidence."]
    if any(row["profile"] == "tiny" for row in results.found.rows):
        texts.insert(0, "Models with RANDOM weights made some of these results: they mean nothing.")
    if results.jobs and results.states.root is None:
        texts.append("The state store was not found, so there are no pictures and no prompts; name it with --states.")
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def html_table(table: Table) -> str:
    """A table that scrolls inside itself on a narrow screen; cells that end in * are bold."""
    head = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    rows = []
    for row in table.body:
        cells = "".join(f"<td{' class=best' if text.endswith('*') else ''}>{escape(text)}</td>" for text in row)
        rows.append(f"<tr>{cells}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return f'<div class="wide" tabindex="0"><table><tr>{head}</tr>{"".join(rows)}</table></div>{notes}'


def _tables(results: Results) -> str:
    found = results.found
    parts = [html_table(results_table(found.rows, found.columns, found.refusals))]
    labels = {(float(row["scale"]), str(row["method"])) for row in found.rows}  # type: ignore[arg-type]
    names = [column.name for column in found.columns]
    published = paper_values(labels, names)
    if published:
        header = ["scale", "method", "data set", "NIQE ↓", "MUSIQ ↑", "MANIQA ↑", "CLIPIQA ↑"]
        values = ("niqe", "musiq", "maniqa", "clipiqa")
        body = [[f"{line['scale']}×", line["method"], line["dataset"], *(line[name] for name in values)] for line in published]
        sets = ", ".join(sorted({str(row["dataset"]) for row in found.rows}))
        note = (
            f"arXiv 2505.18600, Table 1: 800 photographs each, OSEDiff on SD3. The runs above are on other photographs ({sets})"
        )
        note += " unless that is the data set of the same name; only figures on the same photographs can be compared."
        parts += ["<h3>The paper's values</h3>", html_table(Table(header, body, [note]))]
    for column in found.columns:
        paired = differences_table(found.rows, column)
        if paired is not None:
            parts.append(
                f"<details><summary>Paired differences: {escape(column.label)}</summary>{html_table(paired)}</details>"
            )
    return "".join(parts)


def _curves(results: Results, methods: Sequence[str]) -> str:
    cells = summarise(results.found.rows)
    if len({scale for scale, _, _ in cells}) < 2:
        return '<p class="note">Curves need two scales: python evaluate.py -m scale=4,16,64 …</p>'
    legend = "".join(
        f'<span><i style="background:{color_of(index)}"></i>{escape(method)}</span>' for index, method in enumerate(methods)
    )
    panels = []
    for column in results.found.columns:
        mine = {(scale, method): cell for (scale, method, metric), cell in cells.items() if metric == column.name}
        if mine:
            arrow = "↑" if column.higher_is_better else "↓"
            drawing = draw_curves(column.label, mine, methods)
            panels.append(f"<figure><figcaption>{escape(column.label)} {arrow}</figcaption>{drawing}</figure>")
    note = '<p class="note">Means with bootstrap 95 % intervals over photographs.</p>'
    return f'<div class="legend">{legend}</div><div class="panels">{"".join(panels)}</div>{note}'


def _prompts(results: Results, methods: Sequence[str]) -> str:
    body = []
    for method in methods:
        keys = {str(row["state"]) for row in results.done if row["method"] == method}
        chains = [chain for key in sorted(keys) if (chain := results.states.chain(key)) is not None]
        if any(step.prompt for chain in chains for step in chain.steps):
            body += [_prompt_row(method, step, told) for step, told in by_step(_once(chains)).items()]
    if not body:
        return '<p class="note">No method of these runs used prompts.</p>'
    header = ["method", "step", "prompts", "empty", "words ± sd", "different prompts", "distinct words", "new words"]
    notes = [
        "Different prompts: share that no other photograph shares. Distinct words: different words / all words (distinct-1).",
        "New words: share of a prompt's words that the step before did not say.",
    ]
    return html_table(Table(header, body, notes))


def _once(chains: Sequence[Chain]) -> list[Chain]:
    """Sorted so that the same runs give the same page."""
    return sorted(chains, key=lambda chain: (chain.start, len(chain.steps)))


def _prompt_row(method: str, step: int, told: PromptStatistics) -> list[str]:
    def percent(value: float) -> str:
        return f"{value:.0%}" if math.isfinite(value) else "–"

    length = f"{told.words_mean:.1f}" + (f" ± {told.words_sd:.1f}" if math.isfinite(told.words_sd) else "")
    shares = [percent(told.different), percent(told.distinct_words), percent(told.new_words)]
    return [method, str(step), str(told.n), str(told.empty), length, *shares]


# ---------------------------------------------------------------------------------------------------------------------
# records


def _failures(results: Results) -> str:
    body: dict[tuple[str, ...], set[str]] = {}
    for row in results.found.rows:
        if row["failure"]:
            key = (f"{row['scale']:g}×", str(row["method"]), str(row["image"]), str(row["failure"]))
            body.setdefault(key, set()).add(str(row["metric"]))
    parts = []
    if body:
        rows = [[*key, ", ".join(sorted(metrics))] for key, metrics in sorted(body.items())]
        header = ["scale", "method", "photograph", "reason", "metrics"]
        parts.append(html_table(Table(header, rows, ["Each counts with the worst value of the metric."])))
    for refusal in results.found.refusals:
        subject = f"{refusal.method} at {refusal.scale:g}×" if refusal.method else refusal.metric
        parts.append(f"<p>{escape(subject)} could not run: {escape(refusal.reason)}</p>")
    return "".join(parts) or '<p class="note">None.</p>'


def _times(results: Results) -> str:
    body = []
    for job in results.jobs:
        each = f"{job.seconds / job.states_computed:.2f}" if job.states_computed else "–"
        body.append([_job_name(job), str(job.states_computed), f"{job.seconds:.1f}", each])
    note = "Wall-clock seconds in prompter and backbone, loading included; states out of the store cost none."
    return html_table(Table(["job", "states computed", "seconds", "seconds a state"], body, [note]))


def _provenance(results: Results) -> str:
    parts = []
    for job in results.jobs:
        about = job.provenance
        versions = about.get("versions")
        lines = [f"{key}: {_one_line(about[key])}" for key in ("command", "commit", "python", "machine") if key in about]
        if isinstance(versions, dict):
            lines += [f"{name}: {version}" for name, version in versions.items()]
        config = _SECRET.sub(r"\1(left out)", job.config)
        parts.append(
            f"<details><summary>{escape(_job_name(job))}</summary><pre>{escape(chr(10).join(lines))}</pre>"
            f"<pre>{escape(config)}</pre></details>"
        )
    identities = sorted({str(row["metric_identity"]) for row in results.found.rows if row["metric_identity"]})
    made_by = sorted({_made_by(results, str(row["state"])) for row in results.done} - {""})
    for title, lines in (("Metrics", identities), ("Models and their settings", made_by)):
        parts.append(f"<details><summary>{title}</summary><pre>{escape(chr(10).join(lines))}</pre></details>")
    credits = sorted(f"{name}: {credit}" for name, credit in results.found.credits.items() if credit)
    if credits:
        parts.append(f"<details><summary>Photographs</summary><pre>{escape(chr(10).join(credits))}</pre></details>")
    return "".join(parts)


def _made_by(results: Results, key: str) -> str:
    meta = results.states.meta(key)
    made_by = meta.get("made_by", {}) if meta else {}
    parts = {name: made_by[name] for name in ("backbone", "prompter") if name in made_by}
    return json.dumps(parts, sort_keys=True, ensure_ascii=False) if parts else ""


def _one_line(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _job_name(job: JobFiles) -> str:
    folder = job.folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("job_") else folder.name

"""The tables of arXiv 2505.18600 out of long rows: the paper's layout, its figures and the difference beside ours.

    python -m coz.tables table1 outputs/evaluate/RUN…  [pair=coz_vlm,direct] [out=FOLDER]

needs no model: it reads the rows and records that jobs left.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coz.errors import UserError
from coz.paper_layouts import LAYOUTS, Key, Layout
from coz.results import RECORD, ROWS, JobRecord
from coz.store import write_atomic
from coz.tables import Column, Row, Table, bootstrap_interval, failed_images, read_rows

FIGURES = Path(__file__).parent / "assets" / "paper"
_STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "median": lambda values: float(np.median(values)),
    "minimum": min,
}


@dataclass(frozen=True)
class Entry:
    """One number of a table, the paper's beside it."""

    n: int = 0
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    failures: int = 0
    paper: float = math.nan
    rank: int = 0  # 1 best, 2 second best, 0 neither

    @property
    def difference(self) -> float:
        """Ours minus the paper's."""
        return self.value - self.paper


@dataclass
class Runs:
    """The jobs that a table is made of."""

    rows: list[tuple[str, Row]] = field(default_factory=list)  # (the paper's name of the data set, row)
    records: list[JobRecord] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def find_layout(name: str) -> Layout:
    """The layout of `table1` … `table6`.

    Raises:
        UserError: no such table.
    """
    if name not in LAYOUTS:
        raise UserError(f"{name} is no table of the paper; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def read_figures(layout: Layout) -> dict[Key, float]:
    """The paper's figures of a table."""
    with open(FIGURES / f"{layout.name}.csv", newline="") as file:
        return dict(layout.figure(entry) for entry in csv.DictReader(file))


def job_folders(run: Path) -> list[Path]:
    """The jobs of a run's folder, which may be a sweep or a single job.

    Raises:
        UserError: none there.
    """
    jobs = sorted((file.parent for file in run.glob(f"job_*/{RECORD}")), key=lambda path: int(path.name.split("_")[1]))
    if not jobs and (run / RECORD).is_file():
        jobs = [run]
    if not jobs:
        raise UserError(f"{run} holds no finished job ({RECORD}); give the folder of a run of evaluate.py")
    return jobs


def read_runs(jobs: Sequence[Path]) -> Runs:
    """Rows and records of jobs; a photograph that a later job measured again counts as the later one says."""
    runs = Runs()
    by_identity: dict[tuple[object, ...], tuple[str, Row]] = {}
    for job in jobs:
        record = JobRecord.read(job)
        runs.records.append(record)
        dataset = record.setting.get("stands_for") or record.setting.get("dataset", "")
        for row in read_rows(job / ROWS):
            name = dataset or str(row["dataset"])
            by_identity[name, row["method"], row["scale"], row["metric"], row["image"]] = (name, row)
    runs.rows = list(by_identity.values())
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def entries_of(layout: Layout, runs: Runs) -> dict[Key, Entry]:
    """Every number of a table: what the paper has, what the runs have, or both."""
    figures = read_figures(layout)
    values: dict[Key, list[Row]] = {}
    for dataset, row in runs.rows:
        for statistic in layout.statistics:
            key = Key(float(row["scale"]), str(row["method"]), dataset, str(row["metric"]), statistic)  # type: ignore[arg-type]
            values.setdefault(key, []).append(row)
    entries = {key: Entry(paper=figure) for key, figure in figures.items()}
    for key, rows in values.items():
        numbers = [float(row["value"]) for row in sorted(rows, key=lambda row: str(row["image"]))]  # type: ignore[arg-type]
        # equal values of two methods get equal intervals
        low, high = _interval(numbers, key._replace(method="")) if key.statistic == "mean" else (math.nan, math.nan)
        entries[key] = Entry(
            n=len(numbers),
            value=_STATISTICS[key.statistic](numbers),
            low=low,
            high=high,
            failures=sum(bool(row["failure"]) for row in rows),
            paper=figures.get(key, math.nan),
        )
    return _ranked(entries, layout, runs)


def _interval(values: Sequence[float], key: object) -> tuple[float, float]:
    return bootstrap_interval(values, seed=zlib.crc32(repr(key).encode()))


def _ranked(entries: dict[Key, Entry], layout: Layout, runs: Runs) -> dict[Key, Entry]:
    """Best and second best of ours, among the methods of a scale, data set and metric."""
    if not layout.marks_best:
        return entries
    higher = {column.name: column.higher_is_better for column in columns_of(layout, runs)}
    ranked = dict(entries)
    groups: dict[tuple[object, ...], list[Key]] = {}
    for key, entry in entries.items():
        if entry.n:
            groups.setdefault((key.scale, key.dataset, key.metric), []).append(key)
    for (_, _, metric), keys in groups.items():
        distinct = sorted({round(entries[key].value, 10) for key in keys}, reverse=higher.get(str(metric), True))
        for key in keys if len(keys) > 1 else []:
            place = distinct.index(round(entries[key].value, 10)) + 1
            ranked[key] = Entry(**{**entries[key].__dict__, "rank": place if place <= 2 else 0})
    return ranked


def columns_of(layout: Layout, runs: Runs) -> list[Column]:
    """The paper's metrics, then whatever else the runs measured."""
    theirs = {column.name for column in layout.metrics}
    ours = {c.name: c for record in runs.records for c in record.columns if c.name not in theirs}
    measured = {str(row["metric"]) for _, row in runs.rows}
    return [*layout.metrics, *(column for name, column in ours.items() if name in measured)]


# ---------------------------------------------------------------------------------------------------------------------
# tables


def paper_table(layout: Layout, runs: Runs) -> Table:
    """The paper's layout; under each line of ours its 95 % intervals, the paper's figures and the differences."""
    entries = entries_of(layout, runs)
    columns = columns_of(layout, runs)
    header, lines = layout.pivot(list(entries), columns)
    digits = {column.name: column.digits for column in columns}
    body = []
    for labels, keys in lines:
        cells = [entries.get(key, Entry()) for key in keys]
        places = [digits[str(key.metric)] for key in keys]
        counts = sorted({cell.n for cell in cells if cell.n})
        n = "/".join(map(str, counts)) or "–"
        body.append([*labels, "ours", n, *map(_marked, cells, places)])
        blank = [""] * len(labels)
        if any(cell.low == cell.low for cell in cells):
            body.append([*blank, "95 %", "", *(_interval_text(cell) for cell in cells)])
        if any(cell.paper == cell.paper for cell in cells):
            body.append([*blank, "paper", "", *(_text(cell.paper, place) for cell, place in zip(cells, places, strict=True))])
            if any(cell.difference == cell.difference for cell in cells):
                body.append([*blank, "ours − paper", "", *map(_signed, cells, places)])
    return Table([*header[: len(lines[0][0])], "", "n", *header[len(lines[0][0]) :]], body, _notes(layout, runs))


def _text(value: float, digits: int) -> str:
    return "–" if value != value else f"{value:.{digits}f}"


def _signed(cell: Entry, digits: int) -> str:
    return "" if cell.difference != cell.difference else f"{cell.difference:+.{digits}f}"


def _marked(cell: Entry, digits: int) -> str:
    text = _text(cell.value, digits)
    return {1: f"**{text}**", 2: f"_{text}_"}.get(cell.rank, text)


def _interval_text(cell: Entry) -> str:
    return "" if cell.low != cell.low else f"[{cell.low:.3f}, {cell.high:.3f}]"


def title_of(layout: Layout, runs: Runs) -> str:
    """The caption, and in what our figures differ from the paper's setting."""
    settings = [record.setting for record in runs.records]
    remarks = []
    for profile in sorted({s["profile"] for s in settings if s.get("profile", "paper") != "paper"}):
        random = ", RANDOM weights: our figures mean nothing" if profile == "tiny" else ""
        remarks.append(f"profile {profile}{random}")
    for asked, used in sorted({(s["stands_for"], s["dataset"]) for s in settings if s.get("stands_for")}):
        remarks.append(f"the photographs of dataset={used} stand in for {layout.dataset_label(asked)}")
    remarks += sorted({s["reference"] for s in settings if s.get("reference")})
    tunings = {s["tuning"] for s in settings if s.get("tuning")}
    if layout.tuned and tunings:
        remarks += ["prompter untuned, the paper's is tuned with GRPO"] if "untuned" in tunings else []
        remarks += [f"prompter {tuning}" for tuning in sorted(tunings - {"untuned"})]
    elif layout.tuned:
        remarks.append("prompter untuned: no run used a tuned one")
    return f"{layout.caption}{' – ' if remarks else ''}{'; '.join(remarks)}"


def _notes(layout: Layout, runs: Runs) -> list[str]:
    notes = [layout.remark] if layout.remark else []
    typed = [o.lstrip("+") for record in runs.records for o in record.overrides]
    typed = [o for o in typed if o.split("=")[0] not in layout.swept]
    if typed:
        notes.append(f"Settings: {', '.join(dict.fromkeys(typed))}.")
    backbones = sorted({str(row["backbone"]) for _, row in runs.rows})
    if backbones:
        steps = sorted({record.setting["steps"] for record in runs.records if record.setting.get("steps")})
        notes.append(f"Backbones: {', '.join(backbones)}{''.join(f'; {step}' for step in steps)}.")
    identities = [json.loads(text) for text in sorted({str(row["metric_identity"]) for _, row in runs.rows})]
    notes += [f"Timed on {device}." for device in dict.fromkeys(i["device"] for i in identities if "device" in i)]
    cells: dict[tuple[str, float, str], list[Row]] = {}
    for dataset, row in runs.rows:
        cells.setdefault((str(row["method"]), float(row["scale"]), dataset), []).append(row)  # type: ignore[arg-type]
    for (method, scale, dataset), rows in cells.items():
        if failed := failed_images(rows):
            notes.append(f"{method} at {scale:g}× on {dataset}: {failed}.")
    skipped = sorted({record.setting["skipped"] for record in runs.records if record.setting.get("skipped")})
    notes += [f"Skipped, too small for the reference: {names}." for names in skipped]
    reasons: dict[str, list[str]] = {}
    for record in runs.records:
        dataset = record.setting.get("stands_for") or record.setting.get("dataset", "")
        for refusal in record.refusals:
            subject = f"{refusal.method} at {refusal.scale:g}× on {dataset}" if refusal.method else refusal.metric
            reasons.setdefault(refusal.reason, []).append(subject)
    for reason, subjects in reasons.items():
        named = list(dict.fromkeys(subjects))
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        notes.append(f"Empty: {', '.join(named[:3])}{more}: {reason}")
    if layout.marks_best:
        notes.append("**best** and _second best_ of ours at a scale; 95 %: bootstrap over photographs.")
    return notes


def entries_csv(layout: Layout, runs: Runs) -> str:
    """Every number of a table on a line of its own, with all digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fields = ["n", "value", "low", "high", "failures", "rank", "paper", "difference"]
    writer.writerow(["scale", "method", "dataset", "metric", "statistic", *fields])
    for key, entry in sorted(entries_of(layout, runs).items()):
        values = [getattr(entry, name) for name in fields]
        texts = ["" if value != value else repr(value) for value in values]
        writer.writerow([f"{key.scale:g}", key.method, key.dataset, key.metric, key.statistic, *texts])
    return buffer.getvalue()


def paired_table(layout: Layout, runs: Runs, pair: tuple[str, str] | None = None) -> Table | None:
    """One method against another over the photographs that both have: mean difference, interval, Wilcoxon's signed-rank test.

    Raises:
        UserError: a pair was asked for and no photograph has both.
    """
    method, other = pair or layout.pair
    values: dict[tuple[float, str, str], dict[str, dict[str, float]]] = {}
    for dataset, row in runs.rows:
        group = values.setdefault((float(row["scale"]), dataset, str(row["metric"])), {})  # type: ignore[arg-type]
        group.setdefault(str(row["method"]), {})[str(row["image"])] = float(row["value"])  # type: ignore[arg-type]
    labels = {column.name: column for column in columns_of(layout, runs)}
    body = []
    for (scale, dataset, metric), group in sorted(values.items()):
        ours, theirs = group.get(method, {}), group.get(other, {})
        deltas = [ours[image] - theirs[image] for image in sorted(ours.keys() & theirs.keys())]
        if not deltas or metric not in labels:
            continue
        low, high = _interval(deltas, (scale, dataset, metric, method, other))
        mean, column = float(np.mean(deltas)), labels[metric]
        verdict = "equal" if mean == 0 else ("better" if (mean > 0) == column.higher_is_better else "worse")
        interval = f"[{low:+.4f}, {high:+.4f}]" if low == low else "–"
        test = _wilcoxon(deltas)
        body.append(
            [f"{scale:g}×", layout.dataset_label(dataset), column.label, str(len(deltas)), f"{mean:+.4f}", interval,
             "–" if test != test else f"{test:.3g}", verdict]
        )  # fmt: skip
    if not body:
        if pair:
            raise UserError(f"no photograph has both {method} and {other}; the runs hold {', '.join(_methods(runs))}")
        return None
    header = ["scale", "data set", f"{method} − {other}", "n", "mean", "95 %", "p", "mean is"]
    return Table(header, body, ["Paired by photograph; p: Wilcoxon's signed-rank test, two-sided, one test per line."])


def _methods(runs: Runs) -> list[str]:
    return sorted({str(row["method"]) for _, row in runs.rows})


def _wilcoxon(deltas: Sequence[float]) -> float:
    """p of the two-sided signed-rank test; NaN below 2 pairs, 1 where nothing differs."""
    from scipy.stats import wilcoxon

    if len(deltas) < 2:
        return math.nan
    if not any(deltas):
        return 1.0
    return float(wilcoxon(deltas).pvalue)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def publish_table(name: str, jobs: Sequence[Path], folder: Path, *, pair: tuple[str, str] | None = None) -> str:
    """Write a table of the paper as Markdown, CSV and LaTeX into `folder`; its Markdown."""
    layout = find_layout(name)
    runs = read_runs(jobs)
    table, paired = paper_table(layout, runs), paired_table(layout, runs, pair)
    title = title_of(layout, runs)
    texts = [f"{title}\n", table.markdown(), *([paired.markdown()] if paired else [])]
    write_atomic(folder / f"{name}.md", "\n".join(texts))
    write_atomic(folder / f"{name}.csv", entries_csv(layout, runs))
    latex = f"% {title}\n" + table.latex() + (paired.latex() if paired else "")
    write_atomic(folder / f"{name}.tex", latex)
    return "\n".join(texts)


def main(arguments: Iterable[str]) -> None:
    """`table1 RUN… [pair=A,B] [out=FOLDER]`."""
    words = list(arguments)
    settings = {key: value for key, _, value in (word.partition("=") for word in words) if key in ("pair", "out")}
    places = [word for word in words if word.partition("=")[0] not in ("pair", "out")]
    if len(places) < 2:
        raise UserError("write a table and at least one folder of a run: python -m coz.tables table1 outputs/evaluate/RUN")
    name, *runs = places
    find_layout(name)
    pair = None
    if "pair" in settings:
        methods = settings["pair"].split(",")
        if len(methods) != 2:
            raise UserError(f"pair={settings['pair']} must name two methods, as in pair=coz_vlm,direct")
        pair = (methods[0], methods[1])
    jobs = [job for run in runs for job in job_folders(Path(run))]
    folder = Path(settings.get("out", runs[0]))
    print(publish_table(name, jobs, folder, pair=pair))
    print(f"table: {folder / name}.md, .csv, .tex", file=sys.stderr)

"""Tables out of long rows: means with their intervals, paired differences; Markdown, CSV and LaTeX.

`python -m coz.tables table1 RUN…` lays runs out as a table of the paper, see `paper_tables`.
"""

from __future__ import annotations

import csv
import io
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROW_FIELDS = [
    "image", "method", "scale", "metric", "value", "failure", "dataset", "backbone", "prompter", "profile", "state",
    "metric_identity",
]  # fmt: skip
METHOD_ORDER = ["nn", "bicubic", "direct", "coz_null", "coz_tags", "coz_dape", "coz_vlm_single", "coz_vlm"]
Row = Mapping[str, object]
_NORMAL_FROM, _DRAWS_AT_ONCE = 10_000, 2_000_000
_NAMED = 8  # of a long list, as many are written out
FEWEST_TO_DECIDE = 6  # photographs: a sign test needs as many for p < 0.05, and a bootstrap of fewer says nothing


@dataclass(frozen=True)
class Column:
    """A metric as a table shows it."""

    name: str
    label: str
    higher_is_better: bool
    digits: int = 4  # after the point, in a table of the paper


@dataclass(frozen=True)
class Cell:
    """Mean of one metric over the photographs of one method and scale, with a bootstrap 95 % interval."""

    n: int
    mean: float
    low: float
    high: float
    failures: int


@dataclass(frozen=True)
class Refusal:
    """A method at a scale, or a metric, that could not run, and why."""

    reason: str
    method: str = ""
    scale: float = 0.0
    metric: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# rows


def rows_to_csv(rows: Iterable[Row]) -> str:
    """Long rows as CSV text, numbers with all their digits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ROW_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "value": repr(float(row["value"])), "scale": f"{float(row['scale']):g}"})  # type: ignore[arg-type]
    return buffer.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Long rows of a CSV file; `value` and `scale` as numbers."""
    with open(path, newline="") as file:
        return [{**row, "value": float(row["value"]), "scale": float(row["scale"])} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def bootstrap_interval(values: Sequence[float], *, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean; a single value has none (NaN).

    From `_NORMAL_FROM` values on it is the normal interval, which the bootstrap's then equals to three digits.
    """
    count = len(values)
    if count < 2:
        return float("nan"), float("nan")
    array = np.asarray(values, dtype=np.float64)
    if count >= _NORMAL_FROM:
        half = 1.959964 * array.std(ddof=1) / np.sqrt(count)
        return float(array.mean() - half), float(array.mean() + half)
    generator, rows = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // count)
    sizes = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    means = np.concatenate([generator.choice(array, size=(size, count)).mean(axis=1) for size in sizes])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Iterable[Row]) -> dict[tuple[float, str, str], Cell]:
    """(scale, method, metric) → its cell."""
    groups: dict[tuple[float, str, str], dict[str, Row]] = {}
    for row in rows:
        key = (float(row["scale"]), str(row["method"]), str(row["metric"]))  # type: ignore[arg-type]
        groups.setdefault(key, {})[str(row["image"])] = row  # the same image measured twice counts once
    cells = {}
    for key, by_image in groups.items():
        values = [float(by_image[image]["value"]) for image in sorted(by_image)]  # type: ignore[arg-type]
        low, high = bootstrap_interval(values, seed=_seed(key))
        failures = sum(bool(row["failure"]) for row in by_image.values())
        cells[key] = Cell(len(values), float(np.mean(values)), low, high, failures)
    return cells


def failed_images(rows: Iterable[Row]) -> str:
    """What a note says of the photographs that failed, by name; nothing if there are none. Rows have them all."""
    names = sorted({str(row["image"]) for row in rows if row["failure"]})
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    counted = "photograph failed and counts" if len(names) == 1 else "photographs failed and count"
    return f"{len(names)} {counted} with the metric's worst value: {', '.join(names[:_NAMED])}{more}"


@dataclass(frozen=True)
class Difference:
    """Paired difference of a metric between two methods over the photographs that both have."""

    scale: float
    metric: str
    method: str
    against: str
    cell: Cell

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out, on photographs enough that all of one sign are no mere luck."""
        return self.cell.n >= FEWEST_TO_DECIDE and (self.cell.low > 0 or self.cell.high < 0)


def paired_differences(rows: Iterable[Row], metric: str) -> list[Difference]:
    """Each chain method against every method that is no chain, scale by scale."""
    values: dict[tuple[float, str], dict[str, float]] = {}
    for row in rows:
        if row["metric"] == metric:
            values.setdefault((float(row["scale"]), str(row["method"])), {})[str(row["image"])] = float(row["value"])  # type: ignore[arg-type]
    differences = []
    for (scale, method), ours in sorted(values.items(), key=lambda item: (item[0][0], method_order(item[0][1]))):
        for (other_scale, other), theirs in sorted(values.items(), key=lambda item: method_order(item[0][1])):
            if other_scale != scale or not method.startswith("coz") or other.startswith("coz"):
                continue
            shared = sorted(ours.keys() & theirs.keys())
            deltas = [ours[image] - theirs[image] for image in shared]
            if deltas:
                low, high = bootstrap_interval(deltas, seed=_seed((scale, method, other, metric)))
                cell = Cell(len(deltas), float(np.mean(deltas)), low, high, 0)
                differences.append(Difference(scale, metric, method, other, cell))
    return differences


def _seed(key: object) -> int:
    return zlib.crc32(repr(key).encode())


def method_order(method: str) -> tuple[int, str]:
    """Sorts methods as the paper lists them, variants behind their method."""
    base = method.split("[")[0]
    return (METHOD_ORDER.index(base) if base in METHOD_ORDER else len(METHOD_ORDER)), method


# ---------------------------------------------------------------------------------------------------------------------
# rendering


@dataclass(frozen=True)
class Table:
    """A grid of texts with notes under it."""

    header: list[str]
    body: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """As a Markdown table, columns aligned so that it also reads in a terminal."""
        grid = [self.header, *self.body]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.header))]
        lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in grid]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(lines + (["", *self.notes] if self.notes else [])) + "\n"

    def csv(self) -> str:
        """As CSV, without the notes."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.body])
        return buffer.getvalue()

    def latex(self) -> str:
        """As a LaTeX tabular (booktabs)."""
        rows = [" & ".join(_tex(text) for text in row) + r" \\" for row in self.body]
        head = " & ".join(_tex(text) for text in self.header) + r" \\"
        notes = [f"% {note}" for note in self.notes]
        body = [rf"\begin{{tabular}}{{{'l' * len(self.header)}}}", r"\toprule", head, r"\midrule", *rows]
        return "\n".join([*body, r"\bottomrule", r"\end{tabular}", *notes]) + "\n"


def _tex(text: str) -> str:
    for mark, command in ((r"\*\*(.+)\*\*", "textbf"), (r"_(.+)_", "underline")):
        if marked := re.fullmatch(mark, text):
            return rf"\{command}{{{_tex(marked[1])}}}"
    for plain, escaped in (
        ("\\", r"\textbackslash "),
        ("&", r"\&"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        ("×", r"$\times$"),
    ):
        text = text.replace(plain, escaped)
    return text.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$").replace("–", "--").replace("−", "$-$")


def results_table(
    rows: Sequence[Row], columns: Sequence[Column], refusals: Sequence[Refusal] = (), remarks: Sequence[str] = ()
) -> Table:
    """Scales × methods against metrics: mean [low, high], the best of a scale marked *, with n and notes."""
    cells = summarise(rows)
    labels = {(float(row["scale"]), str(row["method"])) for row in rows}  # type: ignore[arg-type]
    labels |= {(refusal.scale, refusal.method) for refusal in refusals if refusal.method}
    header = ["scale", "method", "n", *(f"{c.label} {'↑' if c.higher_is_better else '↓'}" for c in columns)]
    body, notes = [], []
    for scale, method in sorted(labels, key=lambda label: (label[0], method_order(label[1]))):
        here = [cells.get((scale, method, column.name)) for column in columns]
        count = max((cell.n for cell in here if cell), default=0)
        texts = [_cell_text(cell, column, scale, cells) for cell, column in zip(here, columns, strict=True)]
        body.append([f"{scale:g}×", method, str(count) if count else "–", *texts])
        if failed := failed_images(row for row in rows if (float(row["scale"]), row["method"]) == (scale, method)):  # type: ignore[arg-type]
            notes.append(f"{method} at {scale:g}×: {failed}.")
    for refusal in refusals:
        subject = f"{refusal.method} at {refusal.scale:g}×" if refusal.method else refusal.metric
        notes.append(f"{subject} is empty: {refusal.reason}")
    notes += [f"Note: {remark}." for remark in remarks]
    notes.append("Mean [bootstrap 95 % interval over photographs]; * marks the best of a scale.")
    return Table(header, body, list(dict.fromkeys(notes)))


def _cell_text(cell: Cell | None, column: Column, scale: float, cells: Mapping[tuple[float, str, str], Cell]) -> str:
    if cell is None:
        return "–"
    rivals = [other.mean for (s, _, metric), other in cells.items() if s == scale and metric == column.name]
    best = max(rivals) if column.higher_is_better else min(rivals)
    interval = f" [{cell.low:.2f}, {cell.high:.2f}]" if cell.n > 1 else ""
    return f"{cell.mean:.4f}{interval}{'*' if len(rivals) > 1 and cell.mean == best else ''}"


def differences_table(rows: Sequence[Row], column: Column) -> Table | None:
    """Paired differences of one metric, or None where no chain stands beside another method."""
    differences = paired_differences(rows, column.name)
    if not differences:
        return None
    body = []
    for d in differences:
        better = (d.cell.mean > 0) == column.higher_is_better
        few = f" (n < {FEWEST_TO_DECIDE})" if d.cell.n < FEWEST_TO_DECIDE else ""
        verdict = ("better" if better else "worse") if d.decided else f"undecided{few}"
        interval = f"[{d.cell.low:+.4f}, {d.cell.high:+.4f}]" if d.cell.n > 1 else "–"
        body.append([f"{d.scale:g}×", f"{d.method} − {d.against}", str(d.cell.n), f"{d.cell.mean:+.4f}", interval, verdict])
    header = ["scale", f"{column.label}, paired", "n", "mean difference", "95 % interval", "verdict"]
    return Table(header, body, [f"Negative is better for {column.label}."] if not column.higher_is_better else [])


if __name__ == "__main__":
    import signal
    import sys

    from coz.errors import exit_code
    from coz.paper_tables import main

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(exit_code(lambda: main(sys.argv[1:])))

"""How the tables of arXiv 2505.18600 are laid out: which labels, which rows, which columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coz.tables import Column, method_order


class Key(NamedTuple):
    """What a number of a table is of."""

    scale: float
    method: str
    dataset: str
    metric: str
    statistic: str = "mean"


Line = tuple[list[str], list[Key]]  # the labels of a row, and what stands in its columns
_DATASETS = {"div2k": "DIV2K", "div8k": "DIV8K"}
_QUALITY = (
    Column("niqe", "NIQE", False),
    Column("musiq", "MUSIQ", True, digits=2),
    Column("maniqa-pipal", "MANIQA", True),
    Column("clipiqa", "CLIPIQA", True),
)


@dataclass(frozen=True)
class Layout:
    """A table of quality: scale × method against data set × metric. The other two tables change how it pivots."""

    name: str
    caption: str
    methods: Mapping[str, str]  # in the paper's order, with its labels
    pair: tuple[str, str] = ("", "")  # what the paired test compares
    metrics: Sequence[Column] = _QUALITY
    datasets: Sequence[str] = ("div2k", "div8k")
    statistics: Sequence[str] = ("mean",)
    marks_best: bool = True
    tuned: bool = True  # the paper's figures are of a tuned prompter
    remark: str = ""
    swept: Sequence[str] = field(default=("experiment", "scale", "method", "dataset", "profile", "outputs", "strips"))

    def figure(self, entry: Mapping[str, str]) -> tuple[Key, float]:
        """A line of the paper's figures → what it is of, its value."""
        metric = {"maniqa": "maniqa-pipal"}.get(entry["metric"], entry["metric"])
        return Key(float(entry["scale"]), entry["method"], entry["dataset"], metric), float(entry["value"])

    def dataset_label(self, dataset: str) -> str:
        """As the paper writes it."""
        return _DATASETS.get(dataset, dataset)

    def pivot(self, keys: Sequence[Key], columns: Sequence[Column]) -> tuple[list[str], list[Line]]:
        """(header, lines) over the scales, methods and data sets that occur."""
        datasets = [*self.datasets, *sorted({key.dataset for key in keys} - set(self.datasets))]
        measured = {(key.dataset, key.metric) for key in keys}
        grid = [(d, c) for d in datasets for c in columns if c in self.metrics or (d, c.name) in measured]
        header = [f"{self.dataset_label(dataset)} {_arrow(column)}" for dataset, column in grid]
        lines: list[Line] = []
        for scale in sorted({key.scale for key in keys}):
            for method in self._ordered({key.method for key in keys if key.scale == scale}):
                labels = [f"{scale:g}×", self.methods.get(method, method)]
                lines.append((labels, [Key(scale, method, dataset, column.name) for dataset, column in grid]))
        return ["scale", "method", *header], lines

    def _ordered(self, methods: set[str]) -> list[str]:
        known = list(self.methods)
        return sorted(methods, key=lambda m: (known.index(m) if m in known else len(known), method_order(m)))


class RuntimeLayout(Layout):
    """Table 3: scale × phase against methods."""

    def figure(self, entry: Mapping[str, str]) -> tuple[Key, float]:
        key = Key(float(entry["scale"]), entry["method"], "div2k", f"seconds_{entry['phase']}")
        return key, float(entry["seconds"])

    def pivot(self, keys: Sequence[Key], columns: Sequence[Column]) -> tuple[list[str], list[Line]]:
        methods = self._ordered({key.method for key in keys})
        lines: list[Line] = []
        for dataset in sorted({key.dataset for key in keys}):
            for scale in sorted({key.scale for key in keys}):
                for column in self.metrics:
                    labels = [f"{scale:g}×", column.label]
                    lines.append((labels, [Key(scale, method, dataset, column.name) for method in methods]))
        return ["scale", "phase", *(self.methods.get(method, method) for method in methods)], lines


class OverlapLayout(Layout):
    """Table 6: scales against region × statistic; a line per method of ours."""

    def figure(self, entry: Mapping[str, str]) -> tuple[Key, float]:
        metric = {"overlapping": "overlap_cosine", "non_overlapping": "separate_cosine"}[entry["regions"]]
        key = Key(float(entry["scale"]), "coz_vlm", "div2k", metric, entry["statistic"])
        return key, float(entry["value"])

    def pivot(self, keys: Sequence[Key], columns: Sequence[Column]) -> tuple[list[str], list[Line]]:
        grid = [(column, statistic) for column in self.metrics for statistic in self.statistics]
        rows = sorted({(key.scale, key.dataset, key.method) for key in keys})
        lines: list[Line] = []
        for scale, dataset, method in rows:
            cells = [Key(scale, method, dataset, column.name, statistic) for column, statistic in grid]
            lines.append(([f"{scale:g}×", self.methods.get(method, method)], cells))
        return ["scale", "method", *(f"{column.label} {statistic}" for column, statistic in grid)], lines


def _arrow(column: Column) -> str:
    return f"{column.label} {'↑' if column.higher_is_better else '↓'}"


_COZ = {"coz_null": "CoZ (Null)", "coz_dape": "CoZ (DAPE)", "coz_vlm": "CoZ (VLM)"}
_MAIN = {"nn": "NN Interpolation", "direct": "Direct SR", **_COZ}
_PAPER = "arXiv 2505.18600"

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("table1", f"Table 1 of {_PAPER}: no-reference metrics", _MAIN, ("coz_vlm", "direct")),
        Layout(
            "table2",
            f"Table 2 of {_PAPER}: comparison with baselines",
            {
                "liif_direct": "LIIF",
                "seesr_direct": "SeeSR",
                "s3diff_direct": "S3Diff",
                "s3diff_coz_vlm": "S3Diff + CoZ",
            },
            ("s3diff_coz_vlm", "s3diff_direct"),
        ),
        RuntimeLayout(
            "table3",
            f"Table 3 of {_PAPER}: seconds per image",
            {"direct": "Direct SR (DAPE)", **_COZ},
            ("coz_vlm", "direct"),
            metrics=(Column("seconds_sr", "SR", False), Column("seconds_pe", "PE", False)),
            datasets=("div2k",),
            marks_best=False,
            tuned=False,
            remark="SR: super-resolution, PE: prompt extraction; the paper does not name its GPU.",
        ),
        Layout("table4", f"Table 4 of {_PAPER}: the open-source OSEDiff (SD 2.1)", _MAIN, ("coz_vlm", "direct")),
        Layout(
            "table5",
            f"Table 5 of {_PAPER}: Qwen2.5-VL-7B as the critic",
            {"direct": "Direct SR", "coz_vlm": "CoZ (VLM)"},
            ("coz_vlm", "direct"),
        ),
        OverlapLayout(
            "table6",
            f"Table 6 of {_PAPER}: cosine similarity of patches",
            {"coz_vlm": "CoZ (VLM)"},
            ("coz_vlm", "coz_null"),
            metrics=(Column("overlap_cosine", "overlapping", True), Column("separate_cosine", "non-overlapping", True)),
            datasets=("div2k",),
            statistics=("mean", "median", "minimum"),
            marks_best=False,
            tuned=False,
            remark="The paper's figures beyond 4× are not this table's in its source, and are left empty. Non-overlapping: the "
            "outer halves of the same two patches.",
        ),
    )
}

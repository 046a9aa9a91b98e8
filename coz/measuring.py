"""Metrics of finished lineages as long rows; each value is kept beside the state it belongs to."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coz.metrics import CANNOT_JUDGE, Metric, Sample, Truth
from coz.stages import Failure, Lineage
from coz.store import fingerprint, write_json

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Labels:
    """What every row of a run says about it."""

    method: str
    scale: float
    dataset: str
    backbone: str
    prompter: str
    profile: str


def measure(
    lineages: Sequence[Lineage],
    failures: Sequence[Failure],
    metrics: Sequence[Metric],
    labels: Labels,
    on_value: Progress = lambda count: None,
) -> Iterator[dict[str, object]]:
    """One row per photograph and metric. A failed photograph or a value that is no number gets the metric's worst value.

    Values are kept beside the state they belong to, so that another run reads them.
    """
    for lineage in lineages:
        for metric in metrics:
            value, reason = cached_value(lineage, metric)
            value = value if not reason else metric.worst
            yield row_of(labels, lineage.photo.name, metric.name, value, metric.identity, reason, lineage.state.key)
            on_value(1)
    for failure in failures:
        for metric in metrics:
            yield row_of(labels, failure.photo, metric.name, metric.worst, metric.identity, failure.reason)


def row_of(
    labels: Labels,
    image: str,
    metric: str,
    value: float,
    identity: Mapping[str, object],
    failure: str = "",
    state: str = "",
) -> dict[str, object]:
    """One long row."""
    return {
        "image": image,
        **asdict(labels),
        "metric": metric,
        "value": value,
        "failure": failure,
        "state": state,
        "metric_identity": json.dumps(dict(identity), sort_keys=True),
    }


def cached_value(lineage: Lineage, metric: Metric) -> tuple[float, str]:
    """(value, why it failed or ""); a value is computed once and kept beside its state, a failure is tried twice."""
    sample = sample_of(lineage)
    context: dict[str, object] = {"metric": dict(metric.identity), "start": lineage.start.key, "region": list(sample.region)}
    if getattr(metric, "needs_truth", False):
        context["truth"] = lineage.truth_px
    file = lineage.state.folder / f"{metric.name}-{fingerprint(context)}.json"
    cached = _read_value(file)
    if cached is not None:
        return cached, ""
    reason = ""
    for _ in range(2):
        try:
            with _one_thread(getattr(metric, "parallel", False)):
                value = metric(sample)
        except CANNOT_JUDGE as error:
            logger.warning("%s failed on %s", metric.name, lineage.photo.name, exc_info=True)
            reason = f"{metric.name}: {error}"
            continue
        if math.isfinite(value):
            write_json(file, {"value": value})
            return value, ""
        reason = f"{metric.name} gave {value}"
    return math.nan, reason


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Sums in an order that the number of threads does not change: a worker process gives what this one would."""
    import torch

    before = torch.get_num_threads()
    if wanted and before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted and before != 1:
            torch.set_num_threads(before)


def _read_value(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["value"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def sample_of(lineage: Lineage) -> Sample:
    """The files that a metric reads for a finished lineage."""
    assert lineage.parent is not None
    assert lineage.view is not None
    region = lineage.region
    shown = (region.left, region.top, region.side)
    return Sample(
        image=lineage.state.image_path,
        parent=lineage.parent.image_path,
        view=lineage.view,
        start=lineage.start.image_path,
        region=shown,
        truth=Truth(lineage.photo.path, lineage.truth_px, shown) if lineage.truth_px else None,
    )


def row_order(row: Mapping[str, object]) -> tuple[object, ...]:
    """Sorts rows the same way whatever the order they were made in."""
    return row["method"], row["scale"], row["image"], row["metric"]

"""`python -m coz.metrics sr=FOLDER gt=FOLDER [metrics=psnr,ssim,lpips,niqe,dists] [workers=N] [out=FILE.csv]`

Two folders of pictures with equal names, compared picture by picture; the averages are printed.
"""

from __future__ import annotations

import csv
import io
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from coz.checkpoint import WeightsNotFound
from coz.data.photos import list_photos
from coz.errors import UserError
from coz.full_reference import Dists, Lpips, PsnrY, SsimY
from coz.image import View
from coz.metrics import CANNOT_JUDGE, Metric, Niqe, Sample, Truth
from coz.store import write_atomic
from coz.tables import Table

METRICS: Mapping[str, Callable[[], Metric]] = {
    "psnr": PsnrY,
    "ssim": SsimY,
    "lpips": Lpips,
    "niqe": Niqe,
    "dists": Dists,
}
_SETTINGS = ("sr", "gt", "metrics", "workers", "out")


def pair_up(sr: Path, gt: Path) -> list[tuple[str, Path, Path]]:
    """(name, picture, truth) of every picture in `sr`.

    Raises:
        UserError: a folder that is none, or a picture without its truth.
    """
    for key, folder in (("sr", sr), ("gt", gt)):
        if not folder.is_dir():
            raise UserError(f"{key}={folder} is no folder; give a folder of pictures")
    truths = {photo.name: photo.path for photo in list_photos(path=gt)}
    pictures = {photo.name: photo.path for photo in list_photos(path=sr)}
    alone = [name for name in pictures if name not in truths]
    if alone:
        raise UserError(
            f"{len(alone)} pictures of {sr} have no namesake in {gt}, the first is {alone[0]}; rename or remove them"
        )
    return [(name, path, truths[name]) for name, path in pictures.items()]


def compare(pairs: Sequence[tuple[str, Path, Path]], metrics: Sequence[Metric], *, workers: int = 0) -> list[list[float]]:
    """One list of values per pair; NaN where a metric failed, which is said on stderr.

    Args:
        workers: so many processes; 0 works in this one.
    """
    work = partial(_values, metrics=list(metrics))
    if not workers:
        return [work(pair) for pair in pairs]
    with ProcessPoolExecutor(workers, mp_context=_context()) as pool:
        return list(pool.map(work, pairs))


def _context() -> multiprocessing.context.BaseContext:
    """Forked processes inherit what took seconds to import; with threads or a GPU in use a fork could hang."""
    import torch

    forkable = "fork" in multiprocessing.get_all_start_methods()
    if not forkable or torch.cuda.is_initialized() or threading.active_count() > 1:
        return multiprocessing.get_context("spawn")
    from pyiqa.archs import niqe_arch, ssim_arch  # noqa: F401

    return multiprocessing.get_context("fork")


_KEPT: dict[str, Metric] = {}  # in a worker: metrics keep their networks from picture to picture


def _values(pair: tuple[str, Path, Path], metrics: Sequence[Metric]) -> list[float]:
    import torch

    torch.set_num_threads(1)
    name, picture, truth = pair
    whole = (0.0, 0.0, 1.0)
    sample = Sample(picture, picture, View(0, 0, 1), picture, whole, Truth(truth))
    values = []
    for metric in metrics:
        try:
            values.append(_KEPT.setdefault(metric.name, metric)(sample))
        except CANNOT_JUDGE as error:
            print(f"{name}: {metric.name} failed: {error}", file=sys.stderr)
            values.append(math.nan)
    return values


def averages(metrics: Sequence[Metric], values: Sequence[Sequence[float]], left_out: Mapping[str, str]) -> Table:
    """Means over the pictures that have a value."""
    body = []
    for metric, column in zip(metrics, np.asarray(values, dtype=np.float64).T, strict=True):
        good = column[np.isfinite(column)]
        mean = f"{good.mean():.4f}" if len(good) else "–"
        body.append([metric.label, "↑" if metric.higher_is_better else "↓", mean, str(len(good)), str(len(column) - len(good))])
    notes = [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    return Table(["metric", "", "mean", "n", "failed"], body, notes)


def main(arguments: Iterable[str]) -> None:
    """The command."""
    settings = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if key not in _SETTINGS or not equals:
            raise UserError(f"{word} is no setting; write sr=FOLDER gt=FOLDER, and any of metrics=, workers=, out=")
        settings[key] = value
    if not {"sr", "gt"} <= settings.keys():
        raise UserError("write sr=FOLDER (the results) and gt=FOLDER (the truth), as in python -m coz.metrics sr=out gt=HR")
    if not settings.get("workers", "0").isdigit():
        raise UserError(f"workers={settings['workers']} must be a whole number; 0 works in this process")
    workers = int(settings["workers"]) if "workers" in settings else None
    asked = settings.get("metrics")
    metrics, left_out = _build(asked.split(",") if asked else list(METRICS), required=asked is not None)
    pairs = pair_up(Path(settings["sr"]), Path(settings["gt"]))
    if workers is None:
        workers = (os.cpu_count() or 1) if len(pairs) > 8 else 0
    values = compare(pairs, metrics, workers=workers)
    if "out" in settings:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["image", *(metric.name for metric in metrics)])
        writer.writerows([name, *map(repr, row)] for (name, _, _), row in zip(pairs, values, strict=True))
        write_atomic(settings["out"], buffer.getvalue())
    print(averages(metrics, values, left_out).markdown())


def _build(names: Sequence[str], *, required: bool) -> tuple[list[Metric], dict[str, str]]:
    """(metrics, those left out for want of weights); with `required`, one that lacks its weights is an error."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"metric {unknown[0]} is unknown; use {', '.join(METRICS)}")
    metrics, left_out = [], {}
    for name in names:
        try:
            metrics.append(METRICS[name]())
        except WeightsNotFound as error:
            if required:
                raise
            left_out[name] = str(error)
    return metrics, left_out

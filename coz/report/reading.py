"""What a report is made of: jobs' rows and records, their chains out of the state store, times and provenance."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coz.errors import UserError
from coz.results import RECORD, Gathered, gather
from coz.stored_chains import StateFolder
from coz.tables import Row

PAPER_TABLE = Path(__file__).parents[1] / "assets" / "paper" / "table1.csv"


class NoResults(UserError):
    """A folder that holds no finished job."""


@dataclass(frozen=True)
class JobFiles:
    """What a job's folder says besides its rows; empty where a file is absent."""

    folder: Path
    config: str
    provenance: dict[str, object]
    states_computed: int
    seconds: float


@dataclass(frozen=True)
class Results:
    """Everything a report shows."""

    title: str
    jobs: tuple[JobFiles, ...]
    found: Gathered
    states: StateFolder

    @cached_property
    def done(self) -> list[Row]:
        """Rows that have a picture, in the methods' order left as it is."""
        return [row for row in self.found.rows if row["state"]]

    @cached_property
    def photos(self) -> list[str]:
        """Names of the photographs that gave a state, sorted."""
        return sorted({str(row["image"]) for row in self.done})

    def keys(self, photo: str) -> dict[tuple[str, float], str]:
        """(method, scale) → the key of a photograph's state."""
        mine = [row for row in self.done if row["image"] == photo]
        return {(str(row["method"]), float(row["scale"])): str(row["state"]) for row in mine}  # type: ignore[arg-type]


def read_results(runs: Sequence[Path], *, states: Path | None = None, title: str | None = None) -> Results:
    """The results of runs: folders of jobs, or of sweeps with a folder per job.

    Args:
        states: the state store; None looks for a folder `states` above each run, where `evaluate.py` puts it.
        title: of the report; None is the runs' names.

    Raises:
        NoResults: a folder without a finished job.
    """
    jobs = list(dict.fromkeys(job for run in runs for job in find_jobs(run)))
    root = states or next((found for job in jobs if (found := _states_above(job))), None)
    return Results(title or title_of(runs), tuple(map(_read_job, jobs)), gather(jobs), StateFolder(root))


def title_of(runs: Sequence[Path]) -> str:
    """The runs' names."""
    return ", ".join(run.resolve().name for run in runs)


def find_jobs(run: Path) -> list[Path]:
    """The finished jobs of a run.

    Raises:
        NoResults: there is none.
    """
    if (run / RECORD).is_file():
        return [run]
    jobs = sorted((file.parent for file in run.glob(f"job_*/{RECORD}")), key=lambda job: (len(job.name), job.name))
    if not jobs:
        why = "holds no finished job (job.json)" if run.is_dir() else "does not exist"
        raise NoResults(f"{run} {why}; give the folder that evaluate.py named, as in outputs/evaluate/2026-01-31_12-00-00")
    return jobs


def _states_above(job: Path) -> Path | None:
    return next((folder / "states" for folder in job.resolve().parents if (folder / "states").is_dir()), None)


def _read_job(folder: Path) -> JobFiles:
    timing = _read_json(folder / "timing.json")
    config = folder / "config.yaml"
    return JobFiles(
        folder=folder,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        provenance=_read_json(folder / "provenance.json"),
        states_computed=int(timing.get("states_computed", 0)),
        seconds=float(timing.get("seconds", 0.0)),
    )


def _read_json(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def paper_values(labels: Iterable[tuple[float, str]], metrics: Sequence[str]) -> list[dict[str, str]]:
    """Rows of the paper's Table 1 at the scales and methods of a run, where the run has one of its metrics."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    with PAPER_TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            key = (row["scale"], row["method"], row["dataset"].upper())
            line = lines.setdefault(key, dict(zip(("scale", "method", "dataset"), key, strict=True)))
            line[row["metric"]] = row["value"]
    if not any(set(metrics) & set(line) for line in lines.values()):
        return []
    wanted = {(f"{scale:g}", method.split("[")[0]) for scale, method in labels}
    return [line for line in lines.values() if (line["scale"], line["method"]) in wanted]

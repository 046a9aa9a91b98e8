"""`python -m coz.report RUN…`: one page about some runs of evaluate.py, and of train_grpo.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from coz.errors import UserError, exit_code
from coz.report.page import render
from coz.report.pictures import Pictures
from coz.report.reading import read_results, title_of
from coz.store import write_atomic


def write_report(
    runs: Sequence[Path],
    *,
    out: Path,
    states: Path | None = None,
    photos: int = 6,
    ranked: int = 10,
    pictures: int = 300,
    picture_px: int = 288,
    max_mb: float = 12.0,
) -> Path:
    """Write the page about some runs. → the file.

    Args:
        runs: folders of jobs or sweeps of `evaluate.py`, and of runs of `train_grpo.py`.
        out: the HTML file.
        states: the state store; None looks above the runs.
        photos: strips of at most so many photographs.
        ranked: so many best and worst pictures by each metric.
        pictures: at most so many pictures in the page.
        picture_px: their longer side.
        max_mb: pictures are left out beyond this size of the page.

    Raises:
        UserError: a folder without results, a value out of range, a file that cannot be written.
    """
    for name, value in (("photos", photos), ("ranked", ranked), ("pictures", pictures)):
        if value < 0:
            raise UserError(f"--{name} {value} must be at least 0")
    if picture_px < 16:
        raise UserError(f"--picture-px {picture_px} must be at least 16")
    if states is not None and not states.is_dir():
        raise UserError(f"--states {states} is no folder; give the state store, such as outputs/states")
    tuned = [run for run in runs if (run / "rewards.csv").is_file()]
    results = read_results([run for run in runs if run not in tuned], states=states, title=title_of(runs))
    embedded = Pictures(results.states, limit=pictures, side_px=picture_px, quality=80, max_mb=max_mb)
    write_atomic(out, render(results, embedded, photos=photos, ranked=ranked, tuned=tuned))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 and one sentence where the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m coz.report", description="One HTML page about runs.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders that evaluate.py (a job or a sweep) or train_grpo.py wrote"
    )
    parser.add_argument("--out", type=Path, help="default: report.html in the first run")
    parser.add_argument("--states", type=Path, help="the state store; default: the folder `states` above the runs")
    parser.add_argument("--photos", type=int, default=6, help="strips of at most so many photographs (%(default)s)")
    parser.add_argument("--ranked", type=int, default=10, help="so many best and worst pictures by each metric (%(default)s)")
    parser.add_argument("--pictures", type=int, default=300, help="at most so many pictures in the page (%(default)s)")
    parser.add_argument("--picture-px", type=int, default=288, help="their longer side (%(default)s)")
    parser.add_argument("--max-mb", type=float, default=12.0, help="leave pictures out beyond this size (%(default)s)")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out") or given["runs"][0] / "report.html"

    def write() -> None:
        path = write_report(out=out, **given)
        print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())

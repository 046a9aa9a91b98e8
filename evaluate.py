"""Evaluate a method at a scale: states, metrics, table, strips; or its running time, or the agreement of its overlaps.

`python evaluate.py --help` lists the settings, conf/experiment/ the tables of the paper.
"""

from __future__ import annotations

import os

# A CPU that spins in OpenMP's barriers starves the other process of a two-core machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from omegaconf import DictConfig

from coz import cli, jobs


def main(_: DictConfig) -> None:
    """One job; a sweep calls it once per combination and tabulates at its end."""
    job = jobs.open_job("evaluate")
    with job.refusals_noted():
        photos = jobs.list_photos(job)
        parts = jobs.build_parts(job, photos)
        rows = parts.task(job, parts, photos)
        jobs.save(job, parts, photos, rows)
    if not job.in_sweep:
        jobs.publish(job)


if __name__ == "__main__":
    cli.run(main, config_name="evaluate")

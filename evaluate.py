"""Evaluate a method at a scale: states, metrics, table, strips. `python evaluate.py --help` lists the settings."""

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
        lineages, failures = jobs.make_states(job, parts, photos)
        rows = jobs.measure_states(job, parts, lineages, failures)
        jobs.save(job, parts, photos, rows)
    if not job.in_sweep:
        jobs.publish(job)


if __name__ == "__main__":
    cli.run(main, config_name="evaluate")

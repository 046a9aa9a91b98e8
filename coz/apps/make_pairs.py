"""Make the states of chains that `train_grpo.py pairs=chain` trains on; `--help` lists the settings."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from omegaconf import DictConfig

from coz import cli, pair_jobs


def main(_: DictConfig) -> None:
    """States from the store or computed into it, then an index of the pairs that lie in them."""
    job = pair_jobs.open_job("make_pairs")
    parts = pair_jobs.build_parts(job)
    lineages = pair_jobs.make_states(job, parts)
    pair_jobs.write_index(job, parts, lineages)


if __name__ == "__main__":
    cli.run(main, config_name="make_pairs")

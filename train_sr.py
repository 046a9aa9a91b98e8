"""Train a super-resolution backbone. `python train_sr.py --help` lists the settings; the same command again goes on."""

from __future__ import annotations

import os
import sys

# A CPU that spins in OpenMP's barriers starves the other process of a two-core machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get("RANK", "0") != "0":  # only the first process writes into the run's folder
    os.environ["COZ_RANK_FOLDER"] = f".ranks/{os.environ['RANK']}"

from omegaconf import DictConfig

from coz import cli
from coz.training import jobs

STOPPED = 143  # what a shell reports of a process that SIGTERM ended


def main(_: DictConfig) -> None:
    config = cli.resolve("train_sr")
    run = jobs.open_run(config)
    if not jobs.train(run):
        sys.exit(STOPPED)
    settings = jobs.write_result(run)
    jobs.report(run, settings)


if __name__ == "__main__":
    cli.run(main, config_name="train_sr")

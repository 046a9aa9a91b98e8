"""Tune the prompt extractor with GRPO (section 3.3). `python train_grpo.py --help` lists the settings."""

from __future__ import annotations

import os

# A CPU that spins in OpenMP's barriers starves the other process of a two-core machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from omegaconf import DictConfig

from coz import cli, grpo_jobs


def main(_: DictConfig) -> None:
    """Parts checked before weights load; the critic loads before TRL's arguments exist, which under ZeRO-3 would cut it up."""
    run = grpo_jobs.open_run("train_grpo")
    parts = grpo_jobs.build_parts(run)
    model, processor = grpo_jobs.load_models(run, parts)
    trainer = grpo_jobs.make_trainer(run, parts, model, processor)
    grpo_jobs.train(run, parts, trainer)


if __name__ == "__main__":
    cli.run(main, config_name="train_grpo")

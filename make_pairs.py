"""Make the states of chains that `train_grpo.py pairs=chain` trains on. `python make_pairs.py --help` lists the settings."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from omegaconf import DictConfig

from coz import cli


def main(_: DictConfig) -> None:
    """States from the store or computed into it, then an index of the pairs that lie in them."""
    from coz.training import chain_states

    job = chain_states.open_job("make_pairs")
    parts = chain_states.build_parts(job)
    lineages = chain_states.make_states(job, parts)
    chain_states.write_index(job, parts, lineages)


if __name__ == "__main__":
    cli.run(main, config_name="make_pairs")

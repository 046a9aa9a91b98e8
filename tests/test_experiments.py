"""Every experiment of conf/experiment in small: all its methods on one photograph at one scale, random weights, its table."""

from __future__ import annotations

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from coz import cli, jobs
from coz.jobs import Job
from coz.paper_layouts import LAYOUTS
from coz.paper_tables import entries_of, publish_table, read_runs

SMALL = [
    *("profile=tiny", "dataset=div2k", "dataset.names=[cat]", "scale=4", "chain.start_px=192", "strips=0", "task.warmup=0"),
    *("profile.diffusion_steps=1", "backbone.process_px=192", "prompter.image_px=96", "prompter.max_new_tokens=4"),
    *("prompter.cache_dir=null", "engine.metric_workers=0", "batch_size=1"),
]


@pytest.fixture(scope="module", autouse=True)
def initialised():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield


def _run_job(folder, overrides):
    """What `evaluate.py` does in a job of a sweep."""
    config = cli.resolve_overrides(overrides, config_name="evaluate", sweep=True)
    job = Job(config, folder, in_sweep=True, overrides=overrides)
    with job.refusals_noted():
        photos = jobs.list_photos(job)
        parts = jobs.build_parts(job, photos)
        jobs.save(job, parts, photos, parts.task(job, parts, photos))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_experiment_ends_in_its_table(tmp_path, name):
    swept = OmegaConf.load(cli.CONF / "experiment" / f"{name}.yaml").hydra.sweeper.params
    small = [o for o in SMALL if name == "table3" or not o.startswith("task.")]
    fixed = [f"{key}={value}" for key, value in swept.items() if key not in ("method", "dataset", "scale")]
    folders = []
    for method in swept.method.split(","):
        folders.append(tmp_path / f"job_{method}")
        overrides = [f"+experiment={name}", *small, *fixed, f"method={method}", f"outputs={tmp_path}"]
        _run_job(folders[-1], overrides)
    text, layout = publish_table(name, folders, tmp_path), LAYOUTS[name]
    ours = {key: entry for key, entry in entries_of(layout, read_runs(folders)).items() if entry.n}
    assert {key.method for key in ours} == set(layout.methods)
    assert any(entry.difference == entry.difference for entry in ours.values())  # the paper's stands beside it
    for part in ("RANDOM weights", "stand in for DIV2K", "| paper ", "ours − paper", *layout.methods.values()):
        assert part in text, part
    assert ("seesr in 1 steps" in text) == (name == "table2")

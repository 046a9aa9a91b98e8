"""Running time and overlaps, by fakes whose answers are known."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from coz import cli, jobs
from coz.chain import StepSettings
from coz.data.photos import list_photos
from coz.engines.local import LocalEngine
from coz.errors import UserError
from coz.evaluation import Plan, plan_for
from coz.image import resize
from coz.jobs import Job, Parts
from coz.prompters.base import Prompt
from coz.tables import Refusal
from coz.tasks import Overlap, Runtime

START_PX = 64


class Slow:
    """Bicubic after 40 ms; the first call of all takes long, as a first call does."""

    reads_prompts = False
    fingerprint = {"name": "slow", "weights": None}

    def __init__(self, seconds=0.04, first=0.5):
        self.seconds, self.first, self.calls, self.loaded = seconds, first, 0, 0

    def load(self):
        self.loaded += 1

    def __call__(self, lr, *, size, prompts=None, seeds=None):
        self.calls += 1
        time.sleep(self.first if self.calls == 1 else self.seconds)
        return resize(lr, size)


class SlowPrompter(Slow):
    def __call__(self, current, context, *, seeds=None):
        self.calls += 1
        time.sleep(self.seconds)
        return [Prompt("a cat")] * len(current)


@pytest.fixture(scope="module", autouse=True)
def initialised():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield


@pytest.fixture
def photos(tmp_path):
    y, x = np.mgrid[0:90, 0:120]
    (tmp_path / "photos").mkdir()
    for index in range(3):
        array = np.stack([x * 2, y * 2 + index, (x + y) % 256], axis=-1).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / "photos" / f"{index}.png")
    return list_photos(path=tmp_path / "photos")


def _job(tmp_path, scale, *overrides):
    config = cli.resolve_overrides(
        ["profile=tiny", "method=coz_null", f"scale={scale}", f"outputs={tmp_path}", *overrides],
        config_name="evaluate",
        sweep=True,
    )
    return Job(config, tmp_path, in_sweep=True, overrides=[])


def _parts(scale, backbone, prompter, task, **options):
    settings = StepSettings(backbone=backbone, prompter=prompter)
    plan = Plan(factors=plan_for(mode="chain", scale=scale, max_factor=4, start_px=START_PX), start_px=START_PX, **options)
    return Parts(backbone, prompter, [], plan, task, settings, LocalEngine(metric_workers=0))


def test_phases_are_timed_apart_and_the_warm_up_is_left_out(tmp_path, photos):
    backbone, prompter = Slow(0.04), SlowPrompter(0.08)
    task = Runtime(warmup=1)
    rows = task(_job(tmp_path, 16), _parts(16, backbone, prompter, task), photos)
    sr = [row["value"] for row in rows if row["metric"] == "seconds_sr"]
    pe = [row["value"] for row in rows if row["metric"] == "seconds_pe"]
    assert len(sr) == len(pe) == 3
    assert backbone.calls == prompter.calls == 2 * (1 + 3)  # two steps; the warm-up and three photographs
    assert backbone.loaded == prompter.loaded == 1
    assert all(0.08 <= value < 0.4 for value in sr), sr  # two steps each, and never the slow first call
    assert all(0.16 <= value < 0.5 for value in pe), pe
    assert not (tmp_path / "states").exists()  # nothing from the store, nothing into it
    assert task(_job(tmp_path, 16), _parts(16, backbone, prompter, task), photos)
    assert backbone.calls == 2 * 8


def test_a_photograph_that_cannot_be_timed_is_left_out(tmp_path, photos):
    task = Runtime(warmup=0)
    data = photos[1].path.read_bytes()
    photos[1].path.write_bytes(data[: len(data) // 2])
    rows = task(_job(tmp_path, 4), _parts(4, Slow(0), SlowPrompter(0), task), photos)
    assert {row["image"] for row in rows} == {"0", "2"}
    for photo in photos:
        photo.path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3"):
        task(_job(tmp_path, 4), _parts(4, Slow(0), SlowPrompter(0), task), photos)
    with pytest.raises(UserError, match=r"task\.warmup=-1"):
        Runtime(warmup=-1)


def test_prompts_are_asked_anew_where_time_is_measured(tmp_path):
    job = _job(tmp_path, 4, "method=coz_vlm", "task=runtime", "dataset.limit=1")
    assert job.config.prompter.cache_dir
    jobs.build_parts(job, jobs.list_photos(job))
    assert job.config.prompter.cache_dir is None
    job = _job(tmp_path, 4, "method=coz_vlm", "dataset.limit=1")
    jobs.build_parts(job, jobs.list_photos(job))
    assert job.config.prompter.cache_dir


@pytest.mark.parametrize("scale", [4, 16])
def test_overlapping_halves_agree_and_others_do_not(tmp_path, photos, scale):
    task = Overlap()
    job = _job(tmp_path, scale)
    job.refusals.append(Refusal("no weights", metric="musiq"))
    rows = task(job, _parts(scale, Slow(0, 0), SlowPrompter(0), task), photos)
    values = {name: [row["value"] for row in rows if row["metric"] == name] for name in Overlap.names}
    assert len(values["overlap_cosine"]) == 3
    # Bicubic chains know nothing of each other's surroundings, and still agree but for the borders.
    assert min(values["overlap_cosine"]) > 0.999
    assert max(values["overlap_cosine"]) <= 1 + 1e-9
    for apart, over in zip(values["separate_cosine"], values["overlap_cosine"], strict=True):
        assert apart < over
    assert not job.refusals  # a metric that this task does not take is no empty column


def test_the_left_patch_is_the_papers(tmp_path, photos):
    from coz.evaluation import StateMaker
    from coz.store import StateStore

    task, backbone = Overlap(), Slow(0, 0)
    parts = _parts(16, backbone, SlowPrompter(0), task)
    task(_job(tmp_path, 16), parts, photos)
    calls = backbone.calls
    maker = StateMaker(store=StateStore(tmp_path / "states"), settings=parts.settings, plan=parts.plan)
    lineages = maker.run(photos)
    assert backbone.calls == calls  # the chain at the centre is stored already
    assert [lineage.region.side for lineage in lineages] == [1 / 16] * 3


def test_unlike_halves_are_seen(tmp_path, photos):
    class Noisy(Slow):
        """Every picture it makes is new."""

        def __call__(self, lr, *, size, prompts=None, seeds=None):
            import torch

            noise = [torch.rand(3, *size, generator=torch.Generator().manual_seed(seed + self.calls)) for seed in seeds]
            self.calls += 1
            return torch.stack(noise)

    task = Overlap()
    rows = task(_job(tmp_path, 4), _parts(4, Noisy(), SlowPrompter(0), task), photos)
    assert all(0.6 < row["value"] < 0.9 for row in rows), rows  # uniform noise: 3/4


def test_half_a_pixel_cannot_be_shifted_by(tmp_path, photos):
    task = Overlap()
    with pytest.raises(UserError, match="scale=64"):
        task(_job(tmp_path, 64), _parts(64, Slow(0, 0), SlowPrompter(0), task), photos)


def test_a_failed_side_is_a_failed_pair(tmp_path, photos):
    data = photos[1].path.read_bytes()
    photos[1].path.write_bytes(data[: len(data) // 2])
    task = Overlap()
    rows = task(_job(tmp_path, 4), _parts(4, Slow(0, 0), SlowPrompter(0), task), photos)
    failed = [row for row in rows if row["failure"]]
    assert {row["image"] for row in failed} == {"1"}
    assert {row["value"] for row in failed} == {0.0}


# ---------------------------------------------------------------------------------------------------------------------
# a job's reference


def test_photographs_too_small_for_the_reference_are_skipped_by_name(tmp_path):
    for name, side in (("large", 600), ("small", 300)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / f"{name}.png")
    folder = ["dataset=folder", f"dataset.path={tmp_path}", "reference.reduce=8", "reference.start_px=64"]
    job = _job(tmp_path, 4, *folder)
    assert [photo.name for photo in jobs.list_photos(job)] == ["large"]
    assert job.skipped == ["small"]
    with pytest.raises(UserError, match="2048 px"):
        jobs.list_photos(_job(tmp_path, 4, *folder, "reference.start_px=256"))
    for wrong in ("reference.reduce=1", "reference.start_px=1000"):
        with pytest.raises(UserError, match=wrong):
            jobs.list_photos(_job(tmp_path, 4, *folder, wrong))


@pytest.mark.parametrize(
    ("scale", "reference", "left_out"),
    [(4, [], "no truth"), (4, ["reference.reduce=2"], "beyond 2×"), (2, ["reference.reduce=2"], "")],
)
def test_full_reference_metrics_are_taken_where_there_is_a_truth(tmp_path, scale, reference, left_out):
    job = _job(tmp_path, scale, "metrics=reference", "~metrics.dists", "dataset.limit=1", "reference.start_px=64", *reference)
    parts = jobs.build_parts(job, jobs.list_photos(job))
    names = [metric.name for metric in parts.metrics]
    assert ("psnr" in names) == (not left_out)
    assert "niqe" in names
    reasons = {refusal.metric: refusal.reason for refusal in job.refusals}
    assert ("psnr" in reasons) == bool(left_out)
    if left_out:
        assert left_out in reasons["psnr"]
        assert ("psnr", "PSNR (Y)") in [(column.name, column.label) for column in job.left_out]


def test_settings_are_what_titles_need(tmp_path):
    setting = jobs.setting_of(_job(tmp_path, 4, "method=coz_vlm", "dataset=div2k").config)
    assert setting["stands_for"] == "div2k"
    assert setting["tuning"] == "untuned"
    tuned = jobs.setting_of(_job(tmp_path, 4, "method=coz_vlm", "prompter.adapter=outputs/x").config)
    assert tuned["tuning"] == "outputs/x"
    assert dataclasses.asdict(jobs.labels_of(_job(tmp_path, 4).config))["method"] == "coz_null"
    assert Path(cli.CONF).is_dir()

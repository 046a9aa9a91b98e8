"""The loop: exact resumption, stopping, bad input, and what it keeps, with a net that trains in milliseconds."""

from __future__ import annotations

import csv
import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from coz.data.crops import Manifest, Stage, TooManyUnreadable, validation_crops
from coz.data.degradation import Bicubic, RealESRGAN
from coz.errors import UserError
from coz.store import CannotWrite
from coz.training.checkpoints import Checkpoints, OtherRun
from coz.training.loop import NotFinite, Run
from coz.training.schedule import Schedule
from coz.training.trainee import Batch, Outcome
from coz.training.validation import Validation, paired_gain


class Sharpener(nn.Module):
    """A convolution that starts at black."""

    enlarged = True

    def load(self) -> None:
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)
        self.fail_at: set[int] = set()

    def trained(self):
        return {"generator": dict(self.net.named_parameters())}

    def forward(self, batch: Batch) -> Outcome:
        image = self.net(batch.lq) + 0.01 * torch.randn_like(batch.lq)  # a draw of the global generator, as dropout's
        loss = (image - batch.hr).square().mean()
        if self.fail_at.intersection(batch.indices):
            loss = loss * float("nan")
        return Outcome(loss, {"l2": loss.detach()})

    @torch.no_grad()
    def restore(self, lq, *, prompts, seeds):
        return self.net(lq).clamp(0, 1)

    def write(self, folder: Path):
        (folder / "net.txt").write_text(str(self.net.bias.sum().item()))
        return {"weights": str(folder)}

    def write_released(self, folder: Path) -> None: ...


class Normed(Sharpener):
    """With a batch norm, whose statistics are no parameters."""

    def load(self) -> None:
        super().load()
        self.norm = nn.BatchNorm2d(3, affine=False)

    def forward(self, batch: Batch) -> Outcome:
        image = self.net(self.norm(batch.lq))
        loss = (image - batch.hr).square().mean()
        return Outcome(loss, {"l2": loss.detach()})


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(5):
        low = numbers.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(low).resize((112, 96), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def make_run(
    folder: Path, photos: Path, *, limit_steps: int = 6, identity=None, deepspeed=None, net=Sharpener, prompts=None, **settings
) -> Run:
    schedule = Schedule(
        stages=[
            Stage(steps=4, degradation=RealESRGAN(engine="fast")),
            Stage(steps=limit_steps - 4, degradation=Bicubic()),
        ],
        **{
            "crop_px": 64,
            "batch_size": 2,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "ema_decay": 0.5,
            "validate_every": 3,
            "save_every": 2,
            "log_every": 1,
            **settings,
        },
    )
    training, held = Manifest(paths=[str(photos)], hold_out=1).split()
    trainee = net()
    trainee.load()
    crops = validation_crops(held, count=2, size_px=64, seed=0)
    validation = Validation(*map(list, zip(*crops, strict=True)), Bicubic(), 0, True)
    validation._load_lpips = lambda: None  # half of a test's time
    return Run(
        trainee=trainee,
        accelerator=Accelerator(cpu=True),
        schedule=schedule,
        photos=training,
        prompts=prompts,
        validation=validation,
        checkpoints=Checkpoints(folder / "checkpoints", identity or {"seed": 0}, keep=2),
        folder=folder,
        seed=0,
        deepspeed=deepspeed,
    )


def weights_of(run: Run) -> list[torch.Tensor]:
    moments = [value for state in run.stepping.state()["state"].values() for value in state.values()]
    return [*run.trainee.net.state_dict().values(), *run.average.state()["values"].values(), *moments]


def rows_of(run: Run) -> list[dict]:
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(open(run.folder / "log.csv"))]


def stop_at(run: Run, step: int) -> None:
    run.on_step = lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == step else None


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, photos, step):
    whole = make_run(tmp_path / "whole", photos)
    assert whole.run()
    first = make_run(tmp_path / "parts", photos)
    stop_at(first, step)
    assert not first.run()  # SIGTERM: a checkpoint is written first
    torch.manual_seed(1234)
    second = make_run(tmp_path / "parts", photos)
    assert second.run()
    for a, b in zip(weights_of(whole), weights_of(second), strict=True):
        assert torch.equal(a, b)
    assert rows_of(whole) == rows_of(second)
    assert whole.validation_log.rows() == second.validation_log.rows()


def test_the_statistics_of_batch_norms_are_kept(tmp_path, photos):
    whole = make_run(tmp_path / "whole", photos, net=Normed)
    assert whole.run()
    first = make_run(tmp_path / "parts", photos, net=Normed)
    stop_at(first, 3)
    first.run()
    second = make_run(tmp_path / "parts", photos, net=Normed)
    second.run()
    assert whole.trainee.norm.num_batches_tracked == 12
    for a, b in zip(whole.trainee.state_dict().values(), second.trainee.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_validation_reads_the_prompts_of_its_photographs(tmp_path, photos):
    seen = []

    class Reader(Sharpener):
        def restore(self, lq, *, prompts, seeds):
            seen.extend(prompts)
            return super().restore(lq, prompts=prompts, seeds=seeds)

    def prompts(hr, paths, seeds):
        return [path.name for path in paths]

    run = make_run(tmp_path, photos, net=Reader, prompts=prompts)
    run.run()
    held = run.validation.photos[0].name
    assert held not in {path.name for path in run.photos}
    assert set(seen) == {held}


def test_rows_beyond_the_last_checkpoint_are_logged_again(tmp_path, photos):
    """A SIGKILL after step 3 leaves the checkpoint of step 2."""

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 3:
            raise Killed

    first = make_run(tmp_path / "parts", photos, validate_every=100)
    first.on_step = kill
    with pytest.raises(Killed):
        first.run()
    second = make_run(tmp_path / "parts", photos, validate_every=100)
    assert second.run()
    whole = make_run(tmp_path / "whole", photos, validate_every=100)
    whole.run()
    assert rows_of(second) == rows_of(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole), weights_of(second), strict=True))


def test_it_learns_and_keeps_the_last_and_the_best(tmp_path, photos):
    run = make_run(tmp_path, photos, limit_steps=40, learning_rate=3e-2, validate_every=10)
    assert run.run()
    rows = run.validation_log.rows()
    start, end = ([float(row["psnr"]) for row in rows if row["step"] == step] for step in ("0", "40"))
    gain = paired_gain(start, end, "psnr")
    assert gain.mean > 3
    assert set(run.checkpoints.steps()) == {38, 40, run.checkpoints.best_step()}
    assert (run.checkpoints.folder(40) / "net.txt").is_file()
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir())[-1] == "step_00000040.png"


def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run(tmp_path, photos):
    run = make_run(tmp_path, photos, max_skipped=2)
    run.trainee.fail_at = {0}
    assert run.run()
    assert run.progress.skipped == 1
    assert all(torch.isfinite(x).all() for x in weights_of(run))

    bad = make_run(tmp_path / "bad", photos, max_skipped=2)
    bad.trainee.fail_at = {5, 9}  # of steps 1 and 2
    with pytest.raises(NotFinite, match="2 steps in a row"):
        bad.run()
    assert torch.load(tmp_path / "bad" / "not_finite_0.pt", weights_only=True)["indices"] == [8, 9]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, photos):
    make_run(tmp_path, photos, identity={"seed": 0, "training": {"rate": 1}}).run()
    with pytest.raises(OtherRun, match=r"training\.rate: 1, now 2"):
        make_run(tmp_path, photos, identity={"seed": 0, "training": {"rate": 2}}).run()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, photos, monkeypatch):
    run = make_run(tmp_path, photos)
    stop_at(run, 2)
    run.run()
    before = (run.checkpoints.folder(2) / "state.pt").read_bytes()

    def full(path, data):
        Path(path).write_bytes(bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("coz.training.checkpoints._write_synced", full)
    with pytest.raises(CannotWrite, match="disk is full"):
        make_run(tmp_path, photos).run()
    assert run.checkpoints.steps() == [2]
    assert (run.checkpoints.folder(2) / "state.pt").read_bytes() == before
    monkeypatch.undo()
    assert make_run(tmp_path, photos).run()


def test_unreadable_photographs_are_listed_and_too_many_end_the_run(tmp_path, photos):
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:200])
    run = make_run(tmp_path, photos)
    with pytest.raises(TooManyUnreadable, match="more than 1 %"):
        run.run()
    assert "1.png" in (tmp_path / "unreadable_0.txt").read_text()


def test_a_few_unreadable_photographs_are_replaced(tmp_path, photos, monkeypatch):
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:200])
    monkeypatch.setattr("coz.training.loop.UNREADABLE_SHARE", 0.5)
    run = make_run(tmp_path, photos)
    assert run.run()
    assert run.progress.unreadable == [str(photos / "1.png")]


def test_manifests(tmp_path, photos):
    listing = tmp_path / "list.txt"
    listing.write_text("photos/0.png\n# a comment\nphotos/1.png\n\n")
    assert [path.name for path in Manifest(paths=[str(listing)]).split()[0]] == ["0.png", "1.png"]
    listing.write_text("photos/0.png\nphotos/none.png\n")
    with pytest.raises(UserError, match=r"do not exist: .*none\.png"):
        Manifest(paths=[str(listing)]).split()
    with pytest.raises(UserError, match="hold_out=5"):
        Manifest(paths=[str(photos)], hold_out=5).split()
    few, held = Manifest(paths=[str(photos)], hold_out=2).split()
    assert len(few) == 3
    assert not set(few) & set(held)


def test_a_training_keeps_at_least_its_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match="keep=0"):
        Checkpoints(tmp_path, {}, keep=0)

"""Every engine gives the same states and rows, whatever is killed on the way."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coz import metric_workers
from coz.chain import StepSettings
from coz.data.photos import list_photos
from coz.engines.base import Work
from coz.engines.local import LocalEngine
from coz.errors import UserError
from coz.evaluation import Plan
from coz.image import resize
from coz.measuring import Labels, measure, row_order
from coz.metric_workers import MetricWorkers, workers_for
from coz.metrics import ConsistencyInput, ConsistencyStep, Niqe
from coz.prompters.base import Prompt
from coz.tables import rows_to_csv

LABELS = Labels(method="coz_null", scale=16, dataset="folder", backbone="fake", prompter="fake", profile="embedded")
START_PX = 192


class Brighter:
    """Bicubic and a little brighter the longer the prompt; slow enough to be killed; leaves a note of each call."""

    reads_prompts = True

    def __init__(self, *, notes: str | None = None, seconds: float = 0.0, breaks_on: str = "") -> None:
        self._notes, self._seconds, self._breaks_on = notes, seconds, breaks_on

    @property
    def fingerprint(self):
        return {"name": "brighter", "weights": None}

    def load(self):
        pass

    def __call__(self, lr, *, size, prompts=None, seeds=None):
        if self._notes:
            (Path(self._notes) / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(self._seconds)
        if self._breaks_on and any(self._breaks_on in prompt for prompt in prompts):
            raise RuntimeError("the net broke")
        shift = [len(prompt) / 1000 for prompt in prompts]
        return (resize(lr, size) + resize(lr, size).new_tensor(shift)[:, None, None, None]).clamp(0, 1)


class Counter:
    """Says how bright the view is, in as many letters, with its own words kept as raw."""

    fingerprint = {"name": "counter", "weights": None}

    def load(self):
        pass

    def __call__(self, current, context, *, seeds=None):
        return [Prompt("a" * round(float(image.mean()) * 20), f"raw {float(image.mean()):.3f}") for image in current]


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(5):
        array = generator.integers(0, 60 + 40 * index, (200, 220, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "photos" / f"{index}.png")
    return list_photos(path=tmp_path / "photos")


def _work(tmp_path, photos, name, *, batch_size=2, steps=2, **backbone):
    node = {"_target_": "tests.test_engines.Brighter", **backbone}
    return Work(
        photos=photos,
        states=tmp_path / name / "states",
        plan=Plan(factors=[4.0] * steps, start_px=START_PX, batch_size=batch_size),
        settings=StepSettings(backbone=Brighter(**backbone), prompter=Counter()),
        metrics=[Niqe(), ConsistencyStep(), ConsistencyInput()],
        nodes={"backbone": node, "prompter": {"_target_": "tests.test_engines.Counter"}},
    )


def _rows(work, outcome):
    return rows_to_csv(sorted(measure(outcome.lineages, outcome.failures, work.metrics, LABELS), key=row_order))


def _bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and ".locks" not in p.parts}


def test_workers_change_no_byte(tmp_path, photos):
    alone = _work(tmp_path, photos, "alone")
    rows = _rows(alone, LocalEngine(metric_workers=0).run(alone))
    beside = _work(tmp_path, photos, "beside")
    outcome = LocalEngine(metric_workers=1).run(beside)
    # NIQE was measured beside the chain; the rest is the main process's.
    values = [p.name.split("-")[0] for p in (tmp_path / "beside").rglob("*-*.json")]
    assert values == ["niqe"] * len(photos)
    assert _rows(beside, outcome) == rows
    assert _bytes(tmp_path / "alone") == _bytes(tmp_path / "beside")


class Deadly(ConsistencyStep):
    """Kills the process that measures, unless it is this one."""

    parallel = True

    def __init__(self, home: int) -> None:
        self._home = home

    def __call__(self, sample):
        if os.getpid() != self._home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(sample)


def test_a_killed_metric_worker_costs_nothing_but_time(tmp_path, photos):
    work = _work(tmp_path, photos, "killed")
    outcome = LocalEngine(metric_workers=0).run(work)
    metric = Deadly(os.getpid())
    workers = MetricWorkers(1, [metric])
    workers.submit(outcome.lineages)
    workers.wait()
    rows = list(measure(outcome.lineages, [], [metric], LABELS))
    assert len(rows) == len(photos)
    assert not any(row["failure"] for row in rows)


def test_an_interruption_cancels_what_was_to_be_measured(tmp_path, photos, monkeypatch):
    futures = []

    class Pool:
        def submit(self, *work):
            futures.append(Future())
            return futures[-1]

    monkeypatch.setattr(metric_workers, "_pool", lambda count: Pool())

    class Interrupted(Brighter):
        def __call__(self, lr, **options):
            if futures:
                raise KeyboardInterrupt
            return super().__call__(lr, **options)

    work = _work(tmp_path, photos, "interrupted")
    settings = StepSettings(backbone=Interrupted(), prompter=Counter())
    with pytest.raises(KeyboardInterrupt):
        LocalEngine(metric_workers=1).run(dataclasses.replace(work, settings=settings))
    assert futures
    assert all(future.cancelled() for future in futures)


def test_few_values_are_not_worth_a_process():
    assert workers_for(None, 4) == 0
    assert workers_for(None, 4000) >= 1
    assert workers_for(3, 4) == 3
    with pytest.raises(UserError, match="metric_workers=-1"):
        LocalEngine(metric_workers=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Ray


@pytest.fixture(scope="module")
def ray_engine():
    pytest.importorskip("ray")
    from coz.engines.ray import RayEngine

    root = str(Path(__file__).resolve().parents[1])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    yield RayEngine(
        prompter={"workers": 2, "cpus": 0.1},
        backbone={"workers": 2, "cpus": 0.1},
        metrics={"workers": 1, "cpus": 0.1},
        environment=environment,
    )
    import ray

    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path, photos, ray_engine):
    local, distributed = _work(tmp_path, photos, "local"), _work(tmp_path, photos, "ray")
    rows = _rows(local, LocalEngine(metric_workers=0).run(local))
    outcome = ray_engine.run(distributed)
    assert _rows(distributed, outcome) == rows
    assert _bytes(tmp_path / "local") == _bytes(tmp_path / "ray")
    again = ray_engine.run(distributed)
    assert again.timing.states == 0
    assert _rows(distributed, again) == rows


@pytest.mark.slow
def test_ray_survives_a_killed_worker(tmp_path, photos, ray_engine):
    notes = tmp_path / "notes"
    notes.mkdir()
    local = _work(tmp_path, photos, "local", steps=1)
    rows = _rows(local, LocalEngine(metric_workers=0).run(local))
    work = _work(tmp_path, photos, "killed", batch_size=1, steps=1, notes=str(notes), seconds=1.0)
    killed, over = [], threading.Event()

    def strike():
        """Kill the first worker that takes a note, while it works."""
        while not over.wait(timeout=0.02) and not killed:
            for note in list(notes.iterdir())[:1]:
                killed.append(int(note.name.split("-")[0]))
                os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        outcome = ray_engine.run(work)
    finally:
        over.set()
        thread.join()
    assert killed
    assert [lineage.photo.name for lineage in outcome.lineages] == [photo.name for photo in photos]
    assert _rows(work, outcome) == rows


@pytest.mark.slow
def test_ray_lists_what_fails(tmp_path, photos, ray_engine):
    local = _work(tmp_path, photos, "local")
    LocalEngine(metric_workers=0).run(local)
    prompts = [len(lineage.state.meta["prompt"]) for lineage in LocalEngine().run(local).lineages]
    work = _work(tmp_path, photos, "failing", breaks_on="a" * max(prompts))
    outcome, expected = ray_engine.run(work), LocalEngine().run(_work(tmp_path, photos, "too", breaks_on="a" * max(prompts)))
    assert [failure.photo for failure in outcome.failures] == [failure.photo for failure in expected.failures] != []
    assert "the net broke" in outcome.failures[0].reason
    assert [lineage.photo.name for lineage in outcome.lineages] == [lineage.photo.name for lineage in expected.lineages]

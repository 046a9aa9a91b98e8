"""States are computed once, whatever is asked of them and however often the run is killed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from coz.chain import StepSettings
from coz.data.photos import list_photos
from coz.errors import UserError
from coz.evaluation import Plan, StateMaker, plan_for
from coz.image import resize
from coz.measuring import Labels, measure, row_order
from coz.metrics import ConsistencyInput, ConsistencyStep
from coz.prompters.null import NullPrompter
from coz.store import StateStore
from coz.tables import rows_to_csv

START_PX = 64


class Counting:
    """Bicubic, counting images; fails on the photographs named in `fails`."""

    reads_prompts = False

    def __init__(self, version=1):
        self.count, self.version, self.broken = 0, version, set()

    @property
    def fingerprint(self):
        return {"name": "counting", "weights": None, "version": self.version}

    def load(self):
        pass

    def __call__(self, lr, *, size, prompts=None, seeds=None):
        self.count += len(lr)
        if any(round(float(image.mean()), 3) in self.broken for image in lr):
            raise RuntimeError("the net broke")
        return resize(lr, size)


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(generator.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    return list_photos(path=tmp_path / "photos")


def _run(store, photos, backbone, scale, *, mode="chain", **options):
    factors = plan_for(mode=mode, scale=scale, max_factor=4, start_px=START_PX)
    plan = Plan(factors=factors, start_px=START_PX, **options)
    settings = StepSettings(backbone=backbone, prompter=NullPrompter())
    maker = StateMaker(store=StateStore(store), settings=settings, plan=plan)
    return maker, maker.run(photos)


def _bytes(store):
    return {p.relative_to(store): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file() and ".locks" not in p.parts}


def test_each_state_is_computed_once(tmp_path, photos):
    store, backbone = tmp_path / "states", Counting()
    for scale in (4, 16, 64):
        _run(store, photos, backbone, scale)
    assert backbone.count == 3 * 3  # three photographs, three steps
    _run(store, photos, backbone, 4, mode="direct")
    assert backbone.count == 9  # direct enlargement by one step's factor is the chain's first step
    _run(store, photos, backbone, 16, mode="direct")
    assert backbone.count == 12
    _run(store, photos, backbone, 64)
    assert backbone.count == 12


def test_whatever_shapes_a_state_makes_another(tmp_path, photos):
    store, backbone = tmp_path / "states", Counting()
    _run(store, photos, backbone, 4)
    for options in ({"seed": 1}, {"at": (0.2, 0.2)}, {"start_rounding": "round"}):
        before = backbone.count
        _run(store, photos, backbone, 4, **options)
        # The clean start state differs from the released one only where the sides do.
        assert backbone.count == before + 3, options
    other = Counting(version=2)
    _run(store, photos, other, 4)
    assert other.count == 3


def test_a_photograph_is_known_by_its_pixels_not_its_name(tmp_path, photos):
    store, backbone = tmp_path / "states", Counting()
    _run(store, photos, backbone, 4)
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "z.png").write_bytes(photos[0].path.read_bytes())
    _, (lineage,) = _run(store, list_photos(path=tmp_path / "renamed"), backbone, 4)
    assert backbone.count == 3
    assert lineage.photo.name == "z"


def test_a_photograph_that_fails_is_listed_and_the_rest_goes_on(tmp_path, photos):
    store, backbone = tmp_path / "states", Counting()
    _, lineages = _run(store, photos, Counting(), 4)
    view = lineages[1].view
    broken = torch.from_numpy(np.array(Image.open(lineages[1].parent.image_path))).float().div(255)
    crop = broken[view.top_px : view.top_px + view.size_px, view.left_px : view.left_px + view.size_px]
    backbone.version, backbone.broken = 3, {round(float(crop.mean()), 3)}
    maker, rest = _run(store, photos, backbone, 4, batch_size=3)
    assert [lineage.photo.name for lineage in rest] == ["a", "c"]
    assert [failure.photo for failure in maker.failures] == ["b"]
    rows = list(measure(rest, maker.failures, [ConsistencyStep()], LABELS))
    failed = [row for row in rows if row["failure"]]
    assert [(row["image"], row["value"]) for row in failed] == [("b", ConsistencyStep.worst)]
    assert "the net broke" in failed[0]["failure"]


def test_a_damaged_photograph_is_a_failure_too(tmp_path, photos):
    data = photos[1].path.read_bytes()
    photos[1].path.write_bytes(data[: len(data) // 2])
    maker, rest = _run(tmp_path / "states", photos, Counting(), 4)
    assert [lineage.photo.name for lineage in rest] == ["a", "c"]
    assert "b.png" in maker.failures[0].reason


LABELS = Labels(method="coz_null", scale=16, dataset="folder", backbone="counting", prompter="null", profile="embedded")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, photos, batch_size):
    metrics = [ConsistencyStep(), ConsistencyInput()]

    def whole(store, backbone):
        maker, lineages = _run(store, photos, backbone, 16, batch_size=batch_size)
        return rows_to_csv(sorted(measure(lineages, maker.failures, metrics, LABELS), key=row_order))

    rows = whole(tmp_path / "straight", Counting())

    class Dying(Counting):
        left = 3

        def __call__(self, lr, **options):
            if self.left <= 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().__call__(lr, **options)

    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path / "broken", Dying())
    assert whole(tmp_path / "broken", Counting()) == rows
    assert _bytes(tmp_path / "broken") == _bytes(tmp_path / "straight")


def test_metric_values_are_kept_with_their_state(tmp_path, photos):
    _, lineages = _run(tmp_path / "states", photos, Counting(), 4)

    class Once(ConsistencyStep):
        calls = 0

        def __call__(self, sample):
            type(self).calls += 1
            return super().__call__(sample)

    first = list(measure(lineages, [], [Once()], LABELS))
    second = list(measure(lineages, [], [Once()], LABELS))
    assert first == second
    assert Once.calls == 3


def test_a_value_that_is_no_number_is_a_failure(tmp_path, photos):
    _, lineages = _run(tmp_path / "states", photos[:1], Counting(), 4)

    class Undefined(ConsistencyStep):
        calls = 0

        def __call__(self, sample):
            type(self).calls += 1
            return float("nan")

    class Refusing(ConsistencyStep):
        def __call__(self, sample):
            raise AssertionError("too small")

    for metric, reason in ((Undefined(), "nan"), (Refusing(), "too small")):
        (row,) = measure(lineages, [], [metric], LABELS)
        assert row["value"] == metric.worst
        assert reason in row["failure"]
    assert Undefined.calls == 2  # a second try


class Waiting(Counting):
    """From its second picture on it works until the prompter has been asked for the next one, or too long."""

    def __init__(self, prompter, pictures):
        super().__init__()
        self.prompter, self.pictures, self.alone = prompter, pictures, 0

    def __call__(self, lr, **options):
        done = super().__call__(lr, **options)
        if 1 < self.count < self.pictures and not self.prompter.asked[self.count].wait(timeout=1):
            self.alone += 1
        return done


class Telling(NullPrompter):
    """Says when it is asked for its nth picture, and how bright that is."""

    reads_images = True

    def __init__(self, pictures):
        self.asked, self.count = [threading.Event() for _ in range(pictures)], 0

    def __call__(self, current, context, *, seeds=None):
        self.asked[self.count].set()
        self.count += 1
        return [f"{float(image.mean()):.4f}" for image in current]


def _overlapped(store, photos, *, overlap, breaks=False):
    prompter = Telling(9)
    backbone = Waiting(prompter, 2 * 2) if overlap else Counting()
    if breaks:
        backbone.broken = {0.0}
    plan = Plan(factors=[4.0, 4.0], start_px=START_PX)
    settings, done = StepSettings(backbone=backbone, prompter=prompter), []

    def note(batch):
        done.extend(lineage.photo.name for lineage in batch)

    maker = StateMaker(store=StateStore(store), settings=settings, plan=plan, overlap=overlap, on_done=note)
    return maker, maker.run(photos), prompter, backbone, done


def test_prompts_are_asked_for_while_the_backbone_works(tmp_path, photos):
    _, beside, prompter, backbone, done = _overlapped(tmp_path / "beside", photos[:2], overlap=True)
    assert backbone.alone == 0
    assert backbone.count == prompter.count == 2 * 2  # two photographs, two steps
    assert done == ["a", "b"]
    _, turns, *_ = _overlapped(tmp_path / "turns", photos[:2], overlap=False)
    assert [lineage.state.key for lineage in beside] == [lineage.state.key for lineage in turns]
    assert _bytes(tmp_path / "beside") == _bytes(tmp_path / "turns")


def test_batches_that_share_a_lock_take_turns(tmp_path, photos):
    class OneLock(StateStore):
        def stripes(self, keys):
            return {"00"}

        def claim(self, keys, *, wait):
            assert not wait  # nobody else is there to wait for
            return super().claim(keys, wait=wait)

    settings = StepSettings(backbone=Counting(), prompter=Telling(9))
    plan = Plan(factors=[4.0, 4.0], start_px=START_PX)
    lineages = StateMaker(store=OneLock(tmp_path / "states"), settings=settings, plan=plan).run(photos)
    assert [lineage.photo.name for lineage in lineages] == ["a", "b", "c"]
    assert settings.backbone.count == 3 * 2


def test_a_failure_leaves_its_neighbours_alone(tmp_path, photos):
    Image.new("RGB", (70, 90)).save(photos[1].path)
    maker, rest, _, _, done = _overlapped(tmp_path / "beside", photos, overlap=True, breaks=True)
    assert [failure.photo for failure in maker.failures] == ["b"]
    assert [lineage.photo.name for lineage in rest] == sorted(done) == ["a", "c"]


def test_a_damaged_state_is_a_failure_of_its_photograph(tmp_path, photos):
    _, lineages = _run(tmp_path / "states", photos, Counting(), 4)
    lineages[1].state.image_path.write_bytes(b"")
    maker, rest = _run(tmp_path / "states", photos, Counting(), 16, batch_size=2)
    assert [lineage.photo.name for lineage in rest] == ["a", "c"]
    assert [failure.photo for failure in maker.failures] == ["b"]


def test_a_mistake_or_an_interruption_ends_the_thread_and_frees_the_claims(tmp_path, photos):
    class Interrupted(Counting):
        def __call__(self, lr, **options):
            if self.count == 4:
                raise KeyboardInterrupt
            return super().__call__(lr, **options)

    settings = StepSettings(backbone=Interrupted(), prompter=Telling(9))
    store, plan = StateStore(tmp_path / "states"), Plan(factors=[4.0, 4.0], start_px=START_PX)
    with pytest.raises(KeyboardInterrupt):
        StateMaker(store=store, settings=settings, plan=plan).run(photos)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prompter")]
    with store.claim([f"{stripe:02x}" for stripe in range(256)], wait=False) as claimed:
        assert claimed


def test_direct_enlargement_needs_a_pixel():
    with pytest.raises(UserError, match="no pixel"):
        plan_for(mode="direct", scale=1024, max_factor=4, start_px=512)

"""Pairs for the tuning: what they show, how they are split, and that they depend on nothing but their identity."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
from PIL import Image

from coz.chain import StepSettings, prompt_pair
from coz.data.photos import Photo
from coz.data.zoom_pairs import chain_pairs, hr_pairs, split_photos
from coz.errors import UserError
from coz.image import View, from_pil, view_at
from coz.models.chat import chat_messages


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs whose red is their column and whose green is their row."""
    folder = tmp_path_factory.mktemp("photos")
    made = []
    for i, (width, height) in enumerate([(256, 256), (256, 240), (240, 256)]):
        ramp = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")[::-1])
        image = torch.cat([ramp % 256, torch.full((1, height, width), 40 * i)]).byte()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"p{i}.png")
        made.append(Photo(f"p{i}", folder / f"p{i}.png"))
    return made


def test_the_papers_split_is_849_of_84991_and_stable():
    names = [f"{i:07d}" for i in range(84_991)]
    train, validation = split_photos(names, share=0.01, seed=0)
    assert (len(train), len(validation)) == (84_142, 849)
    assert set(train) | set(validation) == set(names)
    assert split_photos(names[::-1], share=0.01, seed=0)[1] == validation[::-1]
    assert split_photos(names, share=0.01, seed=1)[1] != validation
    longer = split_photos([*names, "another"], share=0.01, seed=0)[1]
    assert len(set(longer) ^ set(validation)) <= 2


def test_the_view_lies_in_the_context_at_a_quarter_of_its_side(photos):
    pairs = hr_pairs(photos=photos, pairs_per_photo=12, size_px=64, max_depth=3, min_view_px=4, validation_share=0.4)
    sides = set()
    for row in pairs.train:
        context, current = (from_pil(image)[0] for image in row["images"])
        assert context.shape == current.shape == (3, 64, 64)
        span, inner = (float(x[0, 0, 48] - x[0, 0, 16]) * 255 * 2 for x in (context, current))  # columns they show
        assert inner == pytest.approx(span / 4, abs=3)
        assert context[0].min() - 0.02 <= current[0].min()
        assert current[1].max() <= context[1].max() + 0.02
        sides.add(round(span / 16))
    assert {1, 4, 15} <= sides | {side - 1 for side in sides}  # depths 3, 2, 1 of 256 px photographs


def test_pairs_are_what_inference_shows_the_prompter(photos):
    row = hr_pairs(photos=photos[:2], size_px=64, max_depth=1, validation_share=0.5).train[0]
    assert row["prompt"] == chat_messages(context="pair")
    context, current = row["images"]
    state = from_pil(context)
    views = [View(left, top, 16) for left in range(49) for top in range(49)]
    shown = (prompt_pair(state, [view], step=2, first_pair="released")[0] for view in views)
    assert any(torch.equal(view, from_pil(current)) for view in shown)


def test_a_pair_depends_on_its_photograph_number_and_seed_alone(photos):
    many = hr_pairs(photos=photos, pairs_per_photo=3, size_px=32, validation_share=0.4).train
    few = pickle.loads(pickle.dumps(hr_pairs(photos=photos[::-1], pairs_per_photo=2, size_px=32, validation_share=0.4).train))
    images = {row["pair"]: [image.tobytes() for image in row["images"]] for row in many}
    assert len(set(map(tuple, images.values()))) == len(images) == 6
    for row in few:
        assert [image.tobytes() for image in row["images"]] == images[row["pair"]]
    other = hr_pairs(photos=photos, pairs_per_photo=3, size_px=32, validation_share=0.4, seed=1)
    other = {row["pair"]: [image.tobytes() for image in row["images"]] for half in other for row in half}
    assert all(other[name] != pixels for name, pixels in images.items())


def test_small_photographs_stay_shallow(photos):
    pairs = hr_pairs(photos=photos, pairs_per_photo=6, size_px=32, min_view_px=64, validation_share=0.4).train
    for row in pairs:
        red = from_pil(row["images"][0])[0, 0] * 255
        assert float(red.max() - red.min()) > 200  # the whole short side


def test_wrong_settings_are_named(photos, tmp_path):
    for settings, word in [
        ({"validation_share": 0.0}, "validation_share=0.0"),
        ({"pairs_per_photo": 0}, "pairs_per_photo=0"),
        ({"layout": "side"}, "layout=side"),
    ]:
        with pytest.raises(UserError, match=word):
            hr_pairs(photos=photos, **settings)
    with pytest.raises(UserError, match="at least two"):
        hr_pairs(photos=photos[:1])
    with pytest.raises(UserError, match="make_pairs"):
        chain_pairs(index=str(tmp_path / "none.json"))


def test_chain_pairs_are_the_states_that_a_chain_looks_at(photos, tmp_path):
    from coz import pair_jobs
    from coz.backbones.interpolation import Interpolation
    from coz.chain import zoom_chain
    from coz.evaluation import Plan
    from coz.image import read_photo, start_state
    from coz.prompters.null import NullPrompter
    from coz.store import StateStore

    settings = StepSettings(backbone=Interpolation(resampling="bicubic"), prompter=NullPrompter())
    plan = Plan(factors=[4.0, 4.0], at="sample", start_px=64)
    places = [dataclasses.replace(p, at=pair_jobs.random_place(p.name, 0, seed=0)) for p in photos]
    parts = pair_jobs.Parts(settings, plan, places, StateStore(tmp_path / "states"))
    job = pair_jobs.Job(_Config(places=1, index=str(tmp_path / "pairs" / "chain.json")), tmp_path)
    pair_jobs.write_index(job, parts, pair_jobs.make_states(job, parts))

    assert len(json.loads((tmp_path / "pairs" / "chain.json").read_text())["pairs"]) == 9
    pairs = chain_pairs(index=str(tmp_path / "pairs" / "chain.json"), validation_share=0.4)
    rows = {row["pair"]: row["images"] for half in pairs for row in half}
    assert set(rows) == {f"p{i}@{step}" for i in range(3) for step in (1, 2, 3)}
    x0 = start_state(read_photo(places[1].path), 64)
    states = list(zoom_chain(x0, factors=[4, 4, 4], settings=settings, at=places[1].at, identities=["p1"]))
    images = [x0, *(state.images for state in states)]
    for step, state in enumerate(states, start=1):
        current, context = prompt_pair(images[step - 1], state.views, step=step, first_pair="released")
        assert torch.equal(from_pil(rows[f"p1@{step}"][0]), context)
        assert torch.equal(from_pil(rows[f"p1@{step}"][1]), current)
    assert view_at(64, 4).size_px == 16


class _Config(dict):
    __getattr__ = dict.__getitem__

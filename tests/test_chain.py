"""The chain by known answers, with backbones and prompters that record what they are given."""

from __future__ import annotations

import pytest
import torch

from coz.chain import StepSettings, check_where, plan_factors, richest_view, seed_of, zoom_chain
from coz.errors import UserError
from coz.image import quantize, resize, view_at


class Recorder:
    """A bicubic backbone and a prompter in one, which remember every call."""

    reads_prompts = True
    fingerprint = {"name": "recorder", "weights": None}

    def __init__(self):
        self.views, self.prompts, self.seeds, self.pairs = [], [], [], []

    def load(self):
        pass

    def __call__(self, lr, *, size, prompts=None, seeds=None):
        self.views.append(lr)
        self.prompts.append(list(prompts))
        self.seeds.append(list(seeds))
        return resize(lr, size)

    def prompt(self, current, context, *, seeds=None):
        self.pairs.append((current, context))
        return [f"step {len(self.pairs)} image {i}" for i in range(len(current))]


def _settings(recorder, **options):
    class Prompter:
        fingerprint = recorder.fingerprint
        load = recorder.load
        __call__ = staticmethod(recorder.prompt)

    return StepSettings(backbone=recorder, prompter=Prompter(), **options)


@pytest.fixture
def x0():
    return quantize(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("scale", "factors"), [(4, [4]), (16, [4, 4]), (64, [4, 4, 4]), (256, [4] * 4), (24, [4, 4, 1.5]), (2, [2]), (5, [4, 1.25])]
)
def test_a_scale_is_the_product_of_its_factors(scale, factors):
    assert plan_factors(scale) == pytest.approx(factors)


@pytest.mark.parametrize("scale", [0, 1, -4, 5000, float("nan"), float("inf"), True, "4"])
def test_a_scale_that_is_no_magnification_is_refused(scale):
    with pytest.raises(UserError, match="scale="):
        plan_factors(scale)


def test_each_step_sees_the_centre_of_the_state_before(x0):
    recorder = Recorder()
    states = list(zoom_chain(x0, factors=[4, 4], settings=_settings(recorder)))
    assert [state.scale for state in states] == [4, 16]
    assert torch.equal(recorder.views[0], x0[..., 24:40, 24:40])
    assert torch.equal(recorder.views[1], states[0].images[..., 24:40, 24:40])
    assert torch.equal(states[1].images, quantize(resize(recorder.views[1], 64), rounding="truncate"))


def test_the_prompter_sees_two_scales_and_its_words_reach_the_backbone(x0):
    recorder = Recorder()
    states = list(zoom_chain(x0, factors=[4, 4], settings=_settings(recorder)))
    current, context = recorder.pairs[1]
    assert torch.equal(context, states[0].images)
    assert torch.equal(current, resize(states[0].images[..., 24:40, 24:40], 64))
    assert torch.equal(recorder.pairs[0][1], x0)
    assert recorder.prompts == [["step 1 image 0", "step 1 image 1"], ["step 2 image 0", "step 2 image 1"]]
    assert states[1].prompts == ("step 2 image 0", "step 2 image 1")


def test_the_papers_first_pair_is_the_start_state_alone(x0):
    recorder = Recorder()
    list(zoom_chain(x0, factors=[4, 4], settings=_settings(recorder, first_pair="paper")))
    assert torch.equal(recorder.pairs[0][0], x0)
    assert recorder.pairs[0][1] is None
    assert recorder.pairs[1][1] is not None


def test_a_chain_goes_on_from_any_state(x0):
    whole = list(zoom_chain(x0, factors=[4, 4, 2], settings=_settings(Recorder()), at=(0.3, 0.7)))
    rest = list(zoom_chain(x0, factors=[4, 4, 2], settings=_settings(Recorder()), at=(0.3, 0.7), start=whole[0]))
    assert len(rest) == 2
    assert torch.equal(rest[-1].images, whole[-1].images)
    assert rest[-1].regions == whole[-1].regions


def test_a_batch_equals_its_images(x0):
    both = list(zoom_chain(x0, factors=[4, 4], settings=_settings(Recorder()), identities=["a", "b"]))[-1]
    recorder = Recorder()
    alone = list(zoom_chain(x0[1:], factors=[4, 4], settings=_settings(recorder), identities=["b"]))[-1]
    assert torch.equal(both.images[1:], alone.images)
    assert recorder.seeds[1] == [seed_of(0, "b", 2)]


def test_seeds_come_from_identity():
    seeds = {seed_of(seed, name, step) for seed in range(3) for name in "abc" for step in range(3)}
    assert len(seeds) == 27
    assert seed_of(1, "a", 2) == seed_of(1, "a", 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("at", [(0.31, 0.62), (0.0, 1.0), (0.5, 0.5), (0.999, 0.001), (0.123, 0.77)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_chain_and_direct_enlargement_show_the_same_region(at, steps):
    x0 = torch.zeros(1, 3, 512, 512)
    chain = list(zoom_chain(x0, factors=[4.0] * steps, settings=_settings(Recorder()), at=at))[-1].regions[0]
    direct = list(zoom_chain(x0, factors=[4.0**steps], settings=_settings(Recorder()), at=at))[-1].regions[0]
    assert (chain.left, chain.top, chain.side) == pytest.approx((direct.left, direct.top, direct.side))
    assert chain.left <= at[0] <= chain.left + chain.side


def test_points_one_per_step_are_fractions_of_each_state():
    recorder = Recorder()
    x0 = torch.zeros(1, 3, 64, 64)
    states = list(zoom_chain(x0, factors=[4, 4], settings=_settings(recorder), at=[(0.0, 0.0), (1.0, 1.0)]))
    assert (states[0].views[0].left_px, states[0].views[0].top_px) == (0, 0)
    assert (states[1].views[0].left_px, states[1].views[0].top_px) == (48, 48)


@pytest.mark.parametrize("at", [(2, 0.5), [(0.1, 0.2)], "corner", [0.5], [(0.1, 0.2), (0.3, 9.0)]])
def test_places_that_cannot_be_looked_at_are_refused(at):
    with pytest.raises(UserError, match="at"):
        check_where(at, steps=2)


def _picture(kind, size=192):
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(3, 48, 48, generator=generator)
    stripes = ((torch.arange(48) // 6) % 2).float().expand(3, 48, 48)
    image = torch.full((3, size, size), 0.5)
    image[:, 16:64, 16:64] = noise if kind == "noise" else 0.5
    image[:, 110:158, 120:168] = 0.35 + 0.3 * stripes
    return image


def test_the_richest_view_is_structure_and_not_noise():
    for kind in ("plain", "noise"):
        view = richest_view(_picture(kind), 4)
        assert abs(view.left_px + 24 - 144) < 16, kind
        assert abs(view.top_px + 24 - 134) < 16, kind


def test_the_richest_view_of_nothing_is_the_centre():
    view = richest_view(torch.full((3, 64, 64), 0.3), 4)
    assert view == view_at(64, 4)


def test_the_richest_view_does_not_move_with_fine_noise():
    clean = _picture("plain")
    noisy = (clean + 0.08 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    a, b = richest_view(clean, 4), richest_view(noisy, 4)
    assert abs(a.left_px - b.left_px) <= 12
    assert abs(a.top_px - b.top_px) <= 12


def test_a_backbone_that_breaks_the_contract_is_named(x0):
    class Broken(Recorder):
        def __call__(self, lr, *, size, prompts=None, seeds=None):
            return torch.full((len(lr), 3, 64, 64), float("nan"))

    with pytest.raises(ValueError, match="Broken"):
        list(zoom_chain(x0, factors=[4], settings=_settings(Broken())))

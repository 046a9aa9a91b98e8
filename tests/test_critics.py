"""Critics on this machine, and the settings of prompters and critics."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from coz.critics.base import Critic
from coz.critics.scores import expected_scores, parse_score
from coz.critics.tags import TagCritic, agreement
from coz.critics.vlm import VlmCritic
from coz.errors import UserError
from coz.image import to_pil

TINY = {"weights": "random", "size": "tiny", "device": "cpu", "precision": "fp32"}
CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("85", 0.85),
        ("85/100", 0.85),
        ("I give it 72.5 of 100.", 0.725),
        ("Rating: 100%", 1.0),
        ("0", 0.0),
        (".5", 0.005),
        ("80-90", 0.8),
        ("score-70", 0.7),
        ("101", None),
        ("1,000", None),
        ("85, 90", 0.85),
        ("-5", None),
        ("−5", None),
        ("", None),
        ("very good", None),
        ("...", None),
    ],
)
def test_the_first_number_counts_and_anything_else_is_a_failure(answer, score):
    assert parse_score(answer) == (None if score is None else pytest.approx(score))


def test_expected_scores_are_means_and_need_mass():
    shares = torch.zeros(3, 101)
    shares[0, 85], shares[1, 80], shares[1, 90], shares[2, 0] = 1, 0.5, 0.5, 1
    assert expected_scores(shares, torch.tensor([0.9, 0.5, 1e-5]), min_mass=1e-3) == [
        pytest.approx(0.85),
        pytest.approx(0.85),
        None,
    ]


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    contexts, views = (to_pil(torch.rand(4, 3, 56, 56, generator=generator)) for _ in range(2))
    return list(zip(contexts, views, strict=True))


TEXTS = ["fur", "stone, leaf and a longer text", "", "x"]


def test_expected_batches_equal_single_ones_and_see_text_and_both_pictures(pairs):
    critic = VlmCritic(**TINY, score="expected", min_mass=0.0, batch_size=3)
    assert isinstance(critic, Critic)
    assert not isinstance(critic, torch.nn.Module)
    together = critic(pairs, TEXTS)
    assert together == [pytest.approx(critic([pair], [text])[0], abs=1e-5) for pair, text in zip(pairs, TEXTS, strict=True)]
    assert all(0 <= score <= 1 for score in together)
    (context, current), other = pairs[0], pairs[1]
    base = critic([pairs[0]], ["fur"])[0]
    for pair, text in (((context, current), "bark"), ((other[0], current), "fur"), ((context, other[1]), "fur")):
        assert critic([pair], [text])[0] != base  # exact: the same input gives the same number
    assert critic([pairs[0]], ["fur"])[0] == base
    assert critic.tally.failed == 0


def test_parse_counts_failures(pairs, monkeypatch):
    critic = VlmCritic(**TINY)
    monkeypatch.setattr(critic.model, "answer", lambda requests, **_: ["90", "fur", "300", "10"])
    assert critic(pairs, TEXTS) == [0.9, None, None, 0.1]
    assert (critic.tally.asked, critic.tally.failed) == (4, 2)


def test_a_random_model_parses_without_error(pairs):
    scores = VlmCritic(**TINY)(pairs, TEXTS)
    assert len(scores) == 4
    assert all(score is None or 0 <= score <= 1 for score in scores)


def test_special_tokens_in_a_description_do_not_reach_the_model(pairs):
    critic = VlmCritic(**TINY, score="expected", min_mass=0.0)
    plain, dressed = critic([pairs[0]] * 2, ["fur", "fur<|image_pad|><|im_end|>"])
    assert plain == pytest.approx(dressed, abs=1e-6)


def test_a_critic_travels_and_tells_what_it_is(pairs):
    critic = VlmCritic(**TINY, score="expected", min_mass=0.0)
    scores = critic(pairs, TEXTS)
    copy = pickle.loads(pickle.dumps(critic))
    assert copy(pairs, TEXTS) == pytest.approx(scores)
    parse = VlmCritic(**TINY).fingerprint
    assert json.loads(json.dumps(parse)) != json.loads(json.dumps(critic.fingerprint))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": "guess"}, "score=guess"),
        ({"question": "Rate {description}"}, "<image> twice"),
        ({"question": "<image><image>"}, "once"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(UserError, match=said):
        VlmCritic(**TINY, **settings)


def test_pairs_and_texts_must_fit(pairs):
    with pytest.raises(ValueError, match="3 texts"):
        VlmCritic(**TINY)(pairs, ["a"] * 3)
    with pytest.raises(ValueError, match="has 1 images"):
        VlmCritic(**TINY)([pairs[0][:1]], ["a"])


# ---------------------------------------------------------------------------------------------------------------------
# tags


def _tagger(current, context):
    assert context is None
    return ["dogs, brown fur" if image.mean() > 0.5 else "" for image in current]


def test_tags_critic_scores_agreement_and_counts_views_without_tags():
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
    critic = TagCritic(tagger=_tagger)
    assert isinstance(critic, Critic)
    scores = critic([(black, white), (white, black), (black, white)], ["Dog, brown fur", "dog", "a cat"])
    assert scores == [pytest.approx(1.0), None, 0.0]
    assert (critic.tally.asked, critic.tally.failed) == (3, 1)
    assert pickle.loads(pickle.dumps(critic))([(black, white)], ["fur"]) == critic([(black, white)], ["fur"])


def test_a_view_is_tagged_once_for_all_its_texts():
    seen = []
    critic = TagCritic(tagger=lambda current, _: seen.append(len(current)) or ["fur"] * len(current))
    view, small = Image.new("RGB", (8, 8)), Image.new("RGB", (4, 4))
    critic([(view, view), (view, view), (view, small)], ["fur", "bark", "fur"])
    assert seen == [1, 1]


@pytest.mark.parametrize(
    ("text", "tags", "score"),
    [
        ("fur", "fur, dog", 2 / 3),
        ("fur fur fur", "fur, dog", 2 / 3),
        ("", "fur", 0.0),
        ("the fur of a dog", "fur, dog", 1.0),
        ("fur", "", None),
    ],
)
def test_agreement(text, tags, score):
    assert agreement(text, tags) == (None if score is None else pytest.approx(score))


# ---------------------------------------------------------------------------------------------------------------------
# settings


def _compose(group, name):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"{group}/{name}", overrides=["+device=cpu", "+precision=fp32"])
    return OmegaConf.to_container(config, resolve=True)[group]


@pytest.mark.parametrize(
    ("group", "name"),
    [("prompter", n) for n in ("vlm", "vlm_single", "server")]
    + [("critic", n) for n in ("vlm", "qwen7b", "internvl", "server")],
)
def test_every_setting_is_read(group, name):
    from hydra.utils import get_class

    settings = _compose(group, name)
    cls = get_class(settings.pop("_target_"))
    bound = inspect.signature(cls).bind(**settings)
    missing = set(inspect.signature(cls).parameters) - set(bound.arguments)
    assert missing <= {"model", "loader", "question", "min_new_tokens"}  # the rest is for Python and benchmarks


def test_single_is_a_prompter_for_one_image():
    from hydra.utils import instantiate

    settings = _compose("prompter", "vlm_single") | TINY | {"cache_dir": None, "max_new_tokens": 4}
    prompts = instantiate(settings, _convert_="all")(torch.rand(2, 3, 56, 56), None)
    assert len(prompts) == 2


def test_missing_weights_are_named_before_anything_loads(monkeypatch, tmp_path):
    from hydra.utils import instantiate

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Exception, match=r"Qwen/Qwen2\.5-VL-3B-Instruct, 7\.5 GB.*coz\.prepare"):
        instantiate(_compose("prompter", "vlm"), _convert_="all")

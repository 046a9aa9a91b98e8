"""The rewards on the paper's own failure examples (appendix J), and what a critic's failures do."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from coz.errors import UserError
from coz.rewards import CriticReward, PhraseExclusion, Repetition, ServedCriticReward, critic_reward, text_of

CONF = Path(__file__).resolve().parents[1] / "conf"

REPEATING = (  # J.1, as printed
    "fur texture orange background animal fur close-up pattern texture orange fur texture orange fur background orange fur "
    "texture orange fur background orange fur texture orange fur texture orange fur texture orange fur texture orange fur "
    "texture orange fur texture orange fur texture orange fur texture orange fur texture orange fur texture orange fur ..."
)
UNWANTED = (  # J.2
    "The second image shows a close-up view of a surface with a textured pattern. The texture appears to be a combination of "
    "smooth and slightly raised areas, giving it a somewhat wavy or ripple-like appearance. The color gradient ranges from a "
    "lighter shade at the top to a darker shade at the bottom, creating a sense of depth and dimension."
)
SUBOPTIMAL = "ant leg"  # J.3
TUNED = ["fur", "feathers", "crab claw"]


@pytest.fixture
def phrase():
    return PhraseExclusion(phrases=list(OmegaConf.load(CONF / "reward/phrase.yaml").phrases))


def test_the_papers_failures_and_what_tuning_made_of_them(phrase):
    repetition = Repetition()
    assert phrase(completions=[REPEATING, UNWANTED, SUBOPTIMAL, *TUNED]) == [1, 0, 1, 1, 1, 1]
    values = repetition(completions=[REPEATING, UNWANTED, SUBOPTIMAL, *TUNED])
    words = REPEATING.split()
    distinct = len(set(zip(words, words[1:], words[2:], strict=False)))
    assert values[0] == pytest.approx(-(1 - distinct / (len(words) - 2)))
    assert -1 < values[0] < -0.6
    assert values[1:] == [pytest.approx(-1 / 58), 0, 0, 0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "FIRST IMAGE",
        "the first-image",
        "the “second” image",
        "a **second image**",
        "first\n image",
        "In the first image's",
        "second_image",
    ],
)
def test_phrases_are_found_in_any_dress(phrase, text):
    assert phrase(completions=[text]) == [0]


@pytest.mark.parametrize(
    "text", ["", "secondary image", "a second, image of fur", "firstimage", "thirty-first imagery", "zoom lens"]
)
def test_phrases_are_whole_words_of_one_clause(phrase, text):
    assert phrase(completions=[text]) == [1]


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [
        ("", 3, 0),
        ("fur fur", 3, 0),
        ("fur fur fur", 3, 0),
        ("fur Fur  FUR fur", 3, -0.5),
        ("a b a b", 2, -1 / 3),
        ("a a a a", 1, -0.75),
        ("fur, " * 101, 3, -98 / 99),
    ],
)
def test_repetition_of_known_texts(text, n, value):
    assert Repetition(n=n)(completions=[text]) == [pytest.approx(value)]


def test_completions_come_as_text_or_as_messages(phrase):
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "second "}, {"type": "text", "text": "image"}]}]
    assert text_of(parts) == "second image"
    assert phrase(completions=[parts, [{"role": "assistant", "content": "fur"}]], prompts=[], trainer_state=None) == [0, 1]


def test_wrong_settings_are_named():
    for make, word in [
        (lambda: PhraseExclusion(phrases=[]), "phrases"),
        (lambda: PhraseExclusion(phrases=["--"]), "--"),
        (lambda: Repetition(n=0), "n=0"),
        (lambda: CriticReward(critic=FakeCritic(), cache_size=-1), "cache_size=-1"),
    ]:
        with pytest.raises(UserError, match=word):
            make()


class FakeCritic:
    """Scores by the text's length; fails on the word "fail"."""

    fingerprint = {"name": "fake"}

    def __init__(self):
        self.calls = []

    def load(self):
        pass

    def __call__(self, pairs, texts):
        self.calls.append(list(texts))
        return [None if "fail" in text else len(text) / 100 for text in texts]


class FakeServedCritic(FakeCritic):
    async def rate_async(self, pairs, texts):
        await asyncio.sleep(0)
        return FakeCritic.__call__(self, pairs, texts)


def pair(shade):
    return [Image.new("RGB", (4, 4), (shade, 0, 0)), Image.new("RGB", (4, 4), (0, shade, 0))]


def test_a_failure_is_counted_and_neither_gains_nor_loses():
    reward = CriticReward(critic=FakeCritic())
    logged = {}
    scores = reward(
        completions=["fail", "fur", "fail", "fail again"],
        images=[pair(1), pair(1), pair(2), pair(2)],
        log_metric=lambda name, value: logged.update({name: value}),
    )
    assert scores == [0.03, 0.03, None, None]
    assert (reward.asked, reward.failed, logged["critic/failed"]) == (4, 3, 0.75)


def test_a_score_is_asked_once_per_images_and_text_and_failures_again():
    critic = FakeCritic()
    reward = pickle.loads(pickle.dumps(CriticReward(critic=critic)))
    images = [pair(1), pair(1), pair(2), pair(1)]
    assert reward(completions=["fur", "fur", "fur", "fail"], images=images) == [0.03] * 4
    assert reward.critic.calls == [["fur", "fur", "fail"]]
    reward(completions=["fur", "fail"], images=[pair(2), pair(2)])
    assert reward.critic.calls[1:] == [["fail"]]


def test_a_small_cache_changes_no_score():
    small, none = (CriticReward(critic=FakeCritic(), cache_size=size) for size in (1, 0))
    for reward in (small, none):
        assert reward(completions=["a", "bb", "a"], images=[pair(1)] * 3) == [0.01, 0.02, 0.01]
        assert len(reward._cache) <= 1


def test_a_served_critic_is_awaited():
    reward = critic_reward(critic=FakeServedCritic())
    assert isinstance(reward, ServedCriticReward)
    assert asyncio.run(reward(completions=["fur", "fail"], images=[pair(1)] * 2)) == [0.03, 0.03]
    assert type(critic_reward(critic=FakeCritic())) is CriticReward

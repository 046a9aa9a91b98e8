"""The VLM prompter and its cache."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from coz.errors import UserError
from coz.models.vlm import VisionLanguageModel
from coz.prompters.base import Prompter
from coz.prompters.cache import PromptCache, ask_missing
from coz.prompters.cleaning import clean_prompt
from coz.prompters.vlm import VlmPrompter

TINY = {"weights": "random", "size": "tiny", "device": "cpu", "precision": "fp32", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def states():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 56, 56, generator=generator), torch.rand(3, 3, 56, 56, generator=generator)


@pytest.fixture
def asked(monkeypatch):
    """The numbers of requests that reached a model."""
    counts = []
    answer = VisionLanguageModel.answer

    def counting(self, requests, **settings):
        counts.append(len(requests))
        return answer(self, requests, **settings)

    monkeypatch.setattr(VisionLanguageModel, "answer", counting)
    return counts


def test_it_keeps_the_contract(states):
    prompter = VlmPrompter(**TINY)
    assert isinstance(prompter, Prompter)
    assert json.loads(json.dumps(prompter.fingerprint))["weights"] == "random"
    assert not prompter.model.loaded
    prompts = prompter(*states)
    assert [prompts[i] for i in range(3)] == [prompter(states[0][i : i + 1], states[1][i : i + 1])[0] for i in range(3)]
    assert all(prompt == prompt.raw for prompt in prompts)


def test_it_runs_beside_the_backbone_once_its_weights_stay_where_they_are(states):
    prompter, moving = VlmPrompter(**TINY), VlmPrompter(**TINY, offload="cpu")
    assert not prompter.beside_backbone
    for one in (prompter, moving):
        one.load()
    assert prompter.beside_backbone
    assert not moving.beside_backbone


def test_context_matters_for_pairs_alone(states):
    current, context = states
    pair, single = VlmPrompter(**TINY), VlmPrompter(**TINY, context="single")
    assert pair(current, context) != pair(current, context.flip(0))
    assert single(current, context) == single(current, None)
    assert pair.fingerprint != single.fingerprint
    with pytest.raises(UserError, match=r"prompter\.context=single"):
        pair(current, None)


def test_a_second_run_asks_nothing_and_loads_nothing(states, asked, tmp_path):
    first = VlmPrompter(**TINY, cache_dir=str(tmp_path))(*states)
    assert asked == [3]
    second = VlmPrompter(**TINY, cache_dir=str(tmp_path), cleaning="list")
    prompts = second(*states)
    assert asked == [3]
    assert not second.model.loaded
    assert [prompt.raw for prompt in prompts] == first


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"layout": "user"},
        {"question": "What?"},
        {"max_new_tokens": 7},
        {"temperature": 1.0},
        {"context": "single"},
    ],
)
def test_whatever_shapes_an_answer_asks_anew(states, asked, tmp_path, change):
    VlmPrompter(**TINY, cache_dir=str(tmp_path))(*states)
    VlmPrompter(**(TINY | change), cache_dir=str(tmp_path))(*states)
    assert asked == [3, 3]


def test_only_new_pictures_are_asked_for_and_equal_ones_once(states, asked, tmp_path):
    current, context = states
    prompter = VlmPrompter(**TINY, cache_dir=str(tmp_path))
    prompter(current[:1], context[:1])
    changed = current.clone()
    changed[1, 0, 0, 0] = (changed[1, 0, 0, 0] + 0.5) % 1  # one value of one pixel
    prompter(torch.cat([current[:2], changed[1:2], current[:2]]), torch.cat([context[:2], context[1:2], context[:2]]))
    assert asked == [1, 2]


def test_seeds_are_part_of_a_drawn_answers_name_only(states, asked, tmp_path):
    greedy = VlmPrompter(**TINY, cache_dir=str(tmp_path))
    assert greedy(*states, seeds=[1, 2, 3]) == greedy(*states, seeds=[4, 5, 6])
    drawing = VlmPrompter(**TINY, temperature=1.0, cache_dir=str(tmp_path))
    assert drawing(*states, seeds=[1, 2, 3]) != drawing(*states, seeds=[4, 5, 6])
    assert asked == [3, 3, 3]


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    cache = PromptCache(tmp_path)
    with pytest.raises(RuntimeError, match="down"):
        ask_missing(cache, ["aa", "bb", "cc"], lambda rows: ["one", RuntimeError("down"), "three"])
    rows = []
    assert ask_missing(cache, ["aa", "bb", "cc"], lambda missing: rows.extend(missing) or ["two"]) == ["one", "two", "three"]
    assert rows == [1]


def test_a_damaged_file_is_asked_for_again(tmp_path):
    cache = PromptCache(tmp_path)
    cache.put("aabb", "fur")
    (file,) = tmp_path.glob("aa/*.json")
    for content in ("", '{"raw": "fu', "[]", '{"raw": 3}', '{"other": 1}'):
        file.write_text(content)
        assert cache.get("aabb") is None
    cache.put("aabb", "bark")
    assert cache.get("aabb") == "bark"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir="):
        PromptCache(tmp_path / "file").put("aabb", "fur")


def _write_many(folder, text, barrier):
    cache = PromptCache(folder)
    barrier.wait()
    for i in range(200):
        cache.put(f"aa{i % 5}", text * 500)
        read = cache.get(f"aa{(i + 1) % 5}")
        assert read is None or len(read) == 500


def test_two_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_write_many, args=(tmp_path, text, barrier)) for text in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("aa/*")) == [f"aa{i}.json" for i in range(5)]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("fur, texture, Fur, orange fur", "fur, texture, orange fur"),
        ("- fur\n- bark \n* moss.", "fur, bark, moss"),
        ("1. fur\n2) 3 dogs", "fur, 3 dogs"),
        ("The view shows fur.", "The view shows fur"),
        (" ,;\n", ""),
    ],
)
def test_cleaning_keeps_the_models_own_words_beside(raw, cleaned):
    prompt = clean_prompt(raw, "list")
    assert (prompt, prompt.raw) == (cleaned, raw)
    untouched = clean_prompt(raw, "none")
    assert untouched == untouched.raw == raw

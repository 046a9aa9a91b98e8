"""The tuning's settings, checks, watch and curves, each with a known answer. The runs themselves: test_grpo_runs.py."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers import TrainerControl, TrainerState

from coz import cli, grpo_jobs, grpo_recipe
from coz.errors import UserError
from coz.models.random_vlm import random_vlm
from coz.plots.__main__ import main
from coz.plots.rewards import draw_rewards, read_curves
from coz.training import grpo_memory
from coz.training.bad_habits import BadHabits
from coz.training.grpo_trainer import Answer, check_prompt_lengths, text_statistics
from coz.training.grpo_watch import HackingWatch, RewardRows, page, read_rows, rows_of, total_of

CONF = Path(__file__).resolve().parents[1] / "conf"


def recipe(name):
    merged = OmegaConf.load(CONF / "grpo/paper.yaml")
    return merged if name == "paper" else OmegaConf.merge(merged, OmegaConf.load(CONF / f"grpo/{name}.yaml"))


# ---------------------------------------------------------------------------------------------------------------------
# recipes


def test_the_papers_recipe_is_algorithm_2_and_appendix_b3():
    paper = recipe("paper")
    assert (paper.args.max_steps, paper.args.num_generations, paper.args.scale_rewards) == (10_000, 2, "none")
    assert (paper.lora.r, paper.lora.lora_alpha, paper.lora.lora_dropout) == (8, 32, 0.05)
    weights = [OmegaConf.load(CONF / f"reward/{name}.yaml").weight for name in ("critic", "phrase", "repetition")]
    assert weights == [1.0, 0.5, 0.5]


def test_the_trl_recipe_is_what_trl_does_by_itself():
    from trl import GRPOConfig

    defaults = {name: p.default for name, p in inspect.signature(GRPOConfig).parameters.items()}
    named = OmegaConf.load(CONF / "grpo/trl.yaml").args
    assert {key: defaults[key] for key in named} == dict(named)


@pytest.mark.parametrize("name", ["paper", "trl", "tiny"])
def test_every_setting_of_a_recipe_is_read(name):
    from hydra.utils import get_class

    for node in ("args", "lora", "habits"):
        settings = OmegaConf.to_container(OmegaConf.merge({"seed": 0}, recipe(name)), resolve=True)[node]
        inspect.signature(get_class(settings.pop("_target_"))).bind(**settings)


def test_a_run_says_where_its_recipe_differs(caplog):
    lines = grpo_recipe.describe_recipe(recipe("paper"))
    assert "beta: 0.04  (trl: 0.0)" in lines
    assert "scale_rewards: none  (trl: group)" in lines
    assert not any(line.startswith("epsilon") for line in lines)
    assert "num_generations: 8  (paper: 2)" in grpo_recipe.describe_recipe(recipe("trl"))


@pytest.mark.parametrize(("processes", "expected"), [(1, (2, 8)), (4, (2, 2)), (8, (2, 1))])
def test_a_step_has_as_many_completions_whatever_the_processes(processes, expected):
    assert grpo_recipe.completions_per_process(recipe("paper"), processes=processes) == expected
    at_a_time, times = expected
    assert at_a_time * times * processes == 16


@pytest.mark.parametrize("processes", [3, 16])
def test_groups_that_do_not_divide_are_refused(processes):
    with pytest.raises(UserError, match="completions_per_step=16"):
        grpo_recipe.completions_per_process(recipe("paper"), processes=processes)


def test_the_adapter_is_in_the_language_model_alone():
    model, _ = random_vlm(size="tiny", seed=0, dtype=torch.float32, device=torch.device("cpu"))
    adapted = grpo_recipe.check_adapted(model, recipe("paper").lora.target_modules)
    assert len(adapted) == 2 * 7
    assert all(".language_model.layers." in name for name in adapted)
    with pytest.raises(UserError, match="vision tower"):
        grpo_recipe.check_adapted(model, r".*\.(q_proj|up_proj)")
    with pytest.raises(UserError, match="no linear layer"):
        grpo_recipe.check_adapted(model, "query")


def test_bad_habits_come_in_their_shares():
    import random

    from coz.rewards import PhraseExclusion, Repetition

    rng = random.Random(0)
    texts = [BadHabits(steps=1, unwanted=0.5, repeating=0.3).answer(rng) for _ in range(2000)]
    phrase = PhraseExclusion(phrases=list(OmegaConf.load(CONF / "reward/phrase.yaml").phrases))(completions=texts)
    assert sum(phrase) / 2000 == pytest.approx(0.5, abs=0.04)
    repeating = sum(value < 0 for value in Repetition()(completions=texts)) / 2000
    assert repeating == pytest.approx(0.3, abs=0.04)
    with pytest.raises(UserError, match=r"unwanted=0\.8"):
        BadHabits(steps=1, unwanted=0.8, repeating=0.3)


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ((), "grpo.name", "tiny"),
        ((), "critic.score", "expected"),
        ((), "policy.weights", "random"),
        (("critic.score=parse",), "critic.score", "parse"),
        (("grpo=trl",), "grpo.name", "trl"),
        (("critic=tags",), "pairs.pairs_per_photo", 32),  # it has no setting `score`, which is left out
        (("pairs=chain", "grpo.args.beta=0.1"), "grpo.args.beta", 0.1),
    ],
)
def test_the_tiny_profile_sets_what_the_command_line_leaves(typed, key, value):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = cli.resolve_overrides(["profile=tiny", *typed], config_name="train_grpo", sweep=False)
    assert OmegaConf.select(config, key) == value


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_the_memory_plan_for_24_and_80_gb():
    policy = types.SimpleNamespace(weights="hub", size="full", memory_gb=7.5 + 0.2)
    critic = types.SimpleNamespace(model=types.SimpleNamespace(memory_gb=16.2 + 0.8))
    need = grpo_memory.estimate(
        policy, [types.SimpleNamespace(critic=critic)], rank=8, batch=2, completion_tokens=512, checkpointing=True
    )
    assert 24 < need.total < 80  # the paper's pair fits one large card, not one of 24 GB
    assert "int8" in grpo_memory.advice(need, 24)
    assert "critic=server" in grpo_memory.advice(need, 14)
    assert need.adapters == pytest.approx(15.0e6 * 16e-9, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# watching


def test_signs_of_a_hacked_reward():
    signs = text_statistics(["", "fur", "fur fur fur", "cat eye"])
    assert signs == {"empty": 0.25, "one_word": 0.25, "distinct_2": pytest.approx(2 / 3)}
    assert text_statistics([]) == {"empty": 0, "one_word": 0, "distinct_2": 0}


def test_vllm_must_read_the_prompts_that_the_model_is_trained_on():
    check_prompt_lengths(sent=[[1, 2], [3]], seen=[[1, 2], [3]])
    check_prompt_lengths(sent=[[1]], seen=None)
    with pytest.raises(UserError, match="prompt 1 as 4 tokens"):
        check_prompt_lengths(sent=[[1, 2], [3]], seen=[[1, 2], [3, 3, 3, 3]])


def test_rows_name_the_rewards_and_validation():
    logs = {
        "rewards/critic/mean": 0.5,
        "rewards/critic/std": 0.1,
        "reward": 1.0,
        "eval_entropy": 2.0,
        "kl": float("nan"),
        "x": 1,
    }
    rows = {(row["split"], row["name"]): float(row["value"]) for row in rows_of(logs, step=3)}
    assert rows == {("train", "critic"): 0.5, ("train", "total"): 1.0, ("validation", "entropy"): 2.0}


def state_at(step):
    return TrainerState(global_step=step, is_world_process_zero=True)


def test_rows_after_the_step_to_go_on_from_are_dropped(tmp_path):
    rows, control = RewardRows(tmp_path), TrainerControl()
    rows.on_train_begin(None, state_at(0), control)
    for step in (1, 2, 3):
        rows.on_log(None, state_at(step), control, {"reward": step / 10})
    with (tmp_path / "rewards.csv").open("a") as file:
        file.write("4,train,to")  # a kill
    assert len(read_rows(tmp_path / "rewards.csv")) == 3
    RewardRows(tmp_path).on_train_begin(None, state_at(2), control)
    assert [(row["step"], row["value"]) for row in read_rows(tmp_path / "rewards.csv")] == [("1", "0.1"), ("2", "0.2")]


@pytest.mark.parametrize(
    ("values", "warned"), [([2.0] * 4, 0), ([2.9] * 4, 0), ([3.1] * 8, 1), ([0.1] * 4, 1), ([3.1, 2] * 4, 0)]
)
def test_a_warning_when_entropy_leaves_the_band(tmp_path, caplog, values, warned):
    watch = HackingWatch(folder=tmp_path, entropy=[0.1, 1.5], length=[0.5, 2.0], first_steps=3, window=2)
    with caplog.at_level(logging.WARNING):
        for step, value in enumerate([2.0, 1.9, 2.1, *values], start=1):
            watch.on_log(None, state_at(step), TrainerControl(), {"entropy": value, "completions/mean_length": 8})
    assert len(watch.warnings) == len(caplog.records) == warned


def test_a_run_that_goes_on_remembers_its_first_steps(tmp_path):
    rows, control = RewardRows(tmp_path), TrainerControl()
    rows.on_train_begin(None, state_at(0), control)
    for step in (1, 2, 3):
        rows.on_log(None, state_at(step), control, {"completions/mean_length": 10})
    watch = HackingWatch(folder=tmp_path, entropy=[0.1, 1.5], length=[0.5, 2.0], first_steps=2, window=1)
    watch.on_train_begin(None, state_at(3), control)
    watch.on_log(None, state_at(4), control, {"completions/mean_length": 4})
    assert "length 4 left the band 5 to 20" in watch.warnings[0]


def test_the_page_shows_pictures_answers_and_rewards():
    picture = Image.new("RGB", (8, 8))
    answers = [
        Answer([picture, picture], "a <b> fur", {"critic": 0.25, "phrase": 1.0}),
        Answer([picture] * 2, "", {"critic": float("nan"), "phrase": 0.0}),
    ]
    text = page(answers, step=7, weights=[1.0, 0.5])
    assert text.count("data:image/jpeg") == 4
    assert "a &lt;b&gt; fur" in text
    assert "0.750" in text
    assert "<i>empty</i>" in text
    assert total_of(answers[1], [1.0, 0.5]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# curves


def test_curves_of_several_runs_together(tmp_path, capsys):
    for name in ("a", "b"):
        rows, control = RewardRows(tmp_path / name), TrainerControl()
        rows.on_train_begin(None, state_at(0), control)
        for step in (0, 10):
            rows.on_log(None, state_at(step), control, {"eval_reward": step / 10, "eval_rewards/phrase/mean": 0.5})
    assert read_curves(tmp_path / "a") == {"total": ([0, 10], [0.0, 1.0]), "phrase": ([0, 10], [0.5, 0.5])}
    out = draw_rewards([tmp_path / "a", tmp_path / "b"], out=tmp_path / "both.png")
    with Image.open(out) as image:
        assert image.width > 1000
    assert main(["rewards", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "rewards.png").is_file()
    assert main(["rewards", str(tmp_path)]) == 2
    assert "holds no rewards.csv" in capsys.readouterr().err


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    for step, whole in ((2, True), (10, True), (30, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert grpo_jobs.newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert grpo_jobs.newest_checkpoint(tmp_path / "none") is None
    assert dataclasses.is_dataclass(grpo_jobs.Run)


@pytest.mark.parametrize(("key", "least"), grpo_recipe.LEAST.items())
def test_counts_with_which_nothing_can_be_trained(key, least):
    config = OmegaConf.create({"grpo": recipe("paper"), "watch": OmegaConf.load(CONF / "train_grpo.yaml").watch})
    grpo_recipe.check_recipe(config)
    OmegaConf.update(config, key, least - 1)
    with pytest.raises(UserError, match=rf"{key}={least - 1} must be at least {least}"):
        grpo_recipe.check_recipe(config)

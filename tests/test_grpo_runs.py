"""Whole runs of the tuning on tiny random models: it learns, stops and goes on as it should."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coz import cli, grpo_jobs
from coz.errors import UserError
from coz.plots import read_curves
from coz.rewards import critic_reward

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class CountingCritic:
    """Likes short answers. Fails on some, kills the process or the server at a certain call."""

    fingerprint = {"name": "counting"}

    def __init__(self):
        self.calls = 0
        self.at_call = {}
        self.fail_every = 0
        self.answers = 0

    def load(self):
        pass

    def __call__(self, pairs, texts):
        self.calls += 1
        self.at_call.get(self.calls, lambda: None)()
        scores = []
        for text in texts:
            self.answers += 1
            failed = self.fail_every and self.answers % self.fail_every == 0
            scores.append(None if failed else 1 / (1 + len(text)))
        return scores


class ServedCountingCritic(CountingCritic):
    """The same behind a server: awaited."""

    async def rate_async(self, pairs, texts):
        return CountingCritic.__call__(self, pairs, texts)


def compose(folder, *overrides):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = ["profile=tiny", "critic=internvl", "device=cpu", "dataset.limit=4", f"run_dir={folder}", *overrides]
        return cli.resolve_overrides(settings, config_name="train_grpo", sweep=False)


SHORT = ("grpo.habits.steps=2", "pairs.pairs_per_photo=4", "grpo.args.max_steps=4", "grpo.args.save_steps=100")
SMALL = (
    "grpo.completions_per_step=4",
    "grpo.args.eval_steps=100",
    "grpo.args.max_completion_length=6",
    "pairs.validation_pairs=2",
)


def start(folder, critic, *overrides):
    """Everything of `train_grpo.py` but Hydra, with a critic of our own."""
    run = grpo_jobs.Run(compose(folder, *SHORT, *SMALL, *overrides), Path(folder))
    run.folder.mkdir(exist_ok=True)
    parts = grpo_jobs.build_parts(run)
    cli._build.cache_clear()  # rewards and data sets of another run must not be shared
    parts.rewards[0] = critic_reward(critic=critic)
    trainer = grpo_jobs.make_trainer(run, parts, *grpo_jobs.load_models(run, parts))
    grpo_jobs.train(run, parts, trainer)
    return trainer


def adapter(folder):
    return load_file(grpo_jobs.newest_checkpoint(Path(folder)) / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "unbroken"
    start(folder, CountingCritic())
    return folder


def test_a_run_that_a_signal_stops_goes_on_as_if_nothing_had_been(unbroken, tmp_path):
    assert not same(adapter(unbroken), {k: torch.zeros_like(v) for k, v in adapter(unbroken).items()})
    shutil.copytree(unbroken / "base", tmp_path / "base")
    critic = CountingCritic()
    critic.at_call[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)  # calls: validation, step 1, step 2
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path, critic)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert grpo_jobs.newest_checkpoint(tmp_path).name == "checkpoint-2"
    start(tmp_path, CountingCritic())
    assert grpo_jobs.newest_checkpoint(tmp_path).name == "checkpoint-4"
    assert same(adapter(tmp_path), adapter(unbroken))
    assert (tmp_path / "rewards.csv").read_text().count("train,total") == 4


@pytest.mark.parametrize("critic", [CountingCritic(), ServedCountingCritic()], ids=["here", "served"])
def test_a_dead_server_stops_the_run_with_the_last_step_saved(unbroken, tmp_path, critic):
    def die():
        raise UserError("http://localhost:8001/v1 does not answer")

    shutil.copytree(unbroken / "base", tmp_path / "base")
    critic.at_call[4] = die
    with pytest.raises(UserError, match=r"does not answer; step 2 is saved in .*checkpoint-2; the same command"):
        start(tmp_path, critic)
    start(tmp_path, type(critic)())
    assert same(adapter(tmp_path), adapter(unbroken))


def test_a_critic_that_fails_on_some_answers_is_counted_and_the_steps_survive(unbroken, tmp_path):
    shutil.copytree(unbroken / "base", tmp_path / "base")
    critic = CountingCritic()
    critic.fail_every = 5
    trainer = start(tmp_path, critic)
    assert trainer.state.global_step == 4
    failed = {step["step"]: step["critic/failed"] for step in trainer.state.log_history if "critic/failed" in step}
    assert sum(failed.values()) > 0
    assert all(value < 1 for value in failed.values())


def test_the_adapter_loads_at_inference(unbroken):
    from coz.prompters.vlm import VlmPrompter

    settings = {"weights": str(unbroken / "base"), "device": "cpu", "precision": "fp32", "max_new_tokens": 4}
    tuned = VlmPrompter(adapter=str(unbroken), **settings)
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert len(tuned(images, images)) == 2
    assert tuned.fingerprint["adapter"] is not None
    best = json.loads((unbroken / "adapter" / "best.json").read_text())
    assert best["step"] in (0, 4)


def test_missing_weights_are_named_at_once(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "train_grpo.py"), "critic=internvl", f"outputs={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in error
    assert "OpenGVLab/InternVL2_5-8B" in error
    assert "Traceback" not in result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15  # a busy machine's clock says nothing


def test_phrase_and_repetition_rewards_rise(tmp_path):
    settings = ("grpo.habits.steps=120", "grpo.args.max_steps=30", "grpo.args.eval_steps=30", "grpo.args.save_steps=30")
    run = grpo_jobs.Run(compose(tmp_path, *settings, "pairs.pairs_per_photo=16"), tmp_path)
    parts = grpo_jobs.build_parts(run)
    grpo_jobs.train(run, parts, grpo_jobs.make_trainer(run, parts, *grpo_jobs.load_models(run, parts)))
    curves = {name: values for name, (_, values) in read_curves(tmp_path).items()}
    assert curves["phrase"][0] < 0.7
    assert curves["phrase"][-1] >= 0.85
    assert curves["repetition"][0] < -0.05
    assert curves["repetition"][-1] >= -0.08
    assert curves["empty"][-1] <= 0.02
    assert 0.4 <= curves["length"][-1] / curves["length"][0] <= 2
    assert (tmp_path / "rewards.png").is_file()
    assert len(list((tmp_path / "completions").glob("step_*.html"))) == 2

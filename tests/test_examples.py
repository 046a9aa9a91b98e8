"""The worked examples of docs/extend.md run through the real commands."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from coz import cli
from coz.backbones.base import Backbone
from coz.critics.base import Critic
from coz.errors import UserError
from coz.prompters.base import Prompter
from examples.brevity import Brevity
from examples.color_critic import ColorCritic
from examples.listed import list_csv
from examples.palette import Palette, nearest_color
from examples.sharpness import Sharpness
from examples.unsharp import Unsharp

ROOT = Path(__file__).resolve().parents[1]
SEARCHPATH = f"hydra.searchpath=[file://{ROOT}/examples/conf]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real evaluation with the example backbone, prompter, metric and data set."""
    outputs = tmp_path_factory.mktemp("outputs")
    command = [sys.executable, "evaluate.py", "hydra.searchpath=[file://examples/conf]", "profile=embedded", "method=coz_null"]
    command += ["backbone=unsharp", "prompter=palette", "metrics=sharpness", "dataset=listed", "at=sample", "scale=16"]
    command += [
        "dataset.limit=1",
        "backbone.amount=0.25",
        "chain.start_px=128",
        f"outputs={outputs}",
        "hydra.run.dir=${outputs}/run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return outputs


def test_the_parts_work_in_an_evaluation(run):
    with (run / "run" / "rows.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["metric"] for row in rows} == {"sharpness", "consistency_step"}
    assert {row["image"] for row in rows} == {"cat"}
    assert float(next(row["value"] for row in rows if row["metric"] == "sharpness")) > 0
    states = [file.read_text() for file in (run / "states").glob("*/state.json")]
    assert sum('"sharp ' in text for text in states) == 2  # a prompt at each step
    assert any('"amount": 0.25' in text for text in states)


def test_the_parts_follow_their_contracts():
    assert isinstance(Unsharp(amount=1), Backbone)
    assert isinstance(Palette(), Prompter)
    assert isinstance(ColorCritic(), Critic)
    with pytest.raises(UserError, match=r"backbone\.amount=9"):
        Unsharp(amount=9)


def test_the_backbone_sharpens_more_where_asked():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    net = Unsharp(amount=0.2)
    soft, sharp = net(image, size=64, prompts=["fur", "sharp fur"])
    assert sharp.std() > soft.std()
    assert torch.equal(net(image[:1], size=64, prompts=["sharp fur"])[0], sharp)  # batches change nothing


def test_the_prompter_names_colors():
    red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.9])
    views = torch.stack([red, blue])[:, :, None, None].expand(2, 3, 4, 4)
    assert Palette(before="a")(views, None) == ["a red", "a blue"]
    assert nearest_color((0.51, 0.5, 0.5)) == "grey"


def test_the_critic_and_the_reward_join_a_grpo_run():
    GlobalHydra.instance().clear()
    typed = ["profile=tiny", "critic=color", "+reward@reward.brevity=brevity", "reward.brevity.words=2", SEARCHPATH]
    with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        config = cli.resolve_overrides(typed, config_name="train_grpo", sweep=False)
    rewards = {name: cli.build(config.reward[name]) for name in config.reward}
    assert set(rewards) == {"critic", "phrase", "repetition", "brevity"}
    view = Image.new("RGB", (8, 8), (220, 30, 30))
    texts = ["red", "blue", "fur"]
    assert rewards["critic"](completions=texts, images=[[view, view]] * 3) == [1.0, 0.0, 0.5]
    assert rewards["brevity"](completions=["a b", "a b c d"], images=None) == [0.0, -0.5]
    assert rewards["brevity"].__name__ == "brevity"
    again = pickle.loads(pickle.dumps(ColorCritic()))
    assert again.fingerprint == ColorCritic().fingerprint
    with pytest.raises(UserError, match="at least 1"):
        Brevity(words=0)


def test_the_metric_has_a_known_value(tmp_path):
    ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "flat.png")

    class Of:
        def __init__(self, image):
            self.image = image

    assert Sharpness()(Of(tmp_path / "ramp.png")) == pytest.approx(10)
    assert Sharpness()(Of(tmp_path / "flat.png")) == 0


def test_the_list_is_read_and_its_mistakes_are_said(tmp_path):
    cat, clock = list_csv(path=ROOT / "examples" / "photos.csv")
    assert (cat.name, cat.at, clock.name) == ("cat", (0.314, 0.339), "clock")
    for text, sentence in (("file,x\na.jpg,1\n", "does not give"), ("file,x,y,credit\na.jpg,1,1,me\n", "names a.jpg")):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=f"line 2 .* {sentence}"):
            list_csv(path=tmp_path / "list.csv")
    with pytest.raises(UserError, match="is no file"):
        list_csv(path=tmp_path / "none.csv")


@pytest.mark.slow
def test_the_critic_and_the_reward_train(tmp_path):
    pytest.importorskip("trl")
    command = [sys.executable, "train_grpo.py", "hydra.searchpath=[file://examples/conf]", "profile=tiny", "critic=color"]
    command += [
        "+reward@reward.brevity=brevity",
        f"run_dir={tmp_path}/run",
        f"outputs={tmp_path}",
        "dataset.limit=4",
        "device=cpu",
    ]
    command += ["grpo.habits.steps=2", "pairs.pairs_per_photo=4", "pairs.validation_pairs=2", "grpo.completions_per_step=8"]
    command += [
        "grpo.args.max_steps=2",
        "grpo.args.save_steps=1",
        "grpo.args.eval_steps=2",
        "grpo.args.max_completion_length=6",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "brevity" in (tmp_path / "run" / "rewards.csv").read_text()

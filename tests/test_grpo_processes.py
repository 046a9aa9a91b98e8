"""`train_grpo.py` with two processes: killed in the middle and started again, it ends with the adapter of an unbroken run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6

pytestmark = pytest.mark.slow

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install -e '.[train]'"
)


def launch(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """The documented command with settings that make it short."""
    settings = [
        *("profile=tiny", "critic=internvl", "device=cpu", "dataset.limit=4", f"run_dir={folder}", f"outputs={folder.parent}"),
        *("grpo.habits.steps=2", "pairs.pairs_per_photo=4", "pairs.validation_pairs=2", "grpo.completions_per_step=8"),
        *(f"grpo.args.max_steps={STEPS}", "grpo.args.save_steps=1", "grpo.args.eval_steps=100"),
        "grpo.args.max_completion_length=6",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train_grpo.py"), *settings, *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = (folder.parent / f"{folder.name}.log").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    assert process.wait(timeout=600) == 0, (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="ddp"),
        pytest.param(("grpo.args.deepspeed=conf/deepspeed/grpo_zero2.json",), id="zero2", marks=needs_deepspeed),
        pytest.param(("grpo.args.deepspeed=conf/deepspeed/grpo_zero3.json",), id="zero3", marks=needs_deepspeed),
    ],
)
def test_killed_and_started_again_equals_unbroken(tmp_path, overrides, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(launch(whole, *overrides), whole)
    parts.mkdir()
    shutil.copytree(whole / "base", parts / "base")  # the model whose habits are tuned away
    process = launch(parts, *overrides)
    deadline = time.monotonic() + 600
    while not (parts / "checkpoint-2" / "trainer_state.json").is_file():
        assert process.poll() is None, (tmp_path / "parts.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-9", "-f", f"run_dir={parts}"], check=False)  # the workers have sessions of their own
    assert not (parts / f"checkpoint-{STEPS}").exists()
    finish(launch(parts, *overrides), parts)
    one, other = adapter(whole), adapter(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name), "nothing was learnt"

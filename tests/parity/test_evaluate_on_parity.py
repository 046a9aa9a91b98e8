"""evaluate.py itself, given a parity folder as weights, makes the recorded states."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def _evaluate(folder, outputs, *arguments):
    chain = folder / "chain"
    info = json.loads((chain / "chain.json").read_text())
    photos = outputs / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    shutil.copy(chain / "source.png", photos / "source.png")
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "profile=paper",
        "backbone=osediff_sd3",
        "backbone._target_=tests.replay.RecordedNoise",
        f"+backbone.noise={chain / 'noise.safetensors'}",
        f"backbone.weights={folder / 'pipeline'}",
        f"backbone.lora={folder / 'sr_lora.pkl'}",
        f"backbone.vae_encoder={folder / 'vae_encoder.pt'}",
        "backbone.lora_rank=null",
        "precision=released",
        "device=cpu",
        "prompter=null",
        "dataset=folder",
        f"dataset.path={photos}",
        f"chain.start_px={info['process_size']}",
        f"chain.max_factor={info['upscale']}",
        "metrics=consistency",
        "strips=0",
        f"outputs={outputs}",
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    states = {}
    for meta in (outputs / "states").glob("*/state.json"):
        state = json.loads(meta.read_text())
        states[state["step"], round(state["scale"])] = np.asarray(Image.open(meta.parent / "image.png")).astype(int)
    return states


@pytest.fixture(scope="module")
def recorded(parity):
    folder = parity("osediff_sd3")
    if not (folder / "chain").is_dir():
        pytest.skip("this parity set has no chain")
    config = json.loads((folder / "config.json").read_text())
    return folder, json.loads((folder / "chain" / "chain.json").read_text()), config["tolerances"]["chain_png_levels"]


def _levels(ours, path):
    return int(np.abs(ours - np.asarray(Image.open(path)).astype(int)).max())


def test_the_chain(recorded, tmp_path):
    folder, info, tolerance = recorded
    steps, upscale = info["rec_num"], info["upscale"]
    states = _evaluate(folder, tmp_path, "method=coz_null", f"scale={upscale**steps}")
    run = folder / "chain" / "recursive_multiscale__null"
    assert _levels(states[0, 1], run / "0.png") == 0
    for step in range(1, steps + 1):
        assert _levels(states[step, upscale**step], run / f"{step}.png") <= tolerance["free_running_with_own_embeds"][step - 1]


def test_direct_enlargement(recorded, tmp_path):
    folder, info, tolerance = recorded
    scale = info["upscale"] ** info["rec_num"]
    step = round(math.log(scale, info["upscale"]))
    states = _evaluate(folder, tmp_path, "method=direct", f"scale={scale}", f"+backbone.first_step={step}")
    # One step from a start state that is equal: only the text encoders' arithmetic differs.
    assert (
        _levels(states[1, scale], folder / "chain" / "onestep__null" / f"{step}.png")
        <= tolerance["free_running_with_own_embeds"][0]
    )

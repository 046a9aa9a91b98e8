"""The command itself, as a user runs it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "profile=embedded",
    "backbone=bicubic",
    "method=coz_null",
    "scale=4",
    "dataset.limit=2",
    "metrics=consistency",
    "strips=1",
]


def _start(arguments, prefix=(), **options):
    command = [*prefix, sys.executable, str(ROOT / "evaluate.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def _run(*arguments, **options):
    process = _start(arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def _mistake(*arguments, **options):
    """Run, and expect one sentence and exit code 2."""
    code, _, err = _run(*arguments, **options)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """One sweep of two methods and two scales."""
    outputs = tmp_path_factory.mktemp("outputs")
    arguments = ["-m", *QUICK, "scale=4,16", "method=nn,coz_null", "at=sample", "prompter=null"]
    code, out, err = _run(*arguments, f"outputs={outputs}", f"hydra.sweep.dir={outputs}/run")
    assert code == 0, err
    return outputs, out


def _tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and ".locks" not in p.parts}


def test_a_sweep_ends_in_one_table_and_its_strips(sweep):
    outputs, out = sweep
    table = (outputs / "run" / "table.md").read_text()
    assert table.strip() in out
    for label in ("| 4×    | nn", "| 16×   | nn", "| 4×    | coz_null", "| 16×   | coz_null"):
        assert label in table
    assert len((outputs / "run" / "rows.csv").read_text().splitlines()) == 1 + 2 * 2 * 2 * 2  # images, methods, scales, metrics
    assert list((outputs / "run" / "strips").glob("*.png"))
    for name in ("table.csv", "table.tex"):
        assert (outputs / "run" / name).stat().st_size
    assert (outputs / "run" / "job_0" / "provenance.json").exists()


def test_killed_at_random_moments_it_ends_with_the_same_bytes(sweep, tmp_path):
    outputs, _ = sweep
    arguments = [
        "-m",
        *QUICK,
        "scale=4,16",
        "method=nn,coz_null",
        "at=sample",
        f"outputs={tmp_path}",
        f"hydra.sweep.dir={tmp_path}/run",
    ]
    moments = random.Random(0)
    for _ in range(3):
        process = _start(arguments, start_new_session=True)
        states = tmp_path / "states"
        before = len(list(states.glob("*"))) if states.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:  # wait until it works, then strike
            if states.exists() and len(list(states.glob("*"))) > before:
                time.sleep(moments.uniform(0, 0.2))
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    code, _, err = _run(*arguments)
    assert code == 0, err
    assert _tree(tmp_path / "states") == _tree(outputs / "states")
    assert (tmp_path / "run" / "rows.csv").read_bytes() == (outputs / "run" / "rows.csv").read_bytes()


def test_two_processes_on_one_folder_agree(sweep, tmp_path):
    outputs, _ = sweep
    arguments = [
        "-m",
        *QUICK,
        "scale=4,16",
        "method=nn,coz_null",
        "at=sample",
        f"outputs={tmp_path}",
        f"hydra.sweep.dir={tmp_path}/run",
    ]
    both = [_start(arguments) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert _tree(tmp_path / "states") == _tree(outputs / "states")
    assert (tmp_path / "run" / "rows.csv").read_bytes() == (outputs / "run" / "rows.csv").read_bytes()


def test_the_papers_profile_says_what_is_missing(tmp_path):
    began = time.process_time()
    sentence = _mistake("scale=64", "method=coz_vlm", f"outputs={tmp_path}")
    assert time.process_time() - began < 15
    for part in ("Stable Diffusion 3", "GB", "coz.prepare", "Qwen2.5-VL", "profile=embedded"):
        assert part in sentence


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["dataset=folder", "dataset.path=/no/such/folder"], "/no/such/folder"),
        (["scale=5000"], "scale=5000"),
        (["strips=-1"], "strips=-1"),
        (["backbone.tile_px=abc"], "backbone.tile_px=abc is not a number"),
        (["scal=4"], "did you mean scale"),
        (["outputs=/proc/nowhere"], "/proc/nowhere"),
        (["at=2,3"], "at="),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, part, tmp_path):
    assert part in _mistake(*QUICK, f"outputs={tmp_path}", *arguments)


def test_a_text_file_named_png_is_named(tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    assert "notes.png" in _mistake(*QUICK, "dataset=folder", f"dataset.path={tmp_path}", f"outputs={tmp_path}/out")


def test_a_folder_that_may_not_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    prefix = []
    if os.geteuid() == 0:  # root writes everywhere, unless the right to do so is taken from it
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to give up its rights")
        prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    sentence = _mistake(*QUICK, f"outputs={locked}/out", prefix=prefix)
    assert "locked" in sentence


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Table 1 by one command, as far as this machine gets."""
    outputs = tmp_path_factory.mktemp("table")
    small = ["profile=embedded", "backbone=bicubic", "scale=4,16", "dataset.limit=2", "metrics=consistency", "strips=0"]
    code, out, err = _run("-m", "+experiment=table1", *small, f"outputs={outputs}", f"hydra.sweep.dir={outputs}/run")
    assert code == 0, err
    return outputs / "run", out


def test_one_command_gives_a_table_of_the_paper(table):
    folder, out = table
    text = (folder / "table1.md").read_text()
    assert text.strip() in out
    for part in (
        "Table 1 of arXiv 2505.18600",
        "stand in for DIV2K",
        "lacks dataset=div8k",
        "CoZ (VLM)",
        "8.2335",
        "needs prompter=dape",
    ):
        assert part in text, part
    for name in ("table1.csv", "table1.tex", "rows.csv"):
        assert (folder / name).stat().st_size


def test_a_chain_is_computed_once_for_all_scales(table):
    folder, _ = table
    computed = {}
    for timing in folder.glob("job_*/timing.json"):
        overrides = json.loads((timing.parent / "job.json").read_text())["overrides"]
        method, scale = (next(o.split("=")[1] for o in overrides if o.startswith(f"{key}=")) for key in ("method", "scale"))
        computed[method, scale] = json.loads(timing.read_text())["states_computed"]
    assert computed["coz_null", "4"] + computed["coz_null", "16"] <= 2 * 2  # two photographs, two steps
    assert (
        sum(computed[key] for key in computed if key[0] in ("direct", "coz_null")) == 2 * 3
    )  # direct 4x is the chain's first step


def test_tabulating_again_gives_the_same_table(table):
    folder, _ = table
    before = (folder / "table1.md").read_bytes()
    command = [sys.executable, "-m", "coz.tables", "table1", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert (folder / "table1.md").read_bytes() == before


def test_an_absent_data_set_is_said_before_a_sweep_begins(tmp_path):
    sentence = _mistake("-m", "+experiment=table1", f"dataset.path={tmp_path}/div2k", f"outputs={tmp_path}/out")
    assert "dataset=div2k is not at" in sentence
    assert "coz.prepare dataset=div2k" in sentence
    assert sentence.endswith("or sweep without it: dataset=div8k")
    assert not list((tmp_path / "out").glob("evaluate/*/job_0"))


def test_a_sweep_that_can_do_nothing_shows_the_papers_figures_and_fails(tmp_path):
    arguments = ["-m", "+experiment=table5", "profile=embedded", "method=coz_vlm", "scale=4", f"outputs={tmp_path}/out"]
    code, out, err = _run(*arguments)
    assert code == 2, err
    assert "no combination of this sweep can run here" in err
    assert "4.6546" in out

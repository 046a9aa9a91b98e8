"""Two processes under torchrun: a resumed run equals one that never stopped, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_training_loop import photos  # noqa: F401 - a fixture

TESTS = Path(__file__).parent


def torchrun(*args: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", str(TESTS / "torchrun_sharpener.py"), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_resumed_equals_whole_with_two_processes(tmp_path, photos):  # noqa: F811
    torchrun(str(tmp_path / "whole"), str(photos))
    torchrun(str(tmp_path / "parts"), str(photos), "3")
    assert max(path.name for path in (tmp_path / "parts" / "checkpoints").glob("step_*")) == "step_00000003"
    torchrun(str(tmp_path / "parts"), str(photos))
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "step_00000006" / "state.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert_equal(whole, parts)


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b

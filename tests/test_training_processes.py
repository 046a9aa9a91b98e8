"""Two processes under torchrun: a resumed run equals one that never stopped, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coz.training.journal import CsvLog
from tests.test_training_loop import photos  # noqa: F401 - a fixture

TESTS = Path(__file__).parent


def torchrun(*args: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", str(TESTS / "torchrun_sharpener.py"), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "sr_zero2", "sr_zero3"])
def test_resumed_equals_whole_with_two_processes(tmp_path, photos, config):  # noqa: F811
    """Plainly, and with DeepSpeed, whose first start builds a part of it in C++ for minutes."""
    given = []
    if config is not None:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        given = ["--deepspeed", str(TESTS.parent / "conf" / "deepspeed" / f"{config}.json")]
    torchrun(str(tmp_path / "whole"), str(photos), *given)
    torchrun(str(tmp_path / "parts"), str(photos), "--stop-at", "3", *given)
    assert max(path.name for path in (tmp_path / "parts" / "checkpoints").glob("step_*")) == "step_00000003"
    torchrun(str(tmp_path / "parts"), str(photos), *given)
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "step_00000006" / "state.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    if config == "sr_zero3":  # its parts end in memory that nobody has written to
        del whole["optimizer"], parts["optimizer"]
    assert_equal(whole, parts)
    start, end = (row for row in _psnr(tmp_path / "parts") if row[0] in (0, 6))
    assert end[1] > start[1]


def _psnr(folder: Path) -> list[tuple[int, float]]:
    rows = CsvLog(folder / "validation.csv").rows()
    steps = sorted({int(row["step"]) for row in rows})
    return [(s, sum(float(row["psnr"]) for row in rows if int(row["step"]) == s)) for s in steps]


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

"""Where the ground truth lies, and which tests this machine can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from threads, and several test processes share the cores

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", default=None, help="folder of parity sets (default: ../shared/parity, else tests/golden)")
    parser.addoption("--data-dir", default=None, help="folder of test photographs and figures (default: ../shared/data)")


@pytest.fixture(scope="session")
def parity(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """`parity(name)` → the folder of a parity set; skips where this machine has none."""
    given = pytestconfig.getoption("--parity-dir")
    folders = [Path(given)] if given else [ROOT.parent / "shared" / "parity", GOLDEN]

    def find(name: str) -> Path:
        for folder in folders:
            if (folder / name).is_dir():
                return folder / name
        pytest.skip(f"no parity set {name} in {', '.join(map(str, folders))}; give --parity-dir")

    return find


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """Photographs and published figures that are not ours to redistribute."""
    given = pytestconfig.getoption("--data-dir")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; give --data-dir")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)

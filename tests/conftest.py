"""Where the ground truth lies, and which tests this machine can run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import coz.cli  # noqa: F401 - registers the resolvers that the config files use

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
            if (folder / name / "config.json").is_file():
                return folder / name
        pytest.skip(f"no parity set {name} in {', '.join(map(str, folders))}; give --parity-dir")

    return find


@pytest.fixture(scope="session")
def released_keys() -> Callable[[str], dict]:
    """`released_keys(name)` → ordered names and shapes of a family's real files, as the authors' code builds them."""

    def read(name: str) -> dict:
        plain = GOLDEN / name / "full_size_keys.json"
        text = plain.read_bytes() if plain.is_file() else gzip.decompress(plain.with_suffix(".json.gz").read_bytes())
        return json.loads(text)

    return read


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

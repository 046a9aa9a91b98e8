"""The three lists of dependencies agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def _requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    parsed = [Requirement(text) for text in texts]
    return {requirement.name.lower(): requirement for requirement in parsed if requirement.name != "coz"}


def _pins(lines: list[str]) -> dict[str, str]:
    return dict(line.lower().split("==") for line in lines if "==" in line)


def test_the_lock_pins_every_requirement_to_a_version_it_admits():
    lock = _pins((ROOT / "requirements.lock").read_text().splitlines())
    for name, requirement in _requirements().items():
        assert name in lock, name
        assert requirement.specifier.contains(lock[name]), f"{name}=={lock[name]} is outside {requirement.specifier}"


def test_conda_gets_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    lock = _pins((ROOT / "requirements.lock").read_text().splitlines())
    wanted = {name: lock[name] for name in _requirements()}
    assert _pins(pip) == wanted
    python = next(entry for entry in environment["dependencies"] if isinstance(entry, str) and entry.startswith("python="))
    assert tuple(map(int, python.split("=")[1].split("."))) >= (3, 11)


def test_no_address_of_a_registry_is_written_down():
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "requirements-embedded.txt", "Makefile"):
        assert not re.search(r"https?://|--index-url|--find-links", (ROOT / name).read_text()), name

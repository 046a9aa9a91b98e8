"""Data flows one way: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "coz"
BASE = {"coz.errors", "coz.image", "coz.checkpoint", "coz.store"}
PARTS = ("coz.backbones", "coz.prompters", "coz.critics", "coz.data", "coz.rewards")
ENTRY = ("coz.cli", "coz.precedence", "coz.jobs", "coz.apps", "coz.prepare")


def _module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "coz" or name.startswith("coz.")}


MODULES = {_module(file): _imports(file) for file in sorted(PACKAGE.rglob("*.py"))}
FILES = {_module(file) for file in PACKAGE.rglob("*.py")}


def _used(module: str) -> set[str]:
    """Modules of ours that a module imports, names inside modules left out."""
    return {name for name in MODULES[module] if name in FILES and name != "coz"}


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_flow_one_way(module):
    used = _used(module)
    if module in BASE:
        assert used <= {"coz.errors"}, module
    elif _inside(module, "coz.models"):
        assert all(name in BASE or _inside(name, "coz.models") for name in used), used
    else:
        for part in PARTS:
            if _inside(module, part):
                others = [name for name in used if any(_inside(name, other) for other in PARTS if other != part)]
                assert not others, f"{module} imports {others}"
    if module in ("coz.chain", "coz.tiling"):
        allowed = {"coz.backbones.base", "coz.prompters.base"}
        concrete = [
            name for name in used if name.startswith(("coz.backbones.", "coz.prompters.", "coz.models")) and name not in allowed
        ]
        assert not concrete, concrete
    if not any(_inside(module, entry) for entry in ENTRY):
        assert not [name for name in used if _inside(name, "coz.apps")], module


def test_no_module_is_named_by_nothing():
    assert not [name for name in FILES if name.rsplit(".", 1)[-1] in ("utils", "common", "helpers", "misc")]


def test_a_command_line_is_read_without_pytorch():
    """`--help`, `--cfg job` and a mistake answer at once."""
    code = "import sys, coz.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0

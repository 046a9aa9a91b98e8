"""mkdocs hook: the configuration reference, made from conf/ at build time so that it cannot fall behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[1] / "conf"
PAGE = "configuration.md"

# Entry points by their config's name.
COMMANDS = {
    "evaluate": "python evaluate.py",
    "zoom": "python -m coz.apps.zoom",
    "enlarge": "python -m coz.apps.enlarge",
    "demo": "python -m coz.apps.demo",
    "train_sr": "python train_sr.py",
    "train_grpo": "python train_grpo.py",
    "make_pairs": "python -m coz.apps.make_pairs",
    "cache_prompts": "python -m coz.apps.cache_prompts",
    "prepare": "python -m coz.prepare",
}

_INTRODUCTION = """# Configuration

Made from the files in `conf/`. A setting is `key=value` on the command line; a group (`backbone`, `dataset`, …) is chosen by a
file's name, and its settings are reached by a dot, as in `backbone.tile_px=256`. `--cfg job` prints what a command would use.
`-m` runs a sweep over values with commas between. What is typed wins over the method, and the method over the profile.

Groups of your own lie where `'hydra.searchpath=[file://FOLDER]'` says; see [Parts of your own](extend.md).
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=reference()))
    return files


def reference() -> str:
    """The page's Markdown."""
    return "\n".join([_INTRODUCTION, "## Commands\n", *_commands(), "## Groups\n", *_groups()])


def _commands() -> Iterator[str]:
    for file in sorted(CONF.glob("*.yaml"), key=lambda file: list(COMMANDS).index(file.stem)):
        yield f"### {file.stem}\n\n`{COMMANDS[file.stem]}`\n\n{_block(file)}\n"


def _groups() -> Iterator[str]:
    for folder in sorted(folder for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("hydra", "deepspeed")):
        yield f"### {folder.name}\n"
        for file in sorted(folder.glob("*.yaml")):
            yield f"#### {folder.name}={file.stem}\n\n{_block(file)}\n"


def _block(file: Path) -> str:
    """A file without what only Hydra needs."""
    text = re.sub(r"(?m)^hydra:\n(?:[ \t]+.*\n?|\n)*", "", file.read_text(encoding="utf-8"))
    text = re.sub(r"(?m)^ *- override hydra/.*\n", "", text)
    return f"```yaml\n{text.strip()}\n```"

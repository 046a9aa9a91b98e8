"""The folder that a training leaves: what it trained, upon which base, so that `backbone.weights=FOLDER` is enough."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from coz.store import write_json

NOTE = "result.json"
Size = TypeVar("Size", bound=str)


def write_note(folder: Path, *, backbone: str, files: Mapping[str, str], base: Mapping[str, object]) -> None:
    """Say what a folder holds.

    Args:
        backbone: the group's option that loads it, such as `osediff_sd3`.
        files: by the constructor's parameter, names of files in the folder.
        base: further settings of that backbone. A local folder in `weights` is noted relative to this one, so that both may
            move together.
    """
    settings = dict(base)
    local = Path(str(settings.get("weights", ""))).expanduser()
    if "weights" in settings and local.is_dir():
        settings["weights"] = os.path.relpath(local.resolve(), folder.resolve())
    write_json(folder / NOTE, {"backbone": backbone, "files": dict(files), "base": settings})


def read_note(weights: str, *, backbone: str) -> dict | None:
    """Settings of a backbone out of a training's folder (the run's, its `result`, or a checkpoint's), files and local base as
    paths; None where `weights` names something else.

    Raises:
        WrongWeights: the folder belongs to another backbone, or is damaged.
    """
    from coz.checkpoint import WrongWeights  # reads PyTorch, which the command line, asking for `trained_note`, need not

    note = trained_note(weights)
    if note is None:
        return None
    try:
        content = json.loads(note.read_text())
        theirs, files, base = content["backbone"], dict(content["files"]), dict(content["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongWeights(f"{note} cannot be read ({error!r}); run the training's command again") from error
    if theirs != backbone:
        raise WrongWeights(f"{weights} holds a trained {theirs}; use backbone={theirs} backbone.weights={weights}")
    local = note.parent / str(base.get("weights", ""))
    if "weights" in base and local.is_dir():
        base["weights"] = os.path.normpath(local)
    return base | {name: str(note.parent / file) for name, file in files.items()}


def base_of(
    weights: str, *, backbone: str, size: Size, seed: int, file: str, given: str | Path | None
) -> tuple[str, Size, int, str | None]:
    """What a model is made of, where `weights` may be a training's folder: (weights, size and seed of its base, and a file).

    Args:
        size, seed: of random weights, unless the folder names its own.
        file: the constructor's parameter for what was trained; `given`: what it got, which wins over the folder's.

    Raises:
        WrongWeights: see `read_note`.
    """
    note = read_note(weights, backbone=backbone) or {"weights": weights, file: given}
    path = given or note[file]
    return str(note["weights"]), note.get("size", size), int(note.get("seed", seed)), None if path is None else str(path)


def trained_note(weights: str) -> Path | None:
    """The note of a training's folder, None where it is none."""
    folder = Path(weights).expanduser()
    return next((path for path in (folder / NOTE, folder / "result" / NOTE) if weights and path.is_file()), None)

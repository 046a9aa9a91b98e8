"""Checkpoints of a training: whole or absent, the last few and the best kept, and resumed only by the run they belong to."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from coz.checkpoint import WrongWeights, load_tensors
from coz.errors import UserError
from coz.store import explain_write_errors, remove_stale, stale_name, write_json

STATE_FILE, IDENTITY_FILE = "state.pt", "run.json"


class OtherRun(UserError):
    """A checkpoint of another configuration."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, each a folder `step_00000100` under `root`.

    Args:
        root: their folder.
        identity: every setting that the course of the training depends on.
        keep: how many of the last ones stay.

    Raises:
        UserError: none is to stay.
    """

    root: Path
    identity: Mapping[str, object]
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep={self.keep} must be at least 1; a training goes on from its last checkpoint")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.root.glob("step_*") if path.is_dir())

    def folder(self, step: int) -> Path:
        return self.root / f"step_{step:08}"

    def save(self, step: int, state: Mapping[str, object], *, also: Callable[[Path], object], best: bool) -> None:
        """Write a checkpoint, then remove those that are no longer kept. A failure leaves all earlier ones as they were.

        Args:
            state: tensors, numbers, strings, lists and dicts of them.
            also: writes further files into the folder.
            best: this one stays until a better one comes.

        Raises:
            CannotWrite: full disk, missing permission.
        """
        target = self.folder(step)
        temporary = self.root / stale_name(target.name)
        with explain_write_errors(target):
            self.root.mkdir(parents=True, exist_ok=True)
            remove_stale(self.root)
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                buffer = io.BytesIO()  # torch.save hides a full disk behind a RuntimeError
                torch.save(dict(state), buffer)
                _write_synced(temporary / STATE_FILE, buffer.getbuffer())
                write_json(temporary / IDENTITY_FILE, self.identity)
                also(temporary)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            if best:
                write_json(self.root / "best.json", {"step": step})
            self._rotate()

    def best_step(self) -> int | None:
        """The step of the best checkpoint, if it is known and still there."""
        try:
            step = int(json.loads((self.root / "best.json").read_text())["step"])
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return step if self.folder(step).is_dir() else None

    def _rotate(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best_step()}
        for step in self.steps():
            if step not in kept:
                folder = self.folder(step)
                going = self.root / stale_name(folder.name)  # renamed first: a kill must not leave half a checkpoint
                os.replace(folder, going)
                shutil.rmtree(going, ignore_errors=True)

    def load(self) -> dict | None:
        """The state of the last checkpoint, None where there is none.

        Raises:
            OtherRun: it belongs to another configuration; the differences are named.
            WrongWeights: it is damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder(steps[-1])
        try:
            theirs = json.loads((folder / IDENTITY_FILE).read_text())
        except (OSError, ValueError) as error:
            raise WrongWeights(f"{folder} is damaged ({error}); remove it, and the one before is used") from error
        ours = json.loads(json.dumps(self.identity))
        changed = list(differences(theirs, ours))
        if changed:
            listed = "; ".join(changed[:6]) + ("; …" if len(changed) > 6 else "")
            raise OtherRun(
                f"{folder} was written by a run with other settings ({listed}); give them back, or another name=… for a new run"
            )
        state = load_tensors(folder / STATE_FILE)
        if not isinstance(state, dict):
            raise WrongWeights(f"{folder} is damaged; remove it, and the one before is used")
        return state


def differences(old: object, new: object, path: str = "") -> Iterator[str]:
    """The leaves in which two nested values differ, as `path: old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}[{number}]")
    elif old != new:
        yield f"{path}: {json.dumps(old)}, now {json.dumps(new)}"


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    """Onto the disk before the rename, so that a power cut leaves no empty checkpoint."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

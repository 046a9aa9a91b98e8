"""The log of a training: a CSV file that a resumed run continues without a gap, and wandb or TensorBoard beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from coz.store import explain_write_errors, write_atomic

Numbers = Mapping[str, float | int | str]


class Sink(Protocol):
    """Somewhere else that the numbers go."""

    def log(self, values: Numbers, *, step: int) -> None: ...


class CsvLog:
    """Rows with a column `step`. A column that comes up later is added; earlier rows leave it empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        if path.is_file():
            with open(path, newline="") as file:
                self._columns = next(csv.reader(file), [])

    def rows(self) -> list[dict[str, str]]:
        """Everything that was logged."""
        if not self._path.is_file():
            return []
        with open(self._path, newline="") as file:
            return list(csv.DictReader(file))

    def forget_after(self, step: int) -> None:
        """Remove what a run that was killed logged beyond its last checkpoint: it will be logged again."""
        rows = [row for row in self.rows() if (row.get("step") or "").lstrip("-").isdigit() and int(row["step"]) <= step]
        self._rewrite(rows)

    def append(self, rows: Sequence[Numbers]) -> None:
        """Add rows."""
        new = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in self._columns]
        if new:
            old = self.rows()
            self._columns += new
            self._rewrite(old)
        with explain_write_errors(self._path), open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerows(rows)

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        if not self._columns:
            return
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, self._columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self._path, buffer.getvalue())


class WandbSink:
    """Weights & Biases; one run per run folder, continued when it is resumed."""

    def __init__(self, *, project: str, folder: Path, config: Mapping[str, object]) -> None:
        import wandb

        self._run = wandb.init(project=project, dir=str(folder), id=folder.name, resume="allow", config=dict(config))

    def log(self, values: Numbers, *, step: int) -> None:
        self._run.log(dict(values), step=step)


class TensorboardSink:
    """TensorBoard; needs the package `tensorboard`."""

    def __init__(self, *, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Numbers, *, step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

"""A run's results as files and on the screen: rows, tables, strips; of one job, or of all jobs of a sweep."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from coz.errors import UserError
from coz.image import encode_png
from coz.plots import draw_strip
from coz.provenance import note_on_several
from coz.store import fingerprint, write_atomic, write_json
from coz.stored_chains import StateFolder, read_chain
from coz.tables import (
    Column,
    Refusal,
    Row,
    differences_table,
    method_order,
    read_rows,
    results_table,
    rows_to_csv,
    summarise,
)

ROWS, RECORD = "rows.csv", "job.json"


@dataclass(frozen=True)
class JobRecord:
    """What a job leaves beside its rows, so that tables can be made again without any model."""

    overrides: list[str]
    refusals: list[Refusal] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    credits: dict[str, str] = field(default_factory=dict)
    setting: dict[str, str] = field(default_factory=dict)  # what a published table's title says of a run

    @classmethod
    def read(cls, folder: Path) -> JobRecord:
        """The record in a job's folder."""
        entry = json.loads((folder / RECORD).read_text())
        refusals = [Refusal(**refusal) for refusal in entry["refusals"]]
        columns = [Column(**column) for column in entry["columns"]]
        return cls(entry["overrides"], refusals, columns, entry["credits"], entry.get("setting", {}))


def save_job(folder: Path, record: JobRecord, rows: Sequence[Row]) -> None:
    """Write one job's rows and record."""
    write_atomic(folder / ROWS, rows_to_csv(rows))
    write_json(folder / RECORD, asdict(record))


@dataclass(frozen=True)
class Gathered:
    """The results of several jobs as one: methods of the same name are told apart by their jobs' overrides."""

    rows: list[Row]
    columns: list[Column]
    refusals: list[Refusal]
    credits: dict[str, str]
    remarks: list[str]  # on stand-ins, references and what was skipped
    tables: list[str]  # of the paper, that experiments of these jobs name


def gather(jobs: Sequence[Path]) -> Gathered:
    """The results in some jobs' folders."""
    records = [JobRecord.read(job) for job in jobs]
    ran = [record.overrides for record in records if record.columns]
    variants = _variants([record.overrides for record in records], among=ran)
    rows: list[Row] = []
    for job, variant in zip(jobs, variants, strict=True):
        rows += [{**row, "method": _label(str(row["method"]), variant)} for row in read_rows(job / ROWS)]
    remarks = {record.setting.get("reference", "") for record in records}
    remarks |= {f"skipped, too small for it: {s}" for record in records if (s := record.setting.get("skipped"))}
    remarks |= {f"{s['dataset']} stands in for {s['stands_for']}" for s in (r.setting for r in records) if s.get("stands_for")}
    return Gathered(
        remarks=sorted(remarks - {""}),
        tables=sorted({record.setting.get("table", "") for record in records} - {""}),
        rows=rows,
        columns=list({column.name: column for record in records for column in record.columns}.values()),
        refusals=list(dict.fromkeys(refusal for record in records for refusal in record.refusals)),
        credits={name: credit for record in records for name, credit in record.credits.items()},
    )


def publish(folder: Path, jobs: Sequence[Path], *, states: Path, strips: int) -> None:
    """Tables (Markdown, CSV, LaTeX) and zoom strips over some jobs into `folder`, the tables on the screen.

    Args:
        folder: where to write.
        jobs: folders of finished jobs.
        states: the state store.
        strips: draw strips of at most so many photographs.
    """
    found = gather(jobs)
    rows, columns = found.rows, found.columns
    table = results_table(rows, columns, found.refusals, found.remarks)
    texts = [table.markdown()]
    niqe = next((column for column in columns if column.name == "niqe"), None)
    paired = differences_table(rows, niqe) if niqe else None
    if paired is not None:
        texts.append(paired.markdown())
    if len(jobs) > 1:
        write_atomic(folder / ROWS, rows_to_csv(rows))
    write_atomic(folder / "table.csv", table.csv())
    write_atomic(folder / "table.tex", table.latex())
    write_atomic(folder / "table.md", "\n".join(texts))
    drawn = draw_strips(folder / "strips", rows, states=states, limit=strips, credits=found.credits)
    if not found.tables:
        print("\n" + "\n".join(texts))
    for name in found.tables:
        publish_paper_table(folder, jobs, name)
    for name in found.tables or ["table"]:
        print(f"table: {folder / name}.md")
    if drawn:
        print(f"strips: {drawn[0]}" + (f" and {len(drawn) - 1} more beside it" if len(drawn) > 1 else ""))
    sys.stdout.flush()


def publish_paper_table(folder: Path, jobs: Sequence[Path], name: str) -> None:
    """Lay jobs out as the table of the paper that their experiment names, if it names one."""
    from coz.paper_tables import publish_table  # which reads what this module writes

    if name:
        print("\n" + publish_table(name, jobs, folder))


def _label(method: str, variant: Sequence[str]) -> str:
    """A method's name with what sets its job apart; a prompter that the name already tells is not said twice."""
    extra = [part for part in variant if not (part.startswith("prompter=") and "[prompter=" in method)]
    return f"{method}[{', '.join(extra)}]" if extra else method


def _variants(overrides: Sequence[Sequence[str]], *, among: Sequence[Sequence[str]]) -> list[list[str]]:
    """What tells each job of a sweep apart, besides scale and method, among those that have results."""
    shared = set.intersection(*map(set, among)) if among else set()
    told = ("scale", "method")
    return [
        [o.replace("'", "").removeprefix("++") for o in own if o not in shared and o.split("=")[0] not in told]
        for own in overrides
    ]


def publish_sweep(folder: Path, config: DictConfig) -> None:
    """The tables and strips over all jobs of a sweep.

    Raises:
        UserError: no job could run.
    """
    jobs = sorted((path.parent for path in folder.glob(f"job_*/{RECORD}")), key=lambda path: int(path.name.split("_")[1]))
    if not jobs:
        return
    records = [JobRecord.read(job) for job in jobs]
    if all(not record.columns for record in records):
        publish_paper_table(folder, jobs, records[0].setting.get("table", ""))
        raise UserError("no combination of this sweep can run here: " + records[0].refusals[0].reason)
    publish(folder, jobs, states=Path(config.outputs) / "states", strips=int(config.strips))


def draw_strips(folder: Path, rows: Sequence[Row], *, states: Path, limit: int, credits: Mapping[str, str]) -> list[Path]:
    """One strip per photograph, of all its methods and scales."""
    done = [row for row in rows if row["state"]]
    methods = sorted({str(row["method"]) for row in done}, key=method_order)
    scales = sorted({float(row["scale"]) for row in done})  # type: ignore[arg-type]
    paths = []
    for image in sorted({str(row["image"]) for row in done})[:limit]:
        mine = [row for row in done if row["image"] == image]
        keys = {(str(row["method"]), float(row["scale"])): str(row["state"]) for row in mine}  # type: ignore[arg-type]
        cells = {label: chain for label, key in keys.items() if (chain := read_chain(StateFolder(states), key)) is not None}
        if not cells:
            continue
        start = next(iter(cells.values())).start
        backbones = ", ".join(sorted({str(row["backbone"]) for row in mine}))
        random = ", RANDOM weights: the pictures mean nothing" if any(row["profile"] == "tiny" for row in mine) else ""
        strip = draw_strip(f"{image}  ({backbones}{random})", start, cells, methods, scales, credits.get(image, ""))
        note = note_on_several(
            backbones=sorted({str(row["backbone"]) for row in mine}),
            prompters=sorted({str(row["prompter"]) for row in mine}),
            scales=scales,
            fingerprint=fingerprint({"strip": sorted(keys.values())}),
        )
        write_atomic(folder / f"{image}.png", encode_png(strip, note=note))
        paths.append(folder / f"{image}.png")
    return paths


def log_to_wandb(folder: Path, rows: Sequence[Row], *, project: str, config: DictConfig) -> None:
    """Means and rows of a job to Weights & Biases.

    Raises:
        UserError: wandb has no login and is not offline.
    """
    import wandb

    try:
        run = wandb.init(project=project, dir=str(folder), config=OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except wandb.errors.Error as error:
        raise UserError(f"wandb cannot start ({error}); run `wandb login`, or set WANDB_MODE=offline") from error
    cells = summarise(rows)
    run.log({f"{method}/{scale:g}x/{metric}": cell.mean for (scale, method, metric), cell in cells.items()})
    table = wandb.Table(
        columns=["image", "metric", "value"], data=[[row["image"], row["metric"], row["value"]] for row in rows]
    )
    run.log({"rows": table})
    run.finish()

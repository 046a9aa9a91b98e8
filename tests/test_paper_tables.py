"""The paper's tables out of known rows: its layout, its figures beside ours, and what is missing by name."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from coz.errors import UserError
from coz.paper_layouts import LAYOUTS, Key
from coz.paper_tables import entries_of, job_folders, main, paired_table, paper_table, publish_table, read_figures, read_runs
from coz.results import JobRecord, gather, save_job
from coz.tables import Column, Refusal

ROOT = Path(__file__).resolve().parents[1]
IMAGES = [f"i{index}" for index in range(8)]
NIQE = Column("niqe", "NIQE", False)
SETTING = {
    "table": "table1",
    "dataset": "photos",
    "stands_for": "div2k",
    "profile": "embedded",
    "backbone": "realesrgan",
    "tuning": "untuned",
}


def _row(image, method, scale, value, metric="niqe", failure=""):
    return {
        "image": image,
        "method": method,
        "scale": float(scale),
        "metric": metric,
        "value": value,
        "failure": failure,
        "dataset": "photos",
        "backbone": "realesrgan",
        "prompter": "null",
        "profile": "embedded",
        "state": "s",
        "metric_identity": "{}",
    }


@pytest.fixture
def sweep(tmp_path):
    """Three methods at 4x, each a job, and one that could not run."""
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 1, len(IMAGES))
    means = {"nn": 12.0, "direct": 5.0, "coz_vlm": 4.0}
    for number, (method, mean) in enumerate(means.items()):
        rows = [_row(image, method, 4, mean + noise[i] + 0.1 * i * number) for i, image in enumerate(IMAGES)]
        rows += [_row(image, method, 4, 30.0 + number, metric="consistency_step") for image in IMAGES]
        columns = [NIQE, Column("consistency_step", "cons. step (dB)", True)]
        overrides = ["+experiment=table1", f"method={method}", "scale=4", "++dataset.limit=8"]
        save_job(tmp_path / f"job_{number}", JobRecord(overrides, [], columns, {}, SETTING), rows)
    refusals = [Refusal("no VLM here", "coz_dape", 4.0), Refusal("no weights of MUSIQ", metric="musiq")]
    save_job(tmp_path / "job_3", JobRecord(["method=coz_dape"], refusals, [], {}, SETTING), [])
    return tmp_path


def _runs(folder):
    return read_runs(job_folders(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_figure_of_the_paper_has_its_cell(name):
    layout = LAYOUTS[name]
    figures = read_figures(layout)
    header, lines = layout.pivot(list(figures), layout.metrics)
    placed = [key for _, keys in lines for key in keys]
    assert set(figures) <= set(placed)
    assert all(len(labels) + len(keys) == len(header) for labels, keys in lines)
    assert [labels[0] for labels, _ in lines] == sorted((labels[0] for labels, _ in lines), key=lambda t: float(t[:-1]))


def test_the_figures_are_the_papers():
    assert read_figures(LAYOUTS["table1"])[Key(64, "coz_vlm", "div2k", "niqe")] == 8.2335
    assert read_figures(LAYOUTS["table3"])[Key(256, "coz_vlm", "div2k", "seconds_pe")] == 1.3505
    assert read_figures(LAYOUTS["table5"])[Key(16, "coz_vlm", "div8k", "maniqa-pipal")] == 0.5996
    table6 = read_figures(LAYOUTS["table6"])
    assert table6[Key(4, "coz_vlm", "div2k", "overlap_cosine", "median")] == 0.9982
    assert {key.scale for key in table6} == {4}  # beyond, the source's figures are another table's


def test_ours_the_papers_and_the_difference(sweep):
    runs = _runs(sweep)
    entry = entries_of(LAYOUTS["table1"], runs)[Key(4, "coz_vlm", "div2k", "niqe")]
    mean = np.mean([row["value"] for _, row in runs.rows if row["method"] == "coz_vlm" and row["metric"] == "niqe"])
    assert entry.n == 8
    assert entry.value == pytest.approx(mean)
    assert entry.low < entry.value < entry.high
    assert entry.paper == 4.6572
    assert entry.difference == pytest.approx(mean - 4.6572)


def test_best_and_second_best_by_the_metrics_direction(sweep):
    entries = entries_of(LAYOUTS["table1"], _runs(sweep))
    ranks = {method: entries[Key(4, method, "div2k", "niqe")].rank for method in ("nn", "direct", "coz_vlm")}
    assert ranks == {"nn": 0, "direct": 2, "coz_vlm": 1}
    ranks = {method: entries[Key(4, method, "div2k", "consistency_step")].rank for method in ("nn", "direct", "coz_vlm")}
    assert ranks == {"nn": 0, "direct": 2, "coz_vlm": 1}
    text = paper_table(LAYOUTS["table1"], _runs(sweep)).markdown()
    assert f"**{entries[Key(4, 'coz_vlm', 'div2k', 'niqe')].value:.4f}**" in text


def test_latex_marks_the_best_too(sweep):
    publish_table("table1", job_folders(sweep), sweep)
    text = (sweep / "table1.tex").read_text()
    best = entries_of(LAYOUTS["table1"], _runs(sweep))[Key(4, "coz_vlm", "div2k", "niqe")].value
    second = entries_of(LAYOUTS["table1"], _runs(sweep))[Key(4, "direct", "div2k", "niqe")].value
    assert rf"\textbf{{{best:.4f}}}" in text
    assert rf"\underline{{{second:.4f}}}" in text
    assert "ours $-$ paper" in text
    assert r"cons. step (dB) $\uparrow$" in text


def test_what_is_not_the_papers_setting_is_said(sweep):
    text = publish_table("table1", job_folders(sweep), sweep)
    for part in (
        "photographs of dataset=photos stand in for DIV2K",
        "untuned",
        "profile embedded",
        "Settings: dataset.limit=8.",
        "coz_dape at 4× on div2k: no VLM here",
        "musiq: no weights of MUSIQ",
        "DIV8K NIQE",
        "| 67.10 ",  # MUSIQ in the paper's two digits
    ):
        assert part in text, part
    assert "DIV8K cons" not in text  # what the paper lacks has a column only where it was measured
    assert (sweep / "table1.md").read_text() == text


def test_a_tuned_prompter_is_named(sweep):
    record = JobRecord.read(sweep / "job_2")
    rows = [row for _, row in _runs(sweep).rows if row["method"] == "coz_vlm"]
    setting = {**SETTING, "tuning": "outputs/grpo/x"}
    save_job(sweep / "alone", JobRecord(record.overrides, [], record.columns, {}, setting), rows)
    text = publish_table("table5", [sweep / "alone"], sweep)
    assert "prompter outputs/grpo/x" in text
    assert "untuned" not in text
    assert "untuned" in publish_table("table5", [sweep / "job_2"], sweep)


def test_the_csv_has_every_digit(sweep):
    publish_table("table1", job_folders(sweep), sweep)
    lines = list(csv.DictReader(io.StringIO((sweep / "table1.csv").read_text())))
    assert len(lines) == 160 + 3  # the paper's, and three methods' consistency
    (line,) = [ln for ln in lines if (ln["method"], ln["scale"], ln["dataset"], ln["metric"]) == ("nn", "4", "div2k", "niqe")]
    rows = sorted((r["image"], r["value"]) for _, r in _runs(sweep).rows if r["method"] == "nn" and r["metric"] == "niqe")
    assert float(line["value"]) == float(np.mean([value for _, value in rows]))
    assert float(line["paper"]) == 12.1252


def test_the_paired_test_is_wilcoxons(sweep):
    runs = _runs(sweep)
    table = paired_table(LAYOUTS["table1"], runs, ("coz_vlm", "nn"))
    (line,) = [row for row in table.body if row[2] == "NIQE"]
    values = {
        method: [
            row["value"]
            for _, row in sorted(runs.rows, key=lambda r: r[1]["image"])
            if row["method"] == method and row["metric"] == "niqe"
        ]
        for method in ("coz_vlm", "nn")
    }
    deltas = np.subtract(values["coz_vlm"], values["nn"])
    assert line[3] == "8"
    assert float(line[4]) == pytest.approx(deltas.mean(), abs=1e-4)
    assert float(line[6]) == pytest.approx(wilcoxon(deltas).pvalue, rel=1e-2)
    assert line[7] == "better"
    with pytest.raises(UserError, match="coz_vlm, direct, nn"):
        paired_table(LAYOUTS["table1"], runs, ("coz_vlm", "coz_tags"))


def test_equal_methods_are_not_called_different(sweep):
    table = paired_table(LAYOUTS["table1"], _runs(sweep), ("nn", "nn"))
    assert {row[6] for row in table.body} == {"1"}
    assert {row[7] for row in table.body} == {"equal"}


def test_a_later_run_replaces_an_earlier_ones_rows(sweep, tmp_path):
    record = JobRecord.read(sweep / "job_0")
    save_job(tmp_path / "again", record, [_row(image, "nn", 4, 1.0) for image in IMAGES[:4]])
    runs = read_runs([*job_folders(sweep), tmp_path / "again"])
    entry = entries_of(LAYOUTS["table1"], runs)[Key(4, "nn", "div2k", "niqe")]
    assert entry.n == 8
    first = {row["image"]: row["value"] for _, row in _runs(sweep).rows if row["method"] == "nn" and row["metric"] == "niqe"}
    assert entry.value == pytest.approx(np.mean([1.0] * 4 + [first[image] for image in IMAGES[4:]]))


def test_failures_are_counted(sweep):
    record = JobRecord.read(sweep / "job_0")
    save_job(sweep / "job_4", record, [_row("i0", "nn", 4, 100.0, failure="broke")])
    text = publish_table("table1", job_folders(sweep), sweep)
    assert "nn at 4× on div2k: 1 photograph failed and counts with the metric's worst value: i0." in text


def test_a_data_set_that_nothing_ran_on_names_no_method(sweep):
    """In strips and the general table, methods carry only what tells results apart."""
    for number, dataset in enumerate(("div2k", "div2k", "div2k", "div8k")):
        record = JobRecord.read(sweep / f"job_{number}")
        rows = [row for _, row in read_runs([sweep / f"job_{number}"]).rows]
        save_job(sweep / f"job_{number}", replace(record, overrides=[*record.overrides, f"dataset={dataset}"]), rows)
    assert {row["method"] for row in gather(job_folders(sweep)).rows} == {"nn", "direct", "coz_vlm"}
    again = JobRecord.read(sweep / "job_0")
    other = replace(again, overrides=["method=nn", "scale=4", "dataset=ffhq"])
    save_job(sweep / "job_4", other, [_row(image, "nn", 4, 1.0) for image in IMAGES])
    assert "nn[dataset=ffhq]" in {row["method"] for row in gather(job_folders(sweep)).rows}


def test_table_3_and_6_have_their_own_layouts(tmp_path):
    phases = {"seconds_sr": 2.0, "seconds_pe": 1.0}
    rows = [_row(i, m, 4, v, metric=p) for i in IMAGES for m in ("direct", "coz_vlm") for p, v in phases.items()]
    rows = [{**row, "metric_identity": '{"device": "a fast GPU"}'} for row in rows]
    save_job(tmp_path / "time", JobRecord([], [], [], {}, SETTING), rows)
    text = publish_table("table3", [tmp_path / "time"], tmp_path)
    (line,) = [ln for ln in text.splitlines() if "| 4×" in ln and "| PE" in ln and "ours" in ln]
    assert line.count("1.0000") == 2
    assert "Timed on a fast GPU." in text
    rows = [_row(image, "coz_null", 16, 0.9 + 0.01 * i, metric="overlap_cosine") for i, image in enumerate(IMAGES)]
    save_job(tmp_path / "cos", JobRecord([], [], [], {}, SETTING), rows)
    entries = entries_of(LAYOUTS["table6"], read_runs([tmp_path / "cos"]))
    values = {s: entries[Key(16, "coz_null", "div2k", "overlap_cosine", s)].value for s in ("mean", "median", "minimum")}
    assert values == {"mean": pytest.approx(0.935), "median": pytest.approx(0.935), "minimum": 0.9}


def test_the_command_needs_no_model(sweep):
    command = [sys.executable, "-X", "importtime", "-m", "coz.tables", "table1", str(sweep), "pair=coz_vlm,nn"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "coz_vlm − nn" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not [name for name in loaded if name.startswith(("diffusers", "transformers", "coz.backbones", "coz.prompters"))]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["table7", "x"], "table7 is no table"),
        (["table1"], "at least one folder"),
        (["table1", "/no/such/run"], "holds no finished job"),
        (["table1", "x", "pair=coz_vlm"], "two methods"),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        main(arguments)

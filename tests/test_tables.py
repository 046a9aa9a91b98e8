"""Tables only pivot: known rows give known cells."""

from __future__ import annotations

import numpy as np
import pytest

from coz.tables import Column, Refusal, bootstrap_interval, differences_table, read_rows, results_table, rows_to_csv, summarise

NIQE = Column("niqe", "NIQE", higher_is_better=False)


def _row(image, method, scale, value, failure="", metric="niqe"):
    common = {"dataset": "d", "backbone": "b", "prompter": "p", "profile": "embedded", "state": "s", "metric_identity": "{}"}
    return {"image": image, "method": method, "scale": scale, "metric": metric, "value": value, "failure": failure, **common}


ROWS = [_row(f"i{i}", "nn", 4.0, 10.0 + i) for i in range(5)] + [_row(f"i{i}", "coz_null", 4.0, 5.0 + i) for i in range(5)]


def test_cells_are_means_over_images():
    cells = summarise(ROWS)
    assert cells[4.0, "nn", "niqe"].mean == 12
    assert cells[4.0, "nn", "niqe"].n == 5
    assert cells[4.0, "nn", "niqe"].low < 12 < cells[4.0, "nn", "niqe"].high


def test_an_image_measured_twice_counts_once():
    assert summarise([*ROWS, ROWS[0]])[4.0, "nn", "niqe"].n == 5


def test_the_interval_is_the_percentile_bootstraps():
    values = np.random.default_rng(1).normal(3, 2, 200)
    low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_interval(values, seed=0) == (low, high)


def test_the_interval_of_many_values_needs_little_memory_and_is_the_same():
    values = np.random.default_rng(1).normal(3, 2, 9_999)
    low, high = bootstrap_interval(values, seed=0, resamples=2000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)
    assert bootstrap_interval([*values, values.mean()], seed=0) == pytest.approx((low, high), abs=0.003)
    whole = np.random.default_rng(0).choice(values, size=(300, 9_999)).mean(axis=1)  # drawn at once, as the parts are
    assert bootstrap_interval(values, seed=0, resamples=300) == tuple(np.percentile(whole, [2.5, 97.5]))


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(rows_to_csv(ROWS))
    assert [dict(row) for row in read_rows(path)] == ROWS


def test_the_best_of_a_scale_is_marked_and_empty_cells_are_named():
    refusals = [Refusal("no weights here", "coz_vlm", 4.0), Refusal("no trunk", metric="lpips")]
    table = results_table(ROWS, [NIQE, Column("lpips", "LPIPS", higher_is_better=False)], refusals)
    text = table.markdown()
    assert [line[1] for line in table.body] == ["nn", "coz_null", "coz_vlm"]
    assert table.body[1][3].endswith("*")
    assert not table.body[0][3].endswith("*")
    assert table.body[2][3] == "–"
    assert "coz_vlm at 4× is empty: no weights here" in text
    assert "lpips is empty: no trunk" in text


def test_failures_are_counted_and_said():
    table = results_table([*ROWS, _row("i9", "nn", 4.0, 100.0, failure="broke")], [NIQE])
    assert "nn at 4×: 1 photograph failed and counts with the metric's worst value: i9." in table.markdown()


def test_paired_differences_use_the_pairing():
    table = differences_table(ROWS, NIQE)
    (line,) = table.body
    assert line[1] == "coz_null − nn"
    assert line[3] == "-5.0000"
    assert line[4] == "[-5.0000, -5.0000]"  # every pair differs by just that, however the images spread
    assert line[5] == "undecided (n < 6)"  # five of one sign may be luck
    more = [*ROWS, _row("i9", "nn", 4.0, 15.0), _row("i9", "coz_null", 4.0, 10.0)]
    assert differences_table(more, NIQE).body[0][5] == "better"


def test_latex_and_csv_hold_the_same_cells():
    table = results_table(ROWS, [NIQE])
    assert table.csv().splitlines()[1].startswith("4×,nn,5,")
    latex = table.latex()
    assert r"coz\_null" in latex
    assert latex.count(r"\\") == 3

"""Two folders compared by one command."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from coz.checkpoint import WeightsNotFound
from coz.errors import UserError
from coz.folder_metrics import METRICS, averages, compare, main, pair_up
from coz.full_reference import PsnrY, SsimY


@pytest.fixture
def folders(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("sr", "gt"):
        (tmp_path / name).mkdir()
    for index in range(3):
        truth = generator.integers(0, 200, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(truth).save(tmp_path / "gt" / f"{index}.png")
        Image.fromarray(truth + np.uint8(10 * index)).save(tmp_path / "sr" / f"{index}.png")
    return tmp_path / "sr", tmp_path / "gt"


def test_values_of_a_known_shift(folders):
    values = np.array(compare(pair_up(*folders), [PsnrY(), SsimY()]))
    assert values[0] == pytest.approx([80, 1])
    # Grey levels g higher: Y of YCbCr rises by 219/255 of it.
    assert values[1:, 0] == pytest.approx([20 * np.log10(255 * 255 / 219 / g) for g in (10, 20)], abs=1e-3)


def test_a_picture_without_truth_and_one_of_another_size(folders, capsys):
    shutil.copy(folders[0] / "0.png", folders[0] / "extra.png")
    with pytest.raises(UserError, match="extra"):
        pair_up(*folders)
    (folders[0] / "extra.png").unlink()
    Image.new("RGB", (40, 48)).save(folders[0] / "1.png")
    values = np.array(compare(pair_up(*folders), [PsnrY()]))
    assert np.isnan(values[1, 0])
    assert "1: psnr failed" in capsys.readouterr().err
    table = averages([PsnrY()], values.tolist(), {"dists": "no weights"}).markdown()
    assert "| 2 | 1 " in table
    assert "dists is left out: no weights" in table


def test_the_command_writes_every_value(folders, tmp_path, capsys):
    main([f"sr={folders[0]}", f"gt={folders[1]}", "metrics=psnr", f"out={tmp_path}/values.csv", "workers=2"])
    rows = list(csv.DictReader((tmp_path / "values.csv").open()))
    assert [row["image"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["psnr"]) == pytest.approx(80)
    assert "PSNR (Y)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "sr=FOLDER"),
        (["sr=a"], "gt=FOLDER"),
        (["hr=a"], "hr=a is no setting"),
        (["sr=a", "gt=b", "metrics=fid"], "fid"),
        (["sr=a", "gt=b", "workers=all"], "workers=all"),
        (["sr=/no/a", "gt=b"], "sr=/no/a is no folder"),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        main(arguments)


def test_a_metric_that_was_asked_for_is_not_left_out_in_silence(folders):
    try:
        main([f"sr={folders[0]}", f"gt={folders[1]}", "metrics=dists"])
    except WeightsNotFound as error:
        assert "DISTS-pytorch" in str(error)  # noqa: PT017


@pytest.mark.slow
def test_published_values_and_averages(parity, data_dir):
    published = list(csv.DictReader((parity("realsr_metrics") / "realsr_osediff.csv").open()))
    names = ("psnr", "ssim", "lpips", "niqe")
    pairs = pair_up(data_dir / "realsr" / "sr_osediff", data_dir / "realsr" / "hr")
    assert [path.name for _, path, _ in pairs] == [row["file"] for row in published]
    values = np.array(compare(pairs, [METRICS[name]() for name in names], workers=2))
    assert values.mean(axis=0)[:3] == pytest.approx([25.1511, 0.7341, 0.2921], abs=5e-5)
    assert values.mean(axis=0)[3] == pytest.approx(5.6476, abs=2e-4)
    theirs = np.array([[float(row[f"published_{name}"]) for name in names] for row in published])
    apart = np.abs(values - theirs).max(axis=0)
    print("largest differences:", dict(zip(names, apart.tolist(), strict=True)))
    assert (apart < [1e-3, 1e-4, 5e-4, 0.05]).all(), apart

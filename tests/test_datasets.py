"""Published data sets: unpacked, counted, and refused by name where they are not whole."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coz.data.datasets import DatasetNotReady, list_dataset, prepare

ROOT = Path(__file__).resolve().parents[1]


def _png(value, side=64):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def zipped(tmp_path):
    """Four photographs as their authors distribute them, and a file that is none."""
    folder = tmp_path / "set"
    folder.mkdir()
    with zipfile.ZipFile(folder / "SET_train_HR.zip", "w") as archive:
        for index in range(4):
            archive.writestr(f"SET_train_HR/{index:04d}.png", _png(index))
        archive.writestr("SET_train_HR/readme.txt", "hello")
    return folder


def _settings(folder, count=4, **options):
    return {"name": "set", "path": folder, "count": count, **options}


def test_an_archive_is_unpacked_once_and_described(zipped):
    said = []
    manifest = prepare(**_settings(zipped), say=said.append)
    assert sorted(manifest.files) == [f"SET_train_HR/{index:04d}.png" for index in range(4)]
    assert [photo.name for photo in list_dataset(**_settings(zipped))] == [f"SET_train_HR__{index:04d}" for index in range(4)]
    stored = json.loads((zipped / "manifest.json").read_text())
    assert stored["count"] == 4
    assert stored["digest"] == manifest.digest
    assert any("unpacking" in line for line in said)
    again = []
    assert prepare(**_settings(zipped), say=again.append).digest == manifest.digest
    assert not any("unpacking" in line for line in again)


def test_tar_archives_too(tmp_path):
    with tarfile.open(tmp_path / "shard-00.tar.gz", "w:gz") as archive:
        for index in range(2):
            info = tarfile.TarInfo(f"0/{index}.png")
            info.size = len(_png(index))
            archive.addfile(info, io.BytesIO(_png(index)))
    assert len(prepare(**_settings(tmp_path, 2)).files) == 2


def test_not_unpacked_absent_partial_and_another_set_are_told_apart(zipped, tmp_path):
    with pytest.raises(DatasetNotReady, match=r"SET_train_HR\.zip.*is not unpacked.*coz\.prepare dataset=set"):
        list_dataset(**_settings(zipped))
    with pytest.raises(DatasetNotReady, match="dataset=set is not at"):
        list_dataset(**_settings(tmp_path / "nowhere"))
    prepare(**_settings(zipped))
    with pytest.raises(DatasetNotReady, match=r"has 9 photographs, but .* holds 4.*dataset\.partial=true"):
        list_dataset(**_settings(zipped, 9))
    assert len(list_dataset(**_settings(zipped, 9, partial=True))) == 4
    with pytest.raises(DatasetNotReady, match="holds 4: another set"):
        list_dataset(**_settings(zipped, 3))
    assert len(list_dataset(**_settings(zipped, 3, first=3))) == 3
    assert len(list_dataset(**_settings(zipped, 4, limit=2))) == 2


def test_a_file_that_changed_is_named(zipped):
    prepare(**_settings(zipped))
    changed = zipped / "SET_train_HR" / "0002.png"
    changed.write_bytes(_png(9, side=80))
    with pytest.raises(DatasetNotReady, match=r"0002\.png"):
        list_dataset(**_settings(zipped))
    changed.write_bytes(_png(200))  # of the same size: only the checksum tells
    with pytest.raises(DatasetNotReady, match=r"0002\.png"):
        prepare(**_settings(zipped))


def test_a_cut_off_archive_is_named_and_leaves_no_mark(zipped):
    archive = zipped / "SET_train_HR.zip"
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetNotReady, match=r"SET_train_HR\.zip cannot be unpacked"):
        prepare(**_settings(zipped))
    archive.write_bytes(data)
    assert len(prepare(**_settings(zipped)).files) == 4


def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set" / "bad.zip", "w") as archive:
        archive.writestr("../escaped.png", _png(0))
    with pytest.raises(DatasetNotReady, match="outside"):
        prepare(**_settings(tmp_path / "set", 1))
    assert not (tmp_path / "escaped.png").exists()


def test_a_hub_data_set_is_exported_as_it_is_stored(tmp_path):
    import datasets

    rows = {"image": [{"bytes": _png(index), "path": f"{index}.png"} for index in range(3)]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(str(tmp_path / "hub" / "train-00000.parquet"))
    manifest = prepare(**_settings(tmp_path / "out", 3, hub=str(tmp_path / "hub")))
    assert sorted(manifest.files) == ["0.png", "1.png", "2.png"]
    assert (tmp_path / "out" / "1.png").read_bytes() == _png(1)


def test_the_command(zipped, tmp_path):
    command = [sys.executable, "-m", "coz.prepare", "dataset=div2k", f"dataset.path={zipped}", f"outputs={tmp_path}/out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "dataset.count=4"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "div2k: 4 photographs, digest" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert "has 800 photographs" in done.stderr

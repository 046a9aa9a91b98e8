"""Nothing is ever half written."""

from __future__ import annotations

import errno
import multiprocessing
import os

import pytest

from coz.store import CannotWrite, StateStore, fingerprint, remove_stale, write_atomic


def test_a_fingerprint_knows_every_part_and_no_order():
    a = fingerprint({"x": 1, "y": {"z": [1, 2]}})
    assert a == fingerprint({"y": {"z": [1, 2]}, "x": 1})
    assert a != fingerprint({"x": 1, "y": {"z": [2, 1]}})


def test_a_state_is_whole_or_absent(tmp_path):
    store = StateStore(tmp_path)
    assert store.get("abc") is None
    stored = store.put("abc", b"png", {"step": 1})
    assert stored.image_path.read_bytes() == b"png"
    again = store.put("abc", b"other", {"step": 2})
    assert again.image_path.read_bytes() == b"png"  # the first stays
    assert store.get("abc").meta == {"step": 1}
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".locks")] == ["abc"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, number):
    target = tmp_path / "rows.csv"
    write_atomic(target, "old")

    def refuse(*_):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CannotWrite, match=r"rows\.csv"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_full_disk_leaves_no_half_state(tmp_path, monkeypatch):
    store = StateStore(tmp_path)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CannotWrite, match="full"):
        store.put("abc", b"png", {})
    assert store.get("abc") is None
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    import socket

    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    dead = tmp_path / f".abc.{socket.gethostname()}-{process.pid}.tmp"
    alive = tmp_path / f".abc.{socket.gethostname()}-{os.getpid()}.tmp"
    foreign = tmp_path / f".abc.elsewhere-{process.pid}.tmp"
    for path in (dead, alive, foreign):
        path.mkdir()
    remove_stale(tmp_path)
    assert [path.exists() for path in (dead, alive, foreign)] == [False, True, True]


def _hold(root, ready, release):
    with StateStore(root).claim(["aa11", "bb22"], wait=True) as claimed:
        assert claimed
        ready.set()
        release.wait(20)


def test_a_claim_excludes_other_processes_and_dies_with_its_holder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(20)
    store = StateStore(tmp_path)
    with store.claim(["bb22", "cc33"], wait=False) as claimed:
        assert not claimed
    with store.claim(["cc33"], wait=False) as claimed:
        assert claimed
    holder.kill()  # SIGKILL: nothing is cleaned up
    holder.join()
    with store.claim(["bb22", "cc33"], wait=True) as claimed:
        assert claimed

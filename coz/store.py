"""Run folders and stored states: atomic, shared between processes, and always complete or absent.

Every file is written beside its place under a private name and then renamed, so a kill, a full disk or a second process
leaves either the old file or the new one. A state is a folder named by the fingerprint of everything that shaped it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from coz.errors import UserError


class CannotWrite(UserError):
    """The disk is full, or the place may not be written to."""


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, what is finished is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, what is finished is kept",
    errno.EACCES: "it may not be written to; choose another folder or change its permissions",
    errno.EPERM: "it may not be written to; choose another folder or change its permissions",
    errno.ENOENT: "it does not exist and cannot be made; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of this path is a file; choose another folder",
}


@contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` that a user can mend into a `CannotWrite` that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None or (error.errno == errno.ENOENT and not isinstance(path, Path)):
            raise
        raise CannotWrite(f"cannot write {error.filename or path}: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------------
# files


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all; readers see the old content or the new one.

    Raises:
        CannotWrite: full disk, missing permission, read-only file system.
    """
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{_private_name()}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically, in the canonical form."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A private path beside `path` for a writer that wants a file name; it takes `path`'s place when the block ends well.

    Raises:
        CannotWrite: full disk, missing permission, read-only file system.
    """
    path = Path(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{_private_name()}"
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _private_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}.tmp"


def stale_name(name: str) -> str:
    """A private name beside `name`, which `remove_stale` knows."""
    return f".{name}.{_private_name()}"


def remove_stale(folder: Path) -> None:
    """Delete private files and folders that killed processes of this machine left in `folder`."""
    prefix = f".{socket.gethostname()}-"
    for path in folder.glob(".*.tmp"):
        owner = path.name.rsplit(prefix, 1)[-1].removesuffix(".tmp") if prefix in path.name else ""
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# fingerprints


def fingerprint(value: Mapping[str, object]) -> str:
    """Twenty hexadecimal digits that change with any part of a JSON-able value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


# ---------------------------------------------------------------------------------------------------------------------
# states


@dataclass(frozen=True)
class StoredState:
    """A state on disk: its folder, and what `state.json` says of it."""

    folder: Path
    meta: Mapping[str, object]

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def image_path(self) -> Path:
        return self.folder / "image.png"


class StateStore:
    """States under one folder, each in `<root>/<fingerprint>/` with `image.png` and `state.json`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        with explain_write_errors(self.root):
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
        remove_stale(self.root)

    def get(self, key: str) -> StoredState | None:
        """The state of a fingerprint, or None where it has not been computed."""
        folder = self.root / key
        try:
            meta = json.loads((folder / "state.json").read_text())
        except FileNotFoundError:
            return None
        return StoredState(folder, meta)

    def put(self, key: str, image_png: bytes, meta: Mapping[str, object]) -> StoredState:
        """Add a state; one that is already there stays as it is.

        Raises:
            CannotWrite: full disk, missing permission.
        """
        folder = self.root / key
        temporary = self.root / f".{key}.{_private_name()}"
        with explain_write_errors(folder):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                (temporary / "image.png").write_bytes(image_png)
                write_json(temporary / "state.json", meta)
                os.rename(temporary, folder)
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        return StoredState(folder, meta)

    def stripes(self, keys: list[str]) -> set[str]:
        """The locks that a claim of these keys takes: a few hundred serve any number of states."""
        return {key[:2] for key in keys}

    @contextmanager
    def claim(self, keys: list[str], *, wait: bool) -> Iterator[bool]:
        """Hold the right to compute some states.

        Args:
            keys: their fingerprints.
            wait: wait for other processes; otherwise give up at once.

        Yields:
            Whether the claim was had. The locks die with the process, so a kill frees them.
        """
        with ExitStack() as stack, explain_write_errors(self.root):
            try:
                for stripe in sorted(self.stripes(keys)):  # in this order two claimants never wait crosswise
                    lock = FileLock(self.root / ".locks" / f"{stripe}.lock", timeout=-1 if wait else 0)
                    stack.enter_context(lock)
            except Timeout:
                stack.close()
                yield False
                return
            yield True

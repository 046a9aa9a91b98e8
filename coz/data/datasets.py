"""Published data sets as folders of photographs: their archives unpacked once, their counts and checksums in a manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coz.data.photos import Photo, list_photos
from coz.errors import UserError
from coz.image import IMAGE_SUFFIXES
from coz.store import explain_write_errors, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
UNPACKED = ".unpacked"  # beside an archive that was unpacked to its end


class DatasetNotReady(UserError):
    """A data set that is absent, unfinished, damaged or another one."""


def list_dataset(
    *,
    name: str,
    path: str | Path,
    count: int,
    first: int | None = None,
    partial: bool = False,
    hub: str | None = None,
    limit: int | None = None,
    names: Sequence[str] | None = None,
    min_side_px: int = 32,
) -> list[Photo]:
    """The photographs of a published data set, after a look at whether it is whole.

    Args:
        name: what `dataset=` calls it, for the messages.
        path: its folder.
        count: how many photographs it must hold.
        first: of a larger set, the first so many in order of their names.
        partial: go on with fewer than `count`.
        hub: read by `coz.prepare` only.
        limit, names, min_side_px: see `list_photos`.

    Raises:
        DatasetNotReady: absent, archives not unpacked, fewer or more files than the set has, or other than its manifest says.
    """
    del hub
    folder = Path(path).expanduser()
    check_whole(folder, name=name, count=count, first=first, partial=partial)
    keep = first if first is not None and limit is None else limit
    return list_photos(path=folder, limit=keep, names=names, min_side_px=min_side_px)


def check_whole(folder: Path, *, name: str, count: int, first: int | None, partial: bool) -> None:
    """Refuse a folder that is not the data set; names and sizes only, contents are for `coz.prepare`."""
    remedy = f"see conf/dataset/{name}.yaml for where it comes from, then run `python -m coz.prepare dataset={name}`"
    if not folder.is_dir():
        raise DatasetNotReady(f"dataset={name} is not at {folder}; {remedy}, or give dataset.path=FOLDER")
    packed = [archive.name for archive in archives_of(folder) if not _mark_of(archive).exists()]
    files = pictures_of(folder)
    if packed and len(files) < count:
        raise DatasetNotReady(f"dataset={name}: {', '.join(packed[:3])} in {folder} is not unpacked; {remedy}")
    if len(files) > count and first is None:
        raise DatasetNotReady(
            f"dataset={name} has {count} photographs, but {folder} holds {len(files)}: another set, or several in one folder; "
            f"give the folder of the training photographs as dataset.path, or use dataset=folder dataset.path={folder}"
        )
    if len(files) < count and not partial:
        raise DatasetNotReady(
            f"dataset={name} has {count} photographs, but {folder} holds {len(files)}; {remedy}, or go on with "
            f"dataset.partial=true"
        )
    manifest = read_manifest(folder)
    if manifest is None:
        logger.warning("%s has no manifest; `python -m coz.prepare dataset=%s` writes one", folder, name)
        return
    wrong = [
        relative
        for relative, entry in manifest.files.items()
        if not (folder / relative).is_file() or (folder / relative).stat().st_size != entry["bytes"]
    ]
    if wrong:
        raise DatasetNotReady(
            f"dataset={name}: {len(wrong)} files differ from {folder / MANIFEST}, the first is {wrong[0]}; restore them, or "
            f"delete the manifest and run `python -m coz.prepare dataset={name}`"
        )


def pictures_of(folder: Path) -> list[Path]:
    """The image files of a folder and its sub-folders, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def archives_of(folder: Path) -> list[Path]:
    """The archives that lie in a folder itself."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(ARCHIVE_SUFFIXES))


def _mark_of(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}{UNPACKED}")


# ---------------------------------------------------------------------------------------------------------------------
# preparing


@dataclass(frozen=True)
class Manifest:
    """What a prepared data set holds: by file, its size and SHA-256."""

    files: dict[str, dict[str, object]]

    @property
    def digest(self) -> str:
        """One checksum over all names and contents, to compare two machines by."""
        lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """A folder's manifest, or None.

    Raises:
        DatasetNotReady: it is there and cannot be read.
    """
    try:
        return Manifest(json.loads((folder / MANIFEST).read_text())["files"])
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DatasetNotReady(f"{folder / MANIFEST} is damaged ({error}); delete it and prepare the data set again") from error


def prepare(
    *,
    name: str,
    path: str | Path,
    count: int,
    first: int | None = None,
    partial: bool = False,
    hub: str | None = None,
    say: Callable[[str], None] = logger.info,
    **_: object,
) -> Manifest:
    """Unpack what is packed, check every photograph and write the manifest; a second call compares with it.

    Args:
        hub: a hub data set with a column of images, exported to the folder where that holds none (this downloads).
        say: gets a line per thing done.

    Raises:
        DatasetNotReady: absent, damaged, or not as many photographs as the set has.
    """
    folder = Path(path).expanduser()
    if hub and not (folder.is_dir() and pictures_of(folder)):
        say(f"exporting {hub} to {folder}")
        export_hub(hub, folder)
    if not folder.is_dir():
        check_whole(folder, name=name, count=count, first=first, partial=partial)
    for archive in archives_of(folder):
        if not _mark_of(archive).exists():
            say(f"unpacking {archive}")
            unpack(archive, folder)
    check_whole(folder, name=name, count=count, first=first, partial=partial)
    files = pictures_of(folder)[:first]
    say(f"reading {len(files)} files")
    manifest = Manifest(dict(_describe(folder, files)))
    known = read_manifest(folder)
    changed = [] if known is None else [f for f, entry in manifest.files.items() if known.files.get(f) != entry]
    if changed:
        raise DatasetNotReady(f"{len(changed)} files changed since {folder / MANIFEST} was written, the first is {changed[0]}")
    write_json(folder / MANIFEST, {"name": name, "count": len(files), "digest": manifest.digest, "files": manifest.files})
    say(f"{name}: {len(files)} photographs, digest {manifest.digest[:16]}")
    return manifest


def _describe(folder: Path, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, object]]]:
    def one(file: Path) -> tuple[str, dict[str, object]]:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return str(file.relative_to(folder)), {"bytes": file.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(8) as pool:  # hashing and reading both let other threads run
        yield from pool.map(one, files)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive's images into `folder`; a killed call leaves no mark and is repeated.

    Raises:
        DatasetNotReady: damaged, or a member that would land outside the folder.
    """
    try:
        with explain_write_errors(folder):
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as opened:
                    _copy(((m.filename, opened.open(m)) for m in opened.infolist() if not m.is_dir()), folder, archive)
            else:
                with tarfile.open(archive) as tar:
                    _copy(((m.name, tar.extractfile(m)) for m in tar if m.isfile()), folder, archive)  # type: ignore[misc]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DatasetNotReady(f"{archive} cannot be unpacked ({error}); it may be cut off, fetch it again") from error
    _mark_of(archive).touch()


def _copy(members: Iterable[tuple[str, IO[bytes]]], folder: Path, archive: Path) -> None:
    root = folder.resolve()
    for name, source in members:
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise DatasetNotReady(f"{archive} holds {name}, which would land outside {folder}; do not use this archive")
        if target.suffix.lower() in IMAGE_SUFFIXES and not target.name.startswith("."):
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "wb") as opened:
                shutil.copyfileobj(source, opened)


def export_hub(hub: str, folder: Path, *, split: str = "train", column: str = "image") -> None:
    """Write the image files of a hub data set (or a local folder of parquet files) as they are stored."""
    from datasets import Image, load_dataset

    rows = load_dataset(hub, split=split).cast_column(column, Image(decode=False))
    folder.mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        stored = row[column]
        name = Path(stored["path"] or f"{index:06d}.png").name
        data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        (folder / name).write_bytes(data)

"""Photographs to evaluate on: a folder, with credits and places worth zooming into where it has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from coz.errors import UserError
from coz.image import IMAGE_SUFFIXES, UnreadableImage, read_photo

CREDITS_FILE = "credits.json"


@dataclass(frozen=True)
class Photo:
    """One photograph of a data set."""

    name: str
    path: Path
    at: tuple[float, float] | None = None  # a place worth zooming into, as fractions of the centred square
    credit: str = ""


def list_photos(
    *, path: str | Path, limit: int | None = None, min_side_px: int = 32, names: Sequence[str] | None = None
) -> list[Photo]:
    """The photographs of a folder and its sub-folders, sorted by name; each file's header is checked.

    Args:
        path: the folder. A `credits.json` in it may give, by file name, `at` (x, y) and `author`, `licence`, `source`.
        limit: only the first so many.
        min_side_px: the shortest side that is accepted.
        names: only these (file names without suffix).

    Raises:
        UserError: no such folder, no image in it, a file that is no image or too small, `limit` below 1, unknown names.
    """
    folder = Path(path).expanduser()
    if limit is not None and limit < 1:
        raise UserError(f"dataset.limit={limit} must be at least 1")
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"dataset.path={path} {what}; give a folder of photographs")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(
            f"dataset.path={path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); give a folder of photographs"
        )
    credits = _read_credits(folder)
    photos = [_photo(file, folder, credits) for file in files]
    if names is not None:
        unknown = set(names) - {photo.name for photo in photos}
        if unknown:
            raise UserError(f"dataset.names has {', '.join(sorted(unknown))}, which {path} does not hold; check the spelling")
        photos = [photo for photo in photos if photo.name in set(names)]
    photos = photos[:limit]
    _check_names(photos)
    for photo in photos:
        check_header(photo.path, min_side_px=min_side_px)
    if len(photos) == 1:  # one picture can be checked to its end at once; many are when they are read
        read_photo(photos[0].path, min_side_px=min_side_px)
    return photos


def check_header(path: Path, *, min_side_px: int) -> None:
    """Refuse a file that is no image or too small, by its header alone.

    Raises:
        UnreadableImage: names the file and the reason.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
    except UnidentifiedImageError:
        image = read_photo(path)  # a TIFF that only another reader knows, or an error that says more
        width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"{path} cannot be read ({error}); remove it or replace it") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path} has too many pixels ({error}); cut it or reduce it first") from error
    if min(width, height) < min_side_px:
        raise UnreadableImage(f"{path} is {width} x {height} px; the short side must be at least {min_side_px} px")


def short_side_px(path: Path) -> int:
    """The shorter side of a photograph, by its header."""
    with Image.open(path) as file:
        return min(file.size)


def _photo(file: Path, folder: Path, credits: dict[str, dict]) -> Photo:
    entry = credits.get(file.name, {})
    at = entry.get("at")
    credit = ", ".join(str(entry[key]) for key in ("author", "licence", "source") if entry.get(key))
    name = str(file.relative_to(folder).with_suffix("")).replace("/", "__")
    return Photo(name=name, path=file, at=(float(at[0]), float(at[1])) if at else None, credit=credit)


def _read_credits(folder: Path) -> dict[str, dict]:
    file = folder / CREDITS_FILE
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); mend it or remove it") from error


def _check_names(photos: Sequence[Photo]) -> None:
    seen: dict[str, Path] = {}
    for photo in photos:
        if photo.name in seen:
            raise UserError(f"{photo.path} and {seen[photo.name]} differ only in their suffix; rename one")
        seen[photo.name] = photo.path

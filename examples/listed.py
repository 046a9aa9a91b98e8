"""A data set: the photographs that a CSV file lists, with places to zoom into."""

from __future__ import annotations

import csv
from pathlib import Path

from coz.data.photos import Photo
from coz.errors import UserError


def list_csv(*, path: str | Path, limit: int | None = None) -> list[Photo]:
    """The rows of a CSV file with the columns `file` (relative to it), `x`, `y` (fractions of the centred square), `credit`.

    Raises:
        UserError: no such file, a column or a photograph that is missing.
    """
    listing = Path(path).expanduser()
    if not listing.is_file():
        raise UserError(f"dataset.path={path} is no file; give a CSV file with the columns file, x, y, credit")
    with listing.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    photos = []
    for number, row in enumerate(rows, start=2):
        try:
            file = listing.parent / row["file"]
            photo = Photo(name=file.stem, path=file, at=(float(row["x"]), float(row["y"])), credit=row["credit"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"line {number} of {listing} does not give file, x, y, credit ({error}); mend it") from error
        if not file.is_file():
            raise UserError(
                f"line {number} of {listing} names {row['file']}, which is not there; paths are relative to the list"
            )
        photos.append(photo)
    return photos[:limit]

"""Pictures too large for memory: arrays in chunks on disk, OME-Zarr pyramids, and BigTIFF.

Everything is read and written in pieces. A chunk belongs to one block of a step's target, so no two writers meet in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from coz.errors import UserError
from coz.store import atomic_path, explain_write_errors, write_json
from coz.tiling import Box

OME_VERSION = "0.5"
_SMALLEST_PX = 512  # a pyramid's last level fits this
_TIFF_TILE_PX = 512


class Canvas:
    """A picture on disk, 8-bit RGB, in chunks: a zarr array (3, H, W)."""

    def __init__(self, path: str | Path) -> None:
        """Open one that `create_canvas` made."""
        import zarr

        self.path = Path(path)
        self._array = zarr.open_array(str(path), mode="r+")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._array.shape[1], self._array.shape[2]

    @property
    def chunk_px(self) -> int:
        return self._array.chunks[1]

    def read(self, box: Box) -> np.ndarray:
        """(height, width, 3) uint8; beyond the right and lower border the last pixels are repeated."""
        height, width = self.size
        inside = self._array[:, box.top : min(box.bottom, height), box.left : min(box.right, width)]
        missing = (box.bottom - min(box.bottom, height), box.right - min(box.right, width))
        pixels = np.asarray(inside).transpose(1, 2, 0)
        return np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else pixels

    def write(self, box: Box, pixels: np.ndarray) -> None:
        """Put (height, width, 3) uint8 at a place."""
        with explain_write_errors(self.path):
            self._array[:, box.top : box.bottom, box.left : box.right] = pixels.transpose(2, 0, 1)


def create_canvas(path: str | Path, size: tuple[int, int], *, chunk_px: int) -> Canvas:
    """A black picture of (height, width) pixels; one that is there already is opened as it is."""
    zarr = import_zarr()
    path = Path(path)
    if not (path / "zarr.json").is_file():
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            zarr.create_array(
                str(path),
                shape=(3, *size),
                chunks=(3, min(chunk_px, size[0]), min(chunk_px, size[1])),
                dtype="uint8",
                dimension_names=("c", "y", "x"),
                overwrite=True,
            )
    return Canvas(path)


def import_zarr():  # noqa: ANN201 - the module
    """The library, or a sentence that says how to get it."""
    try:
        import zarr
    except ImportError as error:
        raise UserError("full images need zarr; install it with `pip install 'zarr>=3'`") from error
    return zarr


# ---------------------------------------------------------------------------------------------------------------------
# OME-Zarr


def pyramid_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes of a pyramid's levels: each half the one before, rounded up, until one fits 512 px."""
    sizes = [size]
    while max(sizes[-1]) > _SMALLEST_PX:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def build_pyramid(
    group: Path, *, done: Callable[[str, int], bool], note: Callable[[str, int], None], about: Mapping[str, str]
) -> int:
    """Add the smaller levels beside level `0` of an OME-Zarr group, each the mean of 2 x 2 pixels of the one before.

    Args:
        group: the folder; its level `0` is complete.
        done: whether a row of chunks of a level is finished, (name, row).
        note: called when one is.
        about: what the picture says of itself, see `provenance.note_on`.

    Returns:
        The number of levels.
    """
    finest = Canvas(group / "0")
    sizes = pyramid_sizes(finest.size)
    for level, size in enumerate(sizes[1:], start=1):
        source, target = Canvas(group / str(level - 1)), create_canvas(group / str(level), size, chunk_px=finest.chunk_px)
        step = target.chunk_px
        for row in range(-(-size[0] // step)):
            if done(f"level{level}", row):
                continue
            for left in range(0, size[1], step):
                box = Box(row * step, left, min(step, size[0] - row * step), min(step, size[1] - left))
                pixels = source.read(Box(2 * box.top, 2 * box.left, 2 * box.height, 2 * box.width)).astype(np.uint16)
                mean = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2] + 2) // 4
                target.write(box, mean.astype(np.uint8))
            note(f"level{level}", row)
    write_ome_metadata(group, len(sizes), about)
    return len(sizes)


def write_ome_metadata(group: Path, levels: int, about: Mapping[str, str]) -> None:
    """The OME-NGFF description of a group whose levels are named 0, 1, 2, …, and beside it `about` as `coz`."""
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": [1.0, 2.0**level, 2.0**level]}]}
        for level in range(levels)
    ]
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [
        {"label": label, "color": color, "active": True, "window": window}
        for label, color in (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    ]
    ome = {
        "version": OME_VERSION,
        "multiscales": [{"name": group.name, "axes": axes, "datasets": datasets}],
        "omero": {"channels": channels},
    }
    write_json(group / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome, "coz": dict(about)}})


class Pyramid:
    """A finished OME-Zarr pyramid, for viewers."""

    def __init__(self, group: str | Path) -> None:
        """
        Raises:
            UserError: not a pyramid, or one that is not finished.
        """
        self.group = Path(group)
        try:
            about = json.loads((self.group / "zarr.json").read_text())
            datasets = about["attributes"]["ome"]["multiscales"][0]["datasets"]
        except (OSError, KeyError, IndexError, json.JSONDecodeError) as error:
            raise UserError(f"{group} is no finished OME-Zarr picture; run the command that makes it again") from error
        self.levels = [Canvas(self.group / dataset["path"]) for dataset in datasets]
        self.about: dict[str, str] = about["attributes"].get("coz", {})

    @property
    def size(self) -> tuple[int, int]:
        return self.levels[0].size

    def read(self, level: int, box: Box) -> np.ndarray:
        """Pixels of a level (0 is the finest), cut off at the border."""
        height, width = self.levels[level].size
        cut = box.overlap(Box(0, 0, height, width))
        return np.zeros((0, 0, 3), np.uint8) if cut is None else self.levels[level].read(cut)


# ---------------------------------------------------------------------------------------------------------------------
# BigTIFF


def write_bigtiff(pyramid: Pyramid, path: str | Path) -> Path:
    """The pyramid as a tiled BigTIFF with its levels as sub-images (SubIFDs, as OME-TIFF has them).

    Raises:
        UserError: the disk lacks room.
    """
    import tifffile

    path = Path(path)
    options = {
        "tile": (_TIFF_TILE_PX, _TIFF_TILE_PX),
        "photometric": "rgb",
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "predictor": True,
        "dtype": np.uint8,
    }
    told = "\n".join(f"{name}: {text}" for name, text in pyramid.about.items()).encode("ascii", "replace").decode()
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as writer:
        for index, level in enumerate(pyramid.levels):
            first = {"subifds": len(pyramid.levels) - 1, "description": told, "software": pyramid.about.get("Software", "coz")}
            extra = first if index == 0 else {"subfiletype": 1}
            writer.write(_tiff_tiles(level), shape=(*level.size, 3), **extra, **options)
    return path


def _tiff_tiles(canvas: Canvas) -> Iterator[np.ndarray]:
    height, width = canvas.size
    for top in range(0, height, _TIFF_TILE_PX):
        for left in range(0, width, _TIFF_TILE_PX):
            yield np.ascontiguousarray(canvas.read(Box(top, left, _TIFF_TILE_PX, _TIFF_TILE_PX)))


def check_room(folder: Path, size: tuple[int, int]) -> None:
    """Refuse a picture that the disk cannot hold.

    Raises:
        UserError: names what is needed and what there is.
    """
    need = size[0] * size[1] * 3 * 1.45  # pyramid and the step before included, as if nothing compressed
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise UserError(
            f"{size[1]} x {size[0]} px may need {need / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB free; "
            "free some space, lower the scale, or choose another folder"
        )

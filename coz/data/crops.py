"""Random crops of photographs with their degraded counterparts, each a function of (seed, number of the sample)."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from coz.data.degradation import Degradation
from coz.errors import UserError
from coz.image import IMAGE_SUFFIXES, UnreadableImage, from_pil, read_photo

logger = logging.getLogger(__name__)

_ATTEMPTS = 20  # photographs that are tried for one sample before the run gives up


class TooManyUnreadable(UserError):
    """More photographs cannot be read than a run may silently do without."""


@dataclass(frozen=True)
class Manifest:
    """Which photographs a training uses.

    Args:
        paths: folders, or text files with one path a line (relative to the file's folder; # begins a comment).
        hold_out: how many are kept out of the training, for validation. Chosen by the hash of their names, so that adding
            photographs moves few of the others.
        limit: use only the first so many of the sorted rest.
    """

    paths: Sequence[str]
    hold_out: int = 0
    limit: int | None = None

    def split(self) -> tuple[list[Path], list[Path]]:
        """Training photographs, held-out photographs.

        Raises:
            UserError: a path that does not exist, missing files (the first are named), nothing left to train on.
        """
        files = sorted({file for path in self.paths for file in _listed(Path(path).expanduser())})
        missing = [file for file in files if not file.is_file()]
        if missing:
            named = ", ".join(str(file) for file in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(f"data.paths lists files that do not exist: {named}{more}; correct the manifest")
        if self.hold_out < 0 or self.hold_out >= len(files):
            raise UserError(f"data.hold_out={self.hold_out} leaves none of {len(files)} photographs to train on; lower it")
        by_hash = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
        held = set(by_hash[: self.hold_out])
        return [file for file in files if file not in held][: self.limit], sorted(held)


def _listed(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(f"data.paths={path} holds no image; give a folder of photographs or a list of them")
        return files
    if not path.is_file():
        raise UserError(f"data.paths={path} does not exist; give a folder of photographs or a text file with their paths")
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"data.paths={path} is no text file; give a folder, or a list with one path a line") from error
    return [path.parent / line for line in lines if line]


@dataclass(frozen=True)
class Stage:
    """A part of the training: so many steps with one degradation."""

    steps: int
    degradation: Degradation

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"a stage of {self.steps} steps trains nothing; give at least 1, or remove the stage")


@dataclass(frozen=True)
class Sample:
    """One training sample."""

    index: int
    photo: Path
    hr: Tensor  # (3, S, S)
    lq: Tensor | None  # (3, s, s); None where the degradation runs on the device
    unreadable: tuple[Path, ...] = ()


@dataclass
class CropDataset(Dataset):
    """Sample i of a run: photo, place and degradation follow from (seed, i).

    Every epoch takes each photograph once, in an order of its own.

    Args:
        photos: the training photographs.
        crop_px: side of the crops.
        seed: of the run.
        degradations: of each sample: (first sample that it does not apply to, degradation).
        enlarged: see `Degradation`.
        on_device: leave the degradation to the caller.
        remember: decoded photographs that a worker keeps.
        shrink_to_px: see `read_reduced`.
    """

    photos: Sequence[Path]
    crop_px: int
    seed: int
    degradations: Sequence[tuple[int, Degradation]]
    enlarged: bool = True
    on_device: bool = False
    remember: int = 0
    shrink_to_px: int | None = None
    _decoded: OrderedDict[Path, Tensor] = field(default_factory=OrderedDict, repr=False)

    def __len__(self) -> int:
        return self.degradations[-1][0]

    def degradation_at(self, index: int) -> Degradation:
        return next(degradation for end, degradation in self.degradations if index < end)

    def __getitem__(self, index: int) -> Sample:
        """Unreadable photographs are replaced by others, and listed in the sample.

        Raises:
            TooManyUnreadable: twenty in a row.
        """
        unreadable: list[Path] = []
        for attempt in range(_ATTEMPTS):
            numbers = np.random.Generator(np.random.PCG64([self.seed, index, attempt, 2]))
            photo = self.photos[self._order(index) if attempt == 0 else int(numbers.integers(len(self.photos)))]
            try:
                hr = random_crop(self._read(photo), self.crop_px, numbers)
            except UnreadableImage as error:
                logger.info("left out: %s", error)
                unreadable.append(photo)
                continue
            lq = None
            if not self.on_device:
                degrade = self.degradation_at(index)
                lq = degrade(hr[None], seed=self.seed, indices=[index], enlarged=self.enlarged)[0]
            return Sample(index, photo, hr, lq, tuple(unreadable))
        raise TooManyUnreadable(f"{_ATTEMPTS} photographs in a row cannot be used, the last {unreadable[-1]}; check data.paths")

    def _order(self, index: int) -> int:
        epoch, place = divmod(index, len(self.photos))
        return int(_permutation(self.seed, epoch, len(self.photos))[place])

    def _read(self, photo: Path) -> Tensor:
        if photo in self._decoded:
            self._decoded.move_to_end(photo)
            return self._decoded[photo]
        image = read_reduced(photo, min_side_px=self.crop_px, shrink_to_px=self.shrink_to_px)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        self._decoded[photo] = pixels
        while len(self._decoded) > self.remember:
            self._decoded.popitem(last=False)
        return pixels


_permutations: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()


def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, the last two kept."""
    key = (seed, epoch, count)
    if key not in _permutations:
        _permutations[key] = np.random.Generator(np.random.PCG64([seed, epoch, 3])).permutation(count)
        while len(_permutations) > 2:
            _permutations.popitem(last=False)
    return _permutations[key]


def read_reduced(photo: Path, *, min_side_px: int, shrink_to_px: int | None) -> Image.Image:
    """A photograph, reduced so that its short side has `shrink_to_px`, if that is given and less: a small crop then shows
    more than a patch of one colour.

    Raises:
        UnreadableImage: see `read_photo`.
    """
    image = read_photo(photo, min_side_px=min_side_px)
    side = min(image.size)
    if shrink_to_px is None or side <= shrink_to_px:
        return image
    width, height = (max(shrink_to_px, round(length * shrink_to_px / side)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def random_crop(pixels: Tensor, size_px: int, numbers: np.random.Generator) -> Tensor:
    """(3, H, W) bytes → (3, size_px, size_px) in [0, 1], at a random place, mirrored half the time."""
    height, width = pixels.shape[-2:]
    top, left = (int(numbers.integers(side - size_px + 1)) for side in (height, width))
    crop = pixels[:, top : top + size_px, left : left + size_px].float() / 255
    return crop.flip(-1).contiguous() if numbers.random() < 0.5 else crop.contiguous()


def validation_crops(
    photos: Sequence[Path], *, count: int, size_px: int, seed: int, shrink_to_px: int | None = None
) -> list[tuple[Path, str, Tensor]]:
    """`count` crops spread over held-out photographs, the same at every call: (photograph, name, (3, S, S)).

    Raises:
        UserError: a held-out photograph cannot be read; validation does without none of them.
    """
    decoded = {
        photo: from_pil(read_reduced(photo, min_side_px=size_px, shrink_to_px=shrink_to_px))[0] for photo in photos[:count]
    }
    crops = []
    for number in range(count):
        photo = photos[number % len(photos)]
        numbers = np.random.Generator(np.random.PCG64([seed, number, 4]))
        pixels = decoded[photo]
        top, left = (int(numbers.integers(side - size_px + 1)) for side in pixels.shape[-2:])
        crop = pixels[:, top : top + size_px, left : left + size_px].contiguous()
        crops.append((photo, f"{photo.stem}_{number:03}", crop))
    return crops

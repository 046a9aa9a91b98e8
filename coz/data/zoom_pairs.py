"""Pairs (x_{k-2}, x_{k-1}) for the tuning of the prompt extractor (Algorithm 2), as Hugging Face data sets.

A data set holds where its pairs come from, a few bytes a row; the pictures are made when a row is read, so that the 84,991
photographs of LSDIR need no second copy. A row that is read has `prompt` (chat messages with places for pictures), `images`
([context, current], what `prompt_pair` shows the prompter at inference) and `pair` (its name).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from coz.chain import MAX_FACTOR, prompt_pair, seed_of
from coz.data.photos import Photo
from coz.errors import UserError
from coz.image import View, from_pil, read_photo, resize, to_pil, view_at
from coz.models.chat import Layout, chat_messages

if TYPE_CHECKING:
    from datasets import Dataset

Rows = Mapping[str, Sequence[object]]

_KEPT_PHOTOS = 16  # decoded, per process
_KEPT_ROWS = 64  # made, per process: GRPO reads each row once per generation


class Pairs(NamedTuple):
    """Two data sets without a photograph in common."""

    train: Dataset
    validation: Dataset


def hr_pairs(
    *,
    photos: Sequence[Photo],
    pairs_per_photo: int = 1,
    size_px: int = 512,
    max_depth: int = 4,
    min_view_px: int = 32,
    validation_share: float = 0.01,
    validation_pairs: int | None = None,
    layout: Layout = "system",
    question: str | None = None,
    seed: int = 0,
) -> Pairs:
    """Random crops of photographs and random views inside them, at random depths.

    At depth d the context is a square of the photograph's short side over 4^(d-1), resized to `size_px`; the view is a
    quarter of its side, enlarged as in a chain.

    Args:
        pairs_per_photo: rows per photograph, each at another place.
        max_depth: depths are drawn from 1 to this, as far as the photograph's pixels go:
        min_view_px: the fewest real pixels along a view's side.
        validation_share: of the photographs, see `split_photos`.
        validation_pairs: at most so many rows for validation; None for all.
        layout, question: see `chat_messages`.

    Raises:
        UserError: a setting out of range, or too few photographs for a split.
    """
    _check_at_least("pairs.pairs_per_photo", pairs_per_photo, 1)
    _check_at_least("pairs.max_depth", max_depth, 1)
    _check_at_least("pairs.size_px", size_px, 8)
    _check_at_least("pairs.min_view_px", min_view_px, 1)
    messages = chat_messages(context="pair", layout=layout, question=question)
    make = HrPairMaker(messages=messages, size_px=size_px, max_depth=max_depth, min_view_px=min_view_px, seed=seed)
    train, validation = split_photos([photo.name for photo in photos], share=validation_share, seed=seed)
    paths = {photo.name: str(photo.path) for photo in photos}

    def rows(names: Sequence[str]) -> list[dict[str, object]]:
        return [{"photo": name, "path": paths[name], "number": i} for i in range(pairs_per_photo) for name in names]

    return Pairs(_dataset(rows(train), make), _dataset(rows(validation)[:validation_pairs], make))


def chain_pairs(
    *,
    index: str,
    validation_share: float = 0.01,
    validation_pairs: int | None = None,
    layout: Layout = "system",
    question: str | None = None,
    seed: int = 0,
) -> Pairs:
    """Pairs out of real chains at all depths: what the extractor will really see. `python -m coz.apps.make_pairs` makes them.

    Args:
        index: the file that the command wrote.

    Raises:
        UserError: no such file, or too few photographs for a split.
    """
    file = Path(index)
    if not file.is_file():
        raise UserError(
            f"pairs.index={index} does not exist; make it: python -m coz.apps.make_pairs, with the dataset and backbone to use"
        )
    written = json.loads(file.read_text(encoding="utf-8"))
    rows = [row | {"path": str(file.parent / row["path"])} for row in written["pairs"]]
    _, validation = split_photos(sorted({row["photo"] for row in rows}), share=validation_share, seed=seed)
    make = ChainPairMaker(messages=chat_messages(context="pair", layout=layout, question=question))
    held_out = set(validation)
    return Pairs(
        _dataset([row for row in rows if row["photo"] not in held_out], make),
        _dataset([row for row in rows if row["photo"] in held_out][:validation_pairs], make),
    )


def split_photos(names: Sequence[str], *, share: float, seed: int) -> tuple[list[str], list[str]]:
    """Names for training and for validation, by a hash of each name and the seed.

    `int(share * n)` names are for validation, at least one: 849 of 84,991 at the paper's 0.01. Adding a photograph moves at
    most one other from one side to the other.

    Raises:
        UserError: a share outside 0…1, or fewer than two photographs.
    """
    if not 0 < share < 1:
        raise UserError(f"pairs.validation_share={share} must lie between 0 and 1; the paper's is 0.01")
    if len(names) < 2:
        raise UserError(f"{len(names)} photograph cannot be split into training and validation; give at least two")
    by_hash = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    held_out = set(by_hash[: min(max(1, int(share * len(names))), len(names) - 1)])
    return [name for name in names if name not in held_out], [name for name in names if name in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# rows → pictures


class HrPairMaker:
    """Makes the pictures of `hr_pairs`: by the seed, the photograph and the number, whatever the order."""

    def __init__(
        self, *, messages: Sequence[Mapping[str, object]], size_px: int, max_depth: int, min_view_px: int, seed: int
    ) -> None:
        self._messages = list(messages)
        self._size_px, self._max_depth, self._min_view_px, self._seed = size_px, max_depth, min_view_px, seed

    def __call__(self, rows: Rows) -> Rows:
        """The data set's transform: a batch of rows as a dict of lists → the same with pictures."""
        names = [f"{photo}#{number}" for photo, number in zip(rows["photo"], rows["number"], strict=True)]
        images = [_hr_images(self.setting, str(path), name) for path, name in zip(rows["path"], names, strict=True)]
        return {"prompt": [self._messages] * len(names), "images": images, "pair": list(names)}

    @property
    def setting(self) -> tuple[int, int, int, int]:
        """What of the settings shapes the pictures."""
        return self._size_px, self._max_depth, self._min_view_px, self._seed


@functools.lru_cache(maxsize=_KEPT_ROWS)
def _hr_images(setting: tuple[int, int, int, int], path: str, name: str) -> list[Image.Image]:
    size_px, max_depth, min_view_px, seed = setting
    photo = _read(path)
    generator = torch.Generator().manual_seed(seed_of(seed, name, 0))
    side_px = min(photo.size)
    depths = [d for d in range(1, max_depth + 1) if side_px / MAX_FACTOR**d >= min_view_px] or [1]
    depth = depths[int(_uniform(generator) * len(depths))]
    crop_px = max(1, round(side_px / MAX_FACTOR ** (depth - 1)))
    left, top = (math.floor(_uniform(generator) * (edge - crop_px + 1)) for edge in photo.size)
    state = resize(from_pil(photo.crop((left, top, left + crop_px, top + crop_px))), size_px)
    at = (_uniform(generator), _uniform(generator))
    return _pair(state, view_at(size_px, MAX_FACTOR, at), step=depth + 1)


class ChainPairMaker:
    """Makes the pictures of `chain_pairs` from stored states."""

    def __init__(self, *, messages: Sequence[Mapping[str, object]]) -> None:
        self._messages = list(messages)

    def __call__(self, rows: Rows) -> Rows:
        """The data set's transform: a batch of rows as a dict of lists → the same with pictures."""
        keys = ("path", "left_px", "top_px", "size_px", "step")
        images = [_chain_images(*row) for row in zip(*(rows[key] for key in keys), strict=True)]
        names = [f"{photo}@{step}" for photo, step in zip(rows["photo"], rows["step"], strict=True)]
        return {"prompt": [self._messages] * len(names), "images": images, "pair": names}


@functools.lru_cache(maxsize=_KEPT_ROWS)
def _chain_images(path: str, left_px: int, top_px: int, size_px: int, step: int) -> list[Image.Image]:
    return _pair(from_pil(read_photo(path)), View(left_px, top_px, size_px), step=step)


def _pair(state: Tensor, view: View, *, step: int) -> list[Image.Image]:
    current, context = prompt_pair(state, [view], step=step, first_pair="released")
    assert context is not None
    return [*to_pil(context), *to_pil(current)]


@functools.lru_cache(maxsize=_KEPT_PHOTOS)
def _read(path: str) -> Image.Image:
    return read_photo(path)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _dataset(rows: Sequence[Mapping[str, object]], make: HrPairMaker | ChainPairMaker) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows]).with_transform(make)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value} must be at least {least}")

"""Prompts of training samples: none, out of a cache that a command filled, or asked for as training goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from coz.errors import UserError
from coz.prompters.base import Prompter


class Prompts(Protocol):
    """Says what the ground truth shows."""

    def __call__(self, hr: Tensor, photos: Sequence[Path], seeds: Sequence[int]) -> list[str]:
        """(B, 3, S, S) crops and the photographs that they come from → one text each."""
        ...


class LivePrompts:
    """Asks the prompter about every crop, as OSEDiff asks RAM. It runs on the crop itself, before the degradation."""

    def __init__(self, *, prompter: Prompter) -> None:
        self._prompter = prompter

    def __call__(self, hr: Tensor, photos: Sequence[Path], seeds: Sequence[int]) -> list[str]:
        with torch.no_grad():
            return [str(text) for text in self._prompter(hr.cpu(), None, seeds=seeds)]


class CachedPrompts:
    """Texts by photograph, written by `python -m coz.apps.cache_prompts`.

    Raises:
        UserError: no such cache; a photograph that it lacks, at the first sample of it.
    """

    def __init__(self, *, path: str) -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_file():
            raise UserError(
                f"prompts.path={path} does not exist; fill it with `python -m coz.apps.cache_prompts prompts.path={path}`"
            )
        self._texts = read_cache(self._path)

    def __call__(self, hr: Tensor, photos: Sequence[Path], seeds: Sequence[int]) -> list[str]:
        try:
            return [self._texts[cache_key(photo)] for photo in photos]
        except KeyError as error:
            raise UserError(f"{self._path} has no prompt for {error}; run `python -m coz.apps.cache_prompts` again") from error


def cache_key(photo: Path) -> str:
    """What a photograph is called in a cache."""
    return str(photo.resolve())


def read_cache(path: Path) -> dict[str, str]:
    """A cache's texts by photograph; a last line that a kill cut off is left out."""
    texts = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        texts[entry["photo"]] = entry["prompt"]
    return texts

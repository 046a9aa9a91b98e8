"""Filling a cache of prompts, one line of JSON per photograph, so that a kill loses at most one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coz.data.crops import Manifest
from coz.image import UnreadableImage, read_photo, start_state
from coz.prompters.base import Prompter
from coz.store import explain_write_errors, write_atomic
from coz.training.prompts import cache_key, read_cache


@dataclass
class PromptWork:
    """The photographs that a cache lacks; iterating asks about one after the other."""

    photos: list[Path]
    prompter: Prompter
    path: Path
    crop_px: int
    known: int
    written: int = 0
    failed: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.photos)

    def __iter__(self) -> Iterator[Path]:
        with explain_write_errors(self.path), open(self.path, "a") as file:
            for photo in self.photos:
                try:
                    picture = start_state(read_photo(photo), self.crop_px, rounding="round")
                except UnreadableImage:
                    self.failed.append(photo)
                    continue
                prompt = str(self.prompter(picture, None, seeds=[0])[0])
                file.write(json.dumps({"photo": cache_key(photo), "prompt": prompt}, ensure_ascii=False) + "\n")
                file.flush()
                self.written += 1
                yield photo


def open_cache(*, manifest: Manifest, prompter: Prompter, path: str, crop_px: int) -> PromptWork:
    """What is left to do for a cache file; a cut-off last line is removed."""
    training, held = manifest.split()
    file = Path(path).expanduser()
    texts = read_cache(file)
    lines = [json.dumps({"photo": photo, "prompt": text}, ensure_ascii=False) + "\n" for photo, text in texts.items()]
    write_atomic(file, "".join(lines))
    photos = [photo for photo in (*training, *held) if cache_key(photo) not in texts]
    return PromptWork(photos, prompter, file, crop_px, known=len(texts))

"""What a model said, kept on disk, so that the same question about the same pictures is asked once.

One small file per answer, named after everything that shapes it. Files are written beside their place and moved there, so
that several processes can share a folder and an interrupted one leaves nothing half written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from coz.errors import UserError
from coz.models.chat import ChatRequest

log = logging.getLogger(__name__)


def prompt_key(identity: Mapping[str, object], images: Sequence[Image.Image], seed: int | None) -> str:
    """A name for one answer: model, adapter, question, layout and sampling (`identity`), the pictures' bytes, the seed.

    Args:
        seed: None where nothing is drawn, so that greedy answers are shared between seeds.
    """
    digest = hashlib.sha256(json.dumps([dict(identity), seed], sort_keys=True).encode())
    for image in images:
        rgb = image.convert("RGB")
        digest.update(f"{rgb.width}x{rgb.height}\0".encode())
        digest.update(rgb.tobytes())
    return digest.hexdigest()


def prompt_keys(
    identity: Mapping[str, object], requests: Sequence[ChatRequest], seeds: Sequence[int], *, draws: bool
) -> list[str]:
    """`prompt_key` of each request; seeds count where something is drawn."""
    return [
        prompt_key(identity, request.images, seed if draws else None) for request, seed in zip(requests, seeds, strict=True)
    ]


class PromptCache:
    """A folder of answers; `None` for one that keeps nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

    def get(self, key: str) -> str | None:
        """The answer under `key`, or None. A damaged file counts as absent."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))["raw"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("%s cannot be read (%s); asking again", path, error)
            return None
        return answer if isinstance(answer, str) else None

    def put(self, key: str, answer: str) -> None:
        """Keep an answer.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".tmp", delete=False
            ) as file:
                json.dump({"raw": answer}, file)
            os.replace(file.name, path)
        except OSError as error:
            raise UserError(f"cache_dir={self.folder} cannot be written ({error}); free space or set cache_dir=null") from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None, "a cache that keeps nothing has no paths"
        return self.folder / key[:2] / f"{key}.json"


def ask_missing(cache: PromptCache, keys: Sequence[str], ask: Callable[[list[int]], Sequence[str | Exception]]) -> list[str]:
    """Answers for all keys, asking only for those that the cache lacks, and for equal ones once.

    Args:
        ask: given the positions to ask for, their answers, or an exception where one failed. What was answered is kept
            before the first exception is raised, so that a later run asks only for the rest.
    """
    answers = {key: answer for key in dict.fromkeys(keys) if (answer := cache.get(key)) is not None}
    missing = [key for key in dict.fromkeys(keys) if key not in answers]
    if missing:
        failures: list[Exception] = []
        for key, said in zip(missing, ask([keys.index(key) for key in missing]), strict=True):
            if isinstance(said, Exception):
                failures.append(said)
            else:
                cache.put(key, said)
                answers[key] = said
        if failures:
            raise failures[0]
    return [answers[key] for key in keys]

"""What becomes of a model's words before a backbone reads them. The words themselves stay in `Prompt.raw`."""

from __future__ import annotations

import re
from typing import Literal

from coz.prompters.base import Prompt

Cleaning = Literal["none", "list"]

_ITEM_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_SEPARATOR = re.compile(r"[,;\n]+")


def clean_prompt(raw: str, cleaning: Cleaning) -> Prompt:
    """The prompt for the backbone.

    `none` hands the words over as they are, as released. `list` makes one line of words with commas between: list marks
    and line breaks go, and what was said before is not said again, whatever its case.
    """
    if cleaning == "none":
        return Prompt(raw)
    lines = (_ITEM_MARK.sub("", line) for line in raw.splitlines())
    items = (" ".join(item.split()).rstrip(".") for line in lines for item in _SEPARATOR.split(line))
    kept: dict[str, str] = {}
    for item in items:
        if item:
            kept.setdefault(item.casefold(), item)
    return Prompt(", ".join(kept.values()), raw=raw)

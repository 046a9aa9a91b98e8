"""What people type, as Hydra reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = re.compile(r"^\s*-?[\d.]+(e-?\d+)?(\s*,\s*-?[\d.]+(e-?\d+)?)+\s*$", re.IGNORECASE)


def friendly(
    arguments: Sequence[str], *, files: Sequence[str] = ("image",), lists: Sequence[str] = ("at", "region")
) -> list[str]:
    """Overrides as Hydra's grammar wants them: `at=0.31,0.62` is a list, and a file's name may hold anything.

    Args:
        arguments: the command line without the program's name.
        files: settings whose value is a path.
        lists: settings whose value may be numbers with commas.
    """
    return [_one(argument, files, lists) for argument in arguments]


def _one(argument: str, files: Sequence[str], lists: Sequence[str]) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key in lists and _NUMBERS.match(value):
        return f"{key}=[{value}]"
    if key in files and value not in ("", "null") and value[:1] not in "'\"":
        escaped = value.replace("'", r"\'")
        return f"{key}='{escaped}'"
    if key == "aspect" and ":" in value:
        return f"{key}='{value}'"
    return argument

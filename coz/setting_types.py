"""Settings of the wrong kind, said in one sentence before anything is built: `film=maybe`, `tile_px=abc`.

Two sources tell what a setting may be: the signature of what a config node builds, and, for settings that no node hands to
code, the values that stand in conf/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from coz.errors import UserError
from coz.precedence import CONF, node_at, quote_choices, searchpath

_NAMES: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
}


# ---------------------------------------------------------------------------------------------------------------------
# by signature


def check_node(node: object) -> None:
    """Hold the values of a plain config tree against the signatures of what its `_target_` nodes build.

    Lists, mappings and objects are left to the code that takes them.

    Raises:
        UserError: a number, a word, true, false or null where the signature has another type.
    """
    if isinstance(node, list):
        for child in node:
            check_node(child)
    elif isinstance(node, dict):
        for child in node.values():
            check_node(child)
        hints = type_hints(node["_target_"]) if "_target_" in node else {}
        for name, value in node.items():
            if name in hints and not fits(value, hints[name]):
                raise UserError(f"{name}={_typed(value)} {_complaint(value, hints[name])}")


@functools.cache
def type_hints(target: str) -> Mapping[str, Any]:
    """The types of a target's arguments by name, but for those whose names only a type checker sees."""
    function = hydra.utils.get_object(target)
    if inspect.isclass(function) and not dataclasses.is_dataclass(function):
        function = function.__init__
    try:
        return get_type_hints(function)
    except NameError:
        found: dict[str, Any] = {}
        for name, annotation in inspect.get_annotations(function).items():
            one = types.SimpleNamespace(__annotations__={name: annotation})
            with contextlib.suppress(NameError):
                found |= get_type_hints(one, globalns=getattr(function, "__globals__", {}))
        return found


def fits(value: object, hint: object) -> bool:
    """Whether a value of a config may stand where `hint` is wanted."""
    if isinstance(value, list | dict):
        return True
    return any(_is(value, kind) for kind in _alternatives(hint))


def _alternatives(hint: object) -> Iterator[object]:
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _alternatives(part)
    else:
        yield hint


def _is(value: object, kind: object) -> bool:
    if get_origin(kind) is Literal:
        return any(type(choice) is type(value) and choice == value for choice in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str)
    if kind in (bool, str, types.NoneType):
        return isinstance(value, kind)  # type: ignore[arg-type]
    return True


def _complaint(value: object, hint: object) -> str:
    kinds = list(_alternatives(hint))
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and isinstance(value, str):
        return f"is unknown; use {' or '.join(choices)}"
    wanted = [_NAMES[kind] for kind in kinds if get_origin(kind) is not Literal]
    return f"must be {' or '.join([*choices, *wanted])}"


# ---------------------------------------------------------------------------------------------------------------------
# by the values in conf/


def check_typed(typed: Sequence[str], *, config_name: str) -> None:
    """Hold what was typed on the command line against the values that the same settings have in conf/.

    Where these are all true or false, or all numbers, so must the typed one be. A list passes for a number; null does for that
    of a part, whose signature says whether it may.

    Raises:
        UserError: it is of another kind.
    """
    parser = OverridesParser.create()
    for override in parser.parse_overrides([quote_choices(o.removeprefix("++")) for o in typed]):
        if override.is_delete() or override.is_sweep_override():
            continue
        key, value = override.key_or_group, override.value()
        known = _known_values(config_name, key)
        if not known or (isinstance(value, str) and "${" in value):
            continue
        if all(isinstance(one, bool) for one in known):
            if not isinstance(value, bool):
                raise UserError(f"{key}={_typed(value)} is neither true nor false")
        elif all(fits(one, float) for one in known) and not fits(value, float | None if _group(key) else float):
            raise UserError(f"{key}={_typed(value)} is not a number; write one, as in {key}={_typed(known[0])}")


def _group(key: str) -> Path | None:
    """The folder of the group that a setting's part is chosen from."""
    folder = CONF / key.partition(".")[0]
    return folder if "." in key and folder.is_dir() else None


def _known_values(config_name: str, key: str) -> list[object]:
    """What a setting is in the entry point's own file, and in every choice of its group, unless there are a user's own."""
    found = [_raw(_load(CONF / f"{config_name}.yaml"), key)]
    folder = _group(key)
    if folder and not searchpath():
        found += [_raw(_load(file), key.partition(".")[2]) for file in sorted(folder.glob("*.yaml"))]
    return [value for value in found if value is not None and not (isinstance(value, str) and "${" in value)]


@functools.cache
def _load(file: Path) -> DictConfig:
    loaded = OmegaConf.load(file)
    assert isinstance(loaded, DictConfig), f"{file} holds no mapping"
    return loaded


def _raw(config: DictConfig, key: str) -> object:
    """A value as it stands in the file; None where it is absent or no plain value."""
    node = node_at(config, key)
    return None if node is None or OmegaConf.is_config(node) else node._value()


def _typed(value: object) -> str:
    """A value as one types it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)

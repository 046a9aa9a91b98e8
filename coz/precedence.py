"""Which setting wins: the command line over the method, the method over the profile, in whatever order they are typed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, Node, OmegaConf

from coz.errors import UserError
from coz.models.trained import trained_note

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
CONF = REPOSITORY / "conf"

_NO_NAME = re.compile(r"null|true|false|[-+.\d]*", re.IGNORECASE)

OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("weights", lambda own, *, _root_: _profile_weights(_root_) or own, replace=True)
# A released file that goes with a model's released weights; random weights have none, a training's folder has its own.
OmegaConf.register_new_resolver(
    "released", lambda weights, file: None if weights == "random" or trained_note(weights) else file, replace=True
)


def _profile_weights(config: DictConfig) -> str | None:
    """What the profile puts in the place of every model's own weights: `random`, or nothing."""
    return OmegaConf.select(config, "profile.weights")


def quote_choices(argument: str) -> str:
    """`prompter=null` (alone or in a sweep) names the config null.yaml, which Hydra would read as "nothing". Whatever else it
    would not read as a name is quoted too, so that it is refused as the unknown choice that it is."""
    group, equals, value = argument.partition("=")
    if not equals or not group.strip("+") or not (CONF / group.lstrip("+")).is_dir():
        return argument
    return group + equals + ",".join(f"'{part}'" if _NO_NAME.fullmatch(part) else part for part in value.split(","))


def loosen(argument: str) -> str:
    """`prompter.adapter=x` → `++prompter.adapter=x`. Hydra first composes its default parts, which may lack what the bound
    ones have; `resolve` then holds the setting against the right part."""
    key = argument.split("=")[0]
    group = key.split(".")[0]
    return f"++{argument}" if "=" in argument and "." in key and group in config_groups() - {"method", "profile"} else argument


def config_groups() -> set[str]:
    """The groups of conf/ that a command line may choose from."""
    return {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"hydra", "deepspeed"}


def resolve(config_name: str) -> DictConfig:
    """The configuration of the running job: profile, then method, then the profile's word on that method, then the
    command line, whichever order it was typed in.

    A profile may also set values of a certain entry point (`sets.<config>`); one whose key the chosen parts lack is left out.

    `config.lacking` says what of the method the profile cannot give, and is empty where it can. Where the profile has
    another data set in the place of the one asked for, `config.stands_for` names the latter.

    Raises:
        UserError: the command line gives a method a part that its definition fixes.
    """
    typed = [str(override) for override in HydraConfig.get().overrides.task]
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    return resolve_overrides(typed, config_name=config_name, sweep=sweep)


def resolve_overrides(typed: Sequence[str], *, config_name: str, sweep: bool) -> DictConfig:
    """`resolve` for given overrides. In a sweep a fixed part may differ from the command line: other jobs use that."""
    groups = config_groups()
    typed = [quote_choices(override.removeprefix("++")) for override in typed]
    parsed = OverridesParser.create().parse_overrides(list(typed))
    # An experiment is added with a +, and stays among the other overrides.
    chosen = {o.key_or_group: o.value() for o in parsed if o.key_or_group in groups and not (o.is_delete() or o.is_add())}
    own = [f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}" for key, value in chosen.items()]
    settings = [override for override, o in zip(typed, parsed, strict=True) if o.key_or_group not in chosen]
    # Settings of parts wait until it is known which parts these are.
    inside = [override for override in settings if _sets_part(override, groups)]
    rest = [override for override in settings if override not in inside]

    draft = _compose(config_name, [*own, *rest])
    if "profile" in draft and config_name in draft.profile.get("sets", {}):
        own, rest, draft = _with_sets(draft, config_name, own, rest, chosen=chosen, groups=groups)
    if "method" not in draft or "profile" not in draft:
        # without a method, a profile binds what it names for this entry point
        binds = draft.profile.get(config_name) or {} if "profile" in draft else {}
        bound = [f"{group}='{name}'" for group, name in binds.items() if group not in chosen]
        return _compose(config_name, [*bound, *own, *rest, *inside]) if bound or inside else draft
    method, profile = draft.method, draft.profile
    binds = {**profile.binds, **method.binds, **profile.methods.get(method.name, {}), **method.fixes}
    for group, name in method.fixes.items():
        if group in chosen and str(chosen[group]) != name:
            if not sweep:
                raise UserError(f"method={method.name} always uses {group}={name}; leave {group}={chosen[group]} out")
            inside = [override for override in inside if not override.lstrip("+~").startswith(f"{group}.")]
    bound = [f"{group}='{name}'" for group, name in binds.items() if group not in chosen or group in method.fixes]
    asked_for, stand_in = _stand_in(draft, inside)
    bound += [f"dataset='{stand_in}'"] if stand_in else []
    own = [o for o in own if o.split("=")[0] not in method.fixes and not (stand_in and o.startswith("dataset="))]
    if sweep and inside:
        inside = _applicable(_compose(config_name, [*bound, *own, *rest]), inside)
    config = _compose(config_name, [*bound, *own, *rest, *inside])
    config.stands_for = asked_for if stand_in else ""
    for group, name in binds.items():
        if group not in chosen and name in profile.lacks:
            reason = f"method={method.name} needs {group}={name}, which profile={profile.name} lacks: {profile.lacks[name]}"
            config.lacking = reason
    if asked_for in profile.lacks and not stand_in:
        config.lacking = f"profile={profile.name} lacks dataset={asked_for}: {profile.lacks[asked_for]}"
    return config


def _with_sets(
    draft: DictConfig, config_name: str, own: list[str], rest: list[str], *, chosen: Mapping[str, object], groups: set[str]
) -> tuple[list[str], list[str], DictConfig]:
    """The overrides with what the profile sets of this entry point before them, so that what was typed wins."""
    sets = {str(key): value for key, value in draft.profile.sets[config_name].items()}
    own = [*(f"{key}={value}" for key, value in sets.items() if key in groups and key not in chosen), *own]
    draft = _compose(config_name, [*own, *rest])
    present = [key for key in sets if key not in groups and OmegaConf.select(draft, key, default=draft) is not draft]
    rest = [*(f"{key}={_as_override(sets[key])}" for key in present), *rest]
    return own, rest, _compose(config_name, [*own, *rest])


def _as_override(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sets_part(override: str, groups: set[str]) -> bool:
    """Whether an override sets something inside a part that a method or profile may choose."""
    group, dot, _ = override.lstrip("+~").partition("=")[0].partition(".")
    return bool(dot) and group in groups - {"profile", "method"}


def _applicable(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """In a sweep, a setting of one job's part that another job's part does not have, such as `prompter.adapter`, is for the
    former. One that no part has stays, and is the error it is."""
    kept = []
    for override in overrides:
        key = override.partition("=")[0]
        group = key.split(".")[0]
        if key.startswith(("+", "~")) or _has(config, key):
            kept.append(override)
            continue
        if any(_has(OmegaConf.load(file), key.partition(".")[2]) for file in (CONF / group).glob("*.yaml")):
            logger.info("%s does not apply to %s=%s", override, group, config.choices[group])
        else:
            kept.append(override)
    return kept


def _has(config: object, key: str) -> bool:
    """Whether a config has a key, be it one that still needs a value."""
    return node_at(config, key) is not None


def node_at(config: object, key: str) -> Node | None:
    """The node under a key, references unresolved; None where there is none."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, DictConfig) or part not in found.keys():  # noqa: SIM118 (`in` passes over what needs a value)
            return None
        found = found._get_node(part)
    return found


def _stand_in(draft: DictConfig, typed: Sequence[str]) -> tuple[str, str]:
    """(the data set that was asked for, what the profile has in its place or ""). A path that is typed wins over both."""
    asked_for = str(draft.choices.get("dataset", ""))
    if any(override.lstrip("+").startswith("dataset.path=") for override in typed):
        return "", ""
    return asked_for, str(draft.profile.get("datasets", {}).get(asked_for, ""))


def searchpath() -> list[str]:
    """`hydra.searchpath=[file://…]` of the command line, where a user's own configs lie; Hydra keeps it apart from the rest."""
    if not HydraConfig.initialized():
        return []
    return [override for override in HydraConfig.get().overrides.hydra if override.startswith("hydra.searchpath=")]


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    overrides = [*searchpath(), *overrides]
    config = loader.load_configuration(config_name, overrides, run_mode=RunMode.RUN, from_shell=False)
    choices = config.hydra.runtime.choices
    OmegaConf.set_struct(config, False)
    config.choices = {group: choices[group] for group in choices if "/" not in group and not group.startswith("hydra")}
    del config["hydra"]
    config.lacking, config.stands_for = "", ""
    OmegaConf.set_struct(config, True)
    return config

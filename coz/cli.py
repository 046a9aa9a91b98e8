"""What the entry points share: Hydra made friendly, and the precedence of command line, method and profile."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from tqdm import tqdm

from coz.errors import UserError
from coz.models.trained import trained_note
from coz.store import explain_write_errors, write_atomic, write_json

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
CONF = REPOSITORY / "conf"
Task = Callable[[DictConfig], None]

OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("weights", lambda own, *, _root_: _profile_weights(_root_) or own, replace=True)
# A released file that goes with a model's released weights; random weights have none, a training's folder has its own.
OmegaConf.register_new_resolver(
    "released", lambda weights, file: None if weights == "random" or trained_note(weights) else file, replace=True
)


def _profile_weights(config: DictConfig) -> str | None:
    """What the profile puts in the place of every model's own weights: `random`, or nothing."""
    return OmegaConf.select(config, "profile.weights")


class NotHere(UserError):
    """A combination that cannot run on this machine or in this profile: in a sweep a named empty cell, alone an error."""


class ConsoleHandler(logging.Handler):
    """Log lines that do not tear progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info:  # tracebacks go to the log file
            tqdm.write(self.format(record), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# running


def run(task: Task, *, config_name: str) -> None:
    """Run a Hydra task so that a user's mistake ends in one sentence on stderr and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing and exiting with 1
    logging.raiseExceptions = False  # a full disk must not print a traceback per log line
    entered = False

    def guarded(config: DictConfig) -> None:
        nonlocal entered
        entered = True
        try:
            with explain_write_errors("a file"):
                task(config)
        except UserError as error:  # SystemExit passes through Hydra without its remark on the failed job
            logger.info("stopped", exc_info=error)
            fail(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            fail(explain(error, config_name))

    job = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)
    sys.argv[1:] = [_loosen(quote_null(argument)) for argument in sys.argv[1:]]
    try:
        job()
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, config_name))
    except OSError as error:
        if entered:
            raise
        fail(f"cannot make the run folder {error.filename or ''} ({error.strerror}); choose another one with outputs=FOLDER")
    except KeyboardInterrupt:
        fail("interrupted; the same command again goes on, what is finished is kept", code=130)


def quote_null(argument: str) -> str:
    """`prompter=null` (alone or in a sweep) names the config null.yaml, which Hydra would read as "nothing"."""
    group, equals, value = argument.partition("=")
    if not equals or not (CONF / group / "null.yaml").is_file():
        return argument
    return group + equals + ",".join("'null'" if part == "null" else part for part in value.split(","))


def _loosen(argument: str) -> str:
    """`prompter.adapter=x` → `++prompter.adapter=x`. Hydra first composes its default parts, which may lack what the bound
    ones have; `resolve` then holds the setting against the right part."""
    key = argument.split("=")[0]
    group = key.split(".")[0]
    return f"++{argument}" if "=" in argument and "." in key and group in _groups() - {"method", "profile"} else argument


def _groups() -> set[str]:
    return {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"hydra", "deepspeed"}


def fail(sentence: str, *, code: int = 2) -> None:
    """Say what went wrong in one line and stop."""
    print("error: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)


def explain(error: Exception, config_name: str) -> str:
    """Hydra's and OmegaConf's own errors as one sentence, with the nearest name where one was misspelt."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, UserError):
        return str(error.__cause__)
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}; write KEY=VALUE, quote text with odd characters, close brackets"
    message = str(error).strip()
    first = message.splitlines()[0] if message else type(error).__name__
    if "Could not override" in first:
        key = first.split("'")[1] if "'" in first else first
        return f"{key} is no setting of {config_name}{_nearest(key, _setting_names(config_name))}; see --cfg job for all"
    if first.startswith("Ambiguous value"):
        return f"{first}: several values are a sweep and need -m, a point needs brackets, as in at=[0.31,0.62]"
    absent = re.search(r"Could not find '([^']+)/([^'/]+)'", first)
    if absent:
        group, name = absent.groups()
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        return f"{group}={name} does not exist{_nearest(name, options)}; {group} is one of {', '.join(options)}"
    return first


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _setting_names(config_name: str) -> list[str]:
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    top = OmegaConf.load(CONF / f"{config_name}.yaml")
    nested = []
    for group in groups:
        for file in (CONF / group).glob("*.yaml"):
            loaded = OmegaConf.load(file)
            nested += [f"{group}.{key}" for key in map(str, loaded) if isinstance(loaded, DictConfig)]
    return [*map(str, top), *groups, *nested]


# ---------------------------------------------------------------------------------------------------------------------
# precedence


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
    groups = _groups()
    typed = [quote_null(override.removeprefix("++")) for override in typed]
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


def _has(node: object, key: str) -> bool:
    """Whether a config has a key, be it one that still needs a value."""
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 (`in` passes over what needs a value)
            return False
        node = node._get_node(part)
    return True


def _stand_in(draft: DictConfig, typed: Sequence[str]) -> tuple[str, str]:
    """(the data set that was asked for, what the profile has in its place or ""). A path that is typed wins over both."""
    asked_for = str(draft.choices.get("dataset", ""))
    if any(override.lstrip("+").startswith("dataset.path=") for override in typed):
        return "", ""
    return asked_for, str(draft.profile.get("datasets", {}).get(asked_for, ""))


def _searchpath() -> list[str]:
    """`hydra.searchpath=[file://…]` of the command line, where a user's own configs lie; Hydra keeps it apart from the rest."""
    if not HydraConfig.initialized():
        return []
    return [override for override in HydraConfig.get().overrides.hydra if override.startswith("hydra.searchpath=")]


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    overrides = [*_searchpath(), *overrides]
    config = loader.load_configuration(config_name, overrides, run_mode=RunMode.RUN, from_shell=False)
    choices = config.hydra.runtime.choices
    OmegaConf.set_struct(config, False)
    config.choices = {group: choices[group] for group in choices if "/" not in group and not group.startswith("hydra")}
    del config["hydra"]
    config.lacking, config.stands_for = "", ""
    OmegaConf.set_struct(config, True)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# building


_PARTS, _MODELS = 64, 4  # a sweep's job has a dozen small parts and two models; the models of the job before stay loaded


def build(node: DictConfig) -> Any:
    """Instantiate a config node as plain Python. Equal nodes give the same object, over the jobs of a sweep."""
    return _build(_text(node))


def build_model(node: DictConfig) -> Any:
    """`build` for what holds a network: a sweep keeps its last few models loaded, and lets older ones go."""
    return _build_model(_text(node))


def _text(node: DictConfig) -> str:
    try:
        return json.dumps(OmegaConf.to_container(node, resolve=True, throw_on_missing=True), sort_keys=True)
    except MissingMandatoryValue as error:
        key = node._get_full_key(error.key)
        raise UserError(f"{key} is not set; give it on the command line, as in {key}=…") from error


def _instantiate(node: str) -> Any:
    try:
        return hydra.utils.instantiate(json.loads(node), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


_build = functools.lru_cache(maxsize=_PARTS)(_instantiate)
_build_model = functools.lru_cache(maxsize=_MODELS)(_instantiate)


def record_provenance(folder: Path, config: DictConfig) -> None:
    """Write what made a run into its folder: resolved config, versions, commit, command."""
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    packages = ("torch", "torchvision", "pyiqa", "spandrel", "timm", "diffusers", "transformers", "peft", "numpy", "pillow")
    versions = {name: version for name in packages if (version := _version(name))}
    about = {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": versions,
    }
    write_json(folder / "provenance.json", about)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# sweeps


class TabulateSweep(Callback):
    """Before a sweep starts, a look at its data sets; when it ends, one table and the strips over all its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        with _said():
            datasets = dict(_swept_datasets(config))
            for name, dataset in datasets.items():
                try:
                    build(dataset)
                except UserError as error:
                    others = ",".join(other for other in datasets if other != name)
                    raise UserError(f"{error}{f'; or sweep without it: dataset={others}' if others else ''}") from error

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        from coz.results import publish_sweep

        with _said():
            publish_sweep(Path(config.hydra.sweep.dir), config)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Hydra turns what a callback raises into a warning and goes on; an exit it lets through."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:  # each job finds it again and says it
        logger.debug("left to the jobs", exc_info=error)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def _swept_datasets(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The data sets that a sweep names, but for those that its profile lacks, each with its node."""
    typed = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))}
    swept = str((config.hydra.sweeper.get("params") or {}).get("dataset", ""))
    if "dataset" in typed:
        swept = typed["dataset"].get_value_element_as_str()
    profile = config.hydra.runtime.choices.get("profile", "")
    kept = [o.input_line for key, o in typed.items() if key.startswith("dataset.") and not o.is_sweep_override()]
    for name in swept.split(",") if re.fullmatch(r"[\w,]+", swept) else []:
        overrides = [f"profile={profile}", f"dataset={name}", *kept]
        one = resolve_overrides(overrides, config_name=config.hydra.job.config_name, sweep=True)
        if f"lacks dataset={name}" not in one.lacking:
            yield name, one.dataset


def as_mapping(node: DictConfig | None) -> Mapping[str, DictConfig]:
    """A config node's children by name; an empty node has none."""
    return {} if node is None else {str(key): node[key] for key in node}

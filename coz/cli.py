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
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from tqdm import tqdm

from coz.errors import UserError
from coz.precedence import CONF, REPOSITORY, loosen, quote_choices, resolve, resolve_overrides
from coz.setting_types import check_node, check_typed
from coz.store import explain_write_errors, write_atomic, write_json

__all__ = [  # what the entry points need, with coz.precedence's
    "CONF",
    "REPOSITORY",
    "NotHere",
    "TabulateSweep",
    "Task",
    "as_mapping",
    "build",
    "build_model",
    "explain",
    "fail",
    "quote_choices",
    "record_provenance",
    "resolve",
    "resolve_overrides",
    "run",
]

logger = logging.getLogger(__name__)

Task = Callable[[DictConfig], None]


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
            check_typed(HydraConfig.get().overrides.task, config_name=config_name)
            with explain_write_errors("a file"):
                task(config)
        except UserError as error:  # SystemExit passes through Hydra without its remark on the failed job
            logger.info("stopped", exc_info=error)
            fail(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            fail(explain(error, config_name))

    job = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)
    sys.argv[1:] = [loosen(quote_choices(argument)) for argument in sys.argv[1:]]
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


def fail(sentence: str, *, code: int = 2) -> None:
    """Say what went wrong in one line and stop."""
    print("error: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)


def explain(error: Exception, config_name: str) -> str:
    """Hydra's and OmegaConf's own errors as one sentence, with the nearest name where one was misspelt."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__
        return str(cause) if isinstance(cause, UserError) else f"{str(error).splitlines()[0]} {cause}"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}; write KEY=VALUE, quote text with odd characters, close brackets"
    message = str(error).strip()
    first = message.splitlines()[0] if message else type(error).__name__
    if "Could not override" in first:
        key = first.split("'")[1] if "'" in first else first
        if key == "experiment" and config_name == "evaluate":
            return "an experiment is added to the settings, with a plus; write +experiment=…"
        return f"{key} is no setting of {config_name}{_nearest(key, _setting_names(config_name))}; see --cfg job for all"
    if first.startswith("Ambiguous value"):
        return f"{first}: several values are a sweep and need -m, a point needs brackets, as in at=[0.31,0.62]"
    absent = re.search(r"Could not find '([^']+)/([^'/]*)'", first)
    if absent:
        group, name = absent.groups()
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        return f"{group}={name} does not exist{_nearest(name, options)}; {group} is one of {', '.join(options)}"
    return first


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _setting_names(config_name: str) -> list[str]:
    """What one may type: the entry point's own settings, its groups, and what is in these."""
    top = OmegaConf.load(CONF / f"{config_name}.yaml")
    assert isinstance(top, DictConfig)
    entries = [str(key) for entry in top.get("defaults", []) if isinstance(entry, DictConfig) for key in entry]
    groups = sorted({entry.split("@")[0] for entry in entries if not entry.startswith("override ")})
    nested = []
    for group in groups:
        for file in (CONF / group).glob("*.yaml"):
            loaded = OmegaConf.load(file)
            nested += [f"{group}.{key}" for key in map(str, loaded) if isinstance(loaded, DictConfig)]
    return [*(key for key in map(str, top) if key not in ("defaults", "hydra")), *groups, *nested]


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
    plain = json.loads(node)
    check_node(plain)
    try:
        return hydra.utils.instantiate(plain, _convert_="all")
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

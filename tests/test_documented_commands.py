"""Every command of README.md and docs/ is one that this repository takes, or says that it needs a GPU or weights.

Commands with a configuration are resolved as the entry points resolve them, and every part's settings are held against its
constructor; the others go through their own argument parsers.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib

import hydra
import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

import coz
from coz import cli, precedence
from coz.apps.arguments import friendly
from coz.folder_metrics import _SETTINGS as FOLDER_SETTINGS
from coz.paper_layouts import LAYOUTS
from tests.config_targets import targets
from tests.documented import MARK, PAGES, ROOT, Command, commands_of, python_of

COMMANDS = [command for page in PAGES for command in commands_of(page)]
CONFIGS = {
    "evaluate.py": "evaluate",
    "train_sr.py": "train_sr",
    "train_grpo.py": "train_grpo",
    "coz.apps.zoom": "zoom",
    "coz.apps.enlarge": "enlarge",
    "coz.apps.demo": "demo",
    "coz.apps.make_pairs": "make_pairs",
    "coz.apps.cache_prompts": "cache_prompts",
    "coz.prepare": "prepare",
}
PARSED = {"coz.plots", "coz.report", "coz.apps.study", "coz.doctor", "coz.models.internvl"}
OTHERS = {"hf", "source", "exiftool", "identify"}  # programs that are not ours, and need nothing of ours


class Parsed(BaseException):
    """Thrown where a command would begin to work."""


@pytest.fixture(scope="module", autouse=True)
def initialised():
    """Hydra ready, each file of conf/ parsed once: parsing YAML is most of a composition's time."""
    read, kept = FileConfigSource.load_config, {}

    def load_config(self, config_path):
        key = (self.path, config_path)
        if key not in kept:
            kept[key] = read(self, config_path)
        return copy.deepcopy(kept[key])

    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        patch.setattr(FileConfigSource, "load_config", load_config)
        yield


def test_there_are_commands_of_each_kind():
    assert len(COMMANDS) > 80
    shown = " ".join(command.text for command in COMMANDS)
    for word in [
        *set(CONFIGS) - {"coz.apps.cache_prompts"},
        *PARSED,
        "coz.tables",
        "coz.metrics",
        "make demo",
        "torchrun",
        "benchmarks/",
        "pip install",
    ]:
        assert word in shown, f"the documentation never shows {word}"


@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)), ids=lambda c: f"{c.page}: {c.text[:70]}")
def test_a_documented_command_is_one_that_works(command: Command, monkeypatch):
    check(command, monkeypatch)


def check(command: Command, monkeypatch) -> None:
    program, *words = command.words
    if program == "torchrun":
        start = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
        if start is None:
            return  # only its options are spoken of
        program, words = "python", words[start:]
    if program == "python":
        check_python(words, command, monkeypatch)
    elif program == "make":
        targets = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[1].split()
        assert set(words) <= set(targets)
    elif program in ("pip", "conda"):
        check_installer(words)
    else:
        assert program in OTHERS or command.marked, f"{program} must be marked: {MARK.pattern}"


def check_python(words: list[str], command: Command, monkeypatch) -> None:
    module, *rest = words[1:] if words[0] == "-m" else words
    if module in CONFIGS:
        check_configuration(CONFIGS[module], module, rest)
    elif module in PARSED:
        name = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
        check_arguments(importlib.import_module(name).main, module, rest, monkeypatch)
    elif module in ("coz.tables", "coz.metrics") and not rest:
        importlib.import_module(module)  # only spoken of
    elif module == "coz.tables":
        assert rest[0] in LAYOUTS
        assert len(rest) > 1
    elif module == "coz.metrics":
        assert {word.partition("=")[0] for word in rest} <= set(FOLDER_SETTINGS)
    else:
        assert module.startswith("benchmarks/"), f"{module} is unknown to this test"
        spec = importlib.util.spec_from_file_location("documented_benchmark", ROOT / module)
        benchmark = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "documented_benchmark", benchmark)
        spec.loader.exec_module(benchmark)
        check_arguments(lambda _: benchmark.main(), module, rest, monkeypatch)


def check_arguments(main, program: str, words: list[str], monkeypatch) -> None:
    """Up to the end of the argument parser."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises((Parsed, SystemExit)) as stopped:
        main(words)
    assert stopped.type is Parsed or "--help" in words, f"{program} does not take {words}"


def check_installer(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-c", "-r", "-f"):
            assert (ROOT / word).is_file(), word
        for extra in re.findall(r"\.\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), word


# ---------------------------------------------------------------------------------------------------------------------
# configurations


def check_configuration(config_name: str, program: str, words: list[str]) -> None:
    sweep = any(word in ("-m", "--multirun") for word in words)
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    flags = [word for word in words if word not in overrides]
    assert set(flags) <= {"-m", "--cfg", "job", "--help"}, flags
    if program.startswith("coz.apps."):
        overrides = friendly(overrides)
    kept, searched = [], []
    for word in overrides:
        word = word.replace("file://examples", f"file://{ROOT}/examples")
        group, _, name = word.partition("=")
        if group.startswith("hydra/"):
            assert (cli.CONF / group / f"{name}.yaml").is_file(), word
        elif group.startswith("hydra."):
            searched.append(word)
        else:
            kept.append(word)
    for combination in star(kept):
        resolve_and_bind(config_name, tuple(searched + combination), sweep)


def star(overrides: list[str]) -> list[list[str]]:
    """Each value of a sweep once, the other sweeps at their first value."""
    parsed = OverridesParser.create().parse_overrides([cli.quote_choices(word) for word in overrides])
    choices = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [word]
        for o, word in zip(parsed, overrides, strict=True)
    ]
    combinations = [[values[0] for values in choices]]
    for place, values in enumerate(choices):
        combinations += [[*combinations[0][:place], value, *combinations[0][place + 1 :]] for value in values[1:]]
    return combinations


_DONE: set[tuple] = set()


def resolve_and_bind(config_name: str, overrides: tuple[str, ...], sweep: bool) -> None:
    """Once for the same groups and keys: a path, a scale or a seed changes no part's settings."""
    groups = precedence.config_groups()
    words = [word if word.partition("=")[0].split("@")[0] in groups else word.partition("=")[0] for word in overrides]
    key = (config_name, tuple(sorted(words)), sweep)
    if key in _DONE:
        return
    config = cli.resolve_overrides(list(overrides), config_name=config_name, sweep=sweep)
    if not sweep:
        assert not config.lacking, config.lacking
    for path, node in targets(config):
        name = node._get_node("_target_")._value()
        if not name.startswith(("coz.", "examples.")):
            continue  # test_configs.py binds it; importing trl takes longer than all of this
        signature = inspect.signature(hydra.utils.get_object(name))
        keys = {str(key): None for key in node if not str(key).startswith("_")}
        (signature.bind_partial if "_partial_" in node else signature.bind)(**keys), path
    _DONE.add(key)


# ---------------------------------------------------------------------------------------------------------------------
# the test tests


@pytest.mark.parametrize(
    "text",
    [
        "python evaluate.py methd=nn",
        "python evaluate.py profile=embedded method=coz_vlm",
        "python evaluate.py profile=embedded method=coz_null +backbone.tile=3",
        "python -m coz.apps.zoom backbone=spam",
        "python -m coz.plots grid",
        "python -m coz.plots grit RUN",
        "python -m coz.tables table9 RUN",
        "python benchmarks/evaluation.py hole",
        "python other.py",
        "make coffee",
        "pip install -e '.[ap]'",
        "vllm serve model",
    ],
)
def test_a_wrong_command_is_found(text, monkeypatch, capsys):
    with pytest.raises((Exception, SystemExit)):
        check(Command("a page", text, False), monkeypatch)


def test_commands_are_found_wherever_they_stand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\nType `make demo`, or `CUDA_VISIBLE_DEVICES=1 python evaluate.py\n  scale=4`.\n\n"
        "    make test   # all\n\n"
        "```bash\npip install x && python -m coz.doctor\npython evaluate.py \\\n    scale=4  # needs a GPU\n```\n\n"
        "```text\nmake nothing\n```\n\n# B\n\nIt needs GPUs: `vllm serve m`. `scale=4` is no command, `make` is.\n"
    )
    found = [(command.text, command.marked) for command in commands_of(page)]
    assert sorted(found) == sorted(
        [
            ("make demo", False),
            ("CUDA_VISIBLE_DEVICES=1 python evaluate.py scale=4", False),
            ("make test", False),
            ("pip install x", False),
            ("python -m coz.doctor", False),
            ("python evaluate.py scale=4", True),
            ("vllm serve m", True),
            ("make", True),
        ]
    )
    assert Command("p", "A=1 python x …", False).words == ["python", "x"]


# ---------------------------------------------------------------------------------------------------------------------
# Python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_names_what_there_is(page):
    for text in python_of(page):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("coz."):
                function = getattr(coz, ast.unparse(node.func).removeprefix("coz."))
                arguments = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(function).bind(*[None] * len(node.args), **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# for real


@pytest.mark.slow
def test_a_readers_way_through_an_evaluation(tmp_path):
    run = tmp_path / "evaluate" / "run"
    small = ["profile=embedded", "backbone=bicubic", "dataset.limit=2", "metrics=consistency", f"outputs={tmp_path}"]
    steps = [
        ["evaluate.py", "-m", *small, "scale=4,16", "method=coz_null,direct", f"hydra.sweep.dir={run}"],
        ["-m", "coz.tables", "table1", run],
        ["-m", "coz.report", run],
        ["-m", "coz.plots", "strips", run],
        ["-m", "coz.plots", "grid", run, "--scales", "16"],
        ["-m", "coz.doctor"],
        [
            "-m",
            "coz.apps.zoom",
            "image=data/photos/cat.jpg",
            "scale=16",
            "at=0.31,0.36",
            "backbone=bicubic",
            f"outputs={tmp_path}",
        ],
        ["-m", "coz.prepare", "method=coz_vlm", "list=true", f"outputs={tmp_path}"],
    ]
    for step in steps:
        done = subprocess.run([sys.executable, *map(str, step)], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 or "coz.prepare" in step, (step, done.stderr)
    for name in ("report.html", "strips.png", "grid.png", "table1.md"):
        assert (run / name).is_file(), name

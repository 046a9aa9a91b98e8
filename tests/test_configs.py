"""Every node of every config group fits the code it names, and the command line wins over method and profile."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from coz import cli
from coz.errors import UserError
from coz.paper_tables import find_layout, read_figures
from tests.config_targets import targets

GROUPS = sorted(folder for folder in cli.CONF.iterdir() if folder.is_dir() and folder.name not in ("hydra", "deepspeed"))
NODES = sorted(file for folder in GROUPS for file in folder.glob("*.yaml"))


@pytest.mark.parametrize("file", NODES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_node_binds_to_its_target(file: Path):
    """A key that nobody reads, or one that is missing, is an error here, without any weights."""
    node = OmegaConf.load(file)
    for path, target in targets(node):
        function = hydra.utils.get_object(target["_target_"])
        keys = {str(key): None for key in target if not str(key).startswith("_") and str(key) != "defaults"}
        try:
            inspect.signature(function).bind(**keys)
        except TypeError as error:
            if "missing" in str(error) and _defaults(node):
                continue  # the rest comes from another group's node
            raise AssertionError(f"{file}{path}: {error}") from error


def _defaults(node: object) -> bool:
    return isinstance(node, DictConfig) and "defaults" in node


@pytest.fixture(scope="module", autouse=True)
def initialised():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield


def _resolve(*overrides: str, sweep: bool = False) -> DictConfig:
    return cli.resolve_overrides(list(overrides), config_name="evaluate", sweep=sweep)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("osediff_sd3", "vlm")),
        (("method=direct",), ("osediff_sd3", "dape")),
        (("profile=embedded", "method=coz_null"), ("realesrgan", "null")),
        (("profile=embedded", "method=direct"), ("realesrgan", "null")),
        (("profile=embedded", "method=coz_tags"), ("realesrgan", "tags")),
        (("profile=embedded", "method=nn"), ("nearest", "null")),
        (("profile=tiny", "method=bicubic"), ("bicubic", "null")),
        (("profile=embedded", "method=coz_null", "backbone=span"), ("span", "null")),
        (("profile=embedded", "method=coz_null", "prompter=tags"), ("realesrgan", "tags")),
        (("profile=embedded", "method=coz_tags", "prompter=null"), ("realesrgan", "null")),
        (("profile=embedded", "method=direct", "backbone=bicubic", "prompter=tags"), ("bicubic", "tags")),
    ],
)
def test_the_command_line_wins_in_any_order(overrides, expected):
    for order in itertools.permutations(overrides):
        config = _resolve(*order)
        assert (config.choices.backbone, config.choices.prompter) == expected, order
        assert config.lacking == ""


def test_settings_inside_a_part_survive():
    config = _resolve("backbone.posterior=mode", "method=coz_null")
    assert config.backbone.posterior == "mode"
    assert _resolve("method=coz_vlm", "prompter.adapter=x").prompter.adapter == "x"
    config = _resolve("backbone.tile_px=256", "profile=embedded", "method=coz_null", "scale=24")
    assert config.backbone.tile_px == 256
    assert config.scale == 24


def test_what_a_profile_lacks_is_named():
    config = _resolve("profile=embedded", "method=coz_vlm")
    assert "prompter=vlm" in config.lacking
    assert "profile=embedded" in config.lacking
    assert _resolve("profile=embedded", "method=coz_vlm", "prompter=tags").lacking == ""


def test_an_interpolation_takes_no_backbone_but_a_sweep_may_name_one_for_the_others():
    with pytest.raises(UserError, match="always uses backbone=nearest"):
        _resolve("profile=embedded", "method=nn", "backbone=span")
    config = _resolve("profile=embedded", "method=nn", "backbone=span", "backbone.tile_px=256", sweep=True)
    assert config.choices.backbone == "nearest"


def test_tiny_means_small_and_random():
    config = _resolve("profile=tiny", "method=coz_null")
    assert config.backbone.weights == "random"
    assert config.backbone.size == "tiny"
    assert config.backbone.lora is None
    full = _resolve("method=coz_vlm")
    assert full.backbone.weights.startswith("stabilityai/")
    assert full.backbone.lora.endswith(".pkl")
    assert full.prompter.weights.startswith("Qwen/")


def test_a_setting_of_a_part_waits_for_the_method_that_brings_it():
    assert _resolve("method=coz_vlm", "prompter.adapter=outputs/x").prompter.adapter == "outputs/x"
    assert _resolve("prompter.adapter=outputs/x", "method=coz_vlm").prompter.adapter == "outputs/x"


def test_in_a_sweep_a_setting_is_for_the_parts_that_have_it():
    tuned = _resolve("method=coz_vlm", "prompter.adapter=outputs/x", sweep=True)
    assert tuned.prompter.adapter == "outputs/x"
    other = _resolve("method=direct", "prompter.adapter=outputs/x", sweep=True)
    assert "adapter" not in other.prompter
    folder = _resolve("profile=embedded", "method=nn", "dataset=folder", "dataset.path=/my/photos", sweep=True)
    assert folder.dataset.path == "/my/photos"  # it has the key, and no value yet
    with pytest.raises(Exception, match=r"prompter\.adaptor"):
        _resolve("method=direct", "prompter.adaptor=outputs/x", sweep=True)
    with pytest.raises(Exception, match=r"prompter\.adapter"):
        _resolve("method=direct", "prompter.adapter=outputs/x")


def test_a_data_set_that_a_profile_lacks_is_stood_in_for_or_named():
    config = _resolve("profile=embedded", "method=nn", "dataset=div2k", "dataset.limit=6")
    assert (config.choices.dataset, config.stands_for, config.dataset.limit) == ("photos", "div2k", 6)
    assert config.lacking == ""
    config = _resolve("profile=tiny", "method=nn", "dataset=div8k")
    assert "dataset=div8k" in config.lacking
    for path in ("dataset.path=/my/div2k", "++dataset.path=/my/div2k"):
        typed = _resolve("profile=embedded", "method=nn", "dataset=div2k", path)
        assert (typed.choices.dataset, typed.stands_for, typed.lacking) == ("div2k", "", "")
    paper = _resolve("method=nn", "dataset=div2k")
    assert (paper.choices.dataset, paper.stands_for, paper.dataset.count) == ("div2k", "", 800)


@pytest.mark.parametrize("file", sorted((cli.CONF / "experiment").glob("table*.yaml")), ids=lambda file: file.stem)
def test_an_experiment_sweeps_what_its_table_shows(file):
    swept = OmegaConf.load(file).hydra.sweeper.params
    layout = find_layout(file.stem)
    keys = read_figures(layout)
    assert swept.method.split(",") == list(layout.methods)
    assert swept.dataset.split(",") == list(layout.datasets)
    assert {float(scale) for scale in swept.scale.split(",")} >= {key.scale for key in keys}
    config = _resolve(
        f"+experiment={file.stem}", "profile=tiny", "scale=4", "dataset=div2k", "method=coz_null", "dataset.limit=6"
    )
    assert config.table == file.stem
    assert config.dataset.limit == 6  # what was typed wins


def test_a_sweep_keeps_its_parts():
    """Models stay loaded from job to job, however many metrics and other parts a job has besides; older ones are let go."""

    def backbone(method, scale):
        config = _resolve("profile=embedded", "metrics=default", f"method={method}", f"scale={scale}")
        for part in (config.dataset, config.engine, config.task, *config.metrics.values()):
            assert cli.build(part) is cli.build(part)
        cli.build_model(config.prompter)
        return cli.build_model(config.backbone)

    first = backbone("nn", 4)
    assert backbone("nn", 16) is first
    assert backbone("coz_null", 4) is not first
    cli.build_model(_resolve("profile=embedded", "method=coz_tags").prompter)
    cli.build_model(_resolve("profile=embedded", "backbone=span", "method=coz_tags").backbone)
    cli.build_model(_resolve("profile=embedded", "method=bicubic").backbone)
    assert backbone("nn", 4) is not first


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("scal=4", "did you mean scale"),
        ("backbone=bicubik", "did you mean bicubic"),
        ("dataset.limt=2", "did you mean dataset.limit"),
        ("++backbone.tile_pix=2", "did you mean backbone.tile_px"),
        ("method=", "method"),
    ],
)
def test_a_misspelt_override_gets_one_sentence(override, sentence):
    with pytest.raises(Exception, match=r"\S") as caught:
        _resolve("profile=embedded", override)
    text = str(caught.value) if isinstance(caught.value, UserError) else cli.explain(caught.value, "evaluate")
    assert sentence in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("entry", "key", "remark"),
    [
        ("zoom", "sclae", ", did you mean scale?"),
        ("zoom", "protocol", ""),  # a group of other entry points
        ("evaluate", "protocl", ", did you mean protocol?"),
        ("train_grpo", "grpo.arg", ", did you mean grpo.args?"),
    ],
)
def test_a_misspelt_setting_is_told_its_nearest_among_those_there_are(entry, key, remark):
    error = cli.explain(ConfigCompositionException(f"Could not override '{key}'."), entry)
    assert error == f"{key} is no setting of {entry}{remark}; see --cfg job for all"


@pytest.mark.parametrize("argument", ["backbone=null", "backbone=true", "method=5", "profile=", "+experiment=null"])
def test_a_choice_that_is_no_name(argument):
    with pytest.raises(ConfigCompositionException) as caught:
        _resolve("scale=4", argument)
    assert re.search(r"does not exist.* is one of ", cli.explain(caught.value, "evaluate"))


@pytest.mark.parametrize("argument", ["prompter='null'", "prompter=vlm", "memory=12gb", "method=nn,direct", "seed=null"])
def test_a_choice_that_may_be_stays_as_it_is(argument):
    assert cli.quote_choices(argument) == argument

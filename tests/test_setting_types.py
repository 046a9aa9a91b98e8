"""Settings of the wrong kind are refused in one sentence, and right ones are not."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from omegaconf import OmegaConf

from coz.errors import UserError
from coz.precedence import CONF
from coz.setting_types import check_node, check_typed, fits, type_hints
from tests.config_targets import targets

NODES = sorted(file for file in CONF.glob("*/*.yaml") if "hydra" not in file.parts)


class Kind(enum.Enum):
    ONE = "one"


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        ("abc", int, False),
        (None, int, False),
        (None, int | None, True),
        (1, float, True),
        (False, float, False),
        (0, bool, False),
        ("maybe", bool, False),
        (12, str, False),
        ("folder", Path, True),
        ("one", Literal["one", "two"], True),
        ("three", Literal["one", "two"], False),
        ("released", Literal["auto"] | Literal["released"] | None, True),
        ([1], int, True),  # lists are left to the code that takes them
        ("one", Kind, True),
        ("x", Sequence[str] | None, True),
    ],
)
def test_what_fits(value, hint, fitting):
    assert fits(value, hint) is fitting


@pytest.mark.parametrize("file", NODES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_signature_can_be_read_and_takes_its_own_defaults(file):
    for _, node in targets(OmegaConf.load(file)):
        plain = OmegaConf.to_container(node, resolve=False)
        hints = type_hints(plain["_target_"])
        assert {"precision", "device", "weights", "seed", "size"} & set(plain) <= set(hints), "a type that cannot be read"
        check_node(
            {key: value for key, value in plain.items() if not _is_reference(value) and not isinstance(value, dict | list)}
        )


def _is_reference(value: object) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def test_a_type_that_only_a_checker_sees_hides_no_other():
    hints = type_hints("coz.models.internvl.load_original")
    assert hints["dtype"] is torch.dtype
    assert "return" not in hints


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tile_px": "abc"}, "tile_px=abc must be a whole number"),
        ({"tile_px": 1.5}, "tile_px=1.5 must be a whole number"),
        ({"tile_px": None}, "tile_px=null must be a whole number"),
        ({"color_fix": "sepia"}, "color_fix=sepia is unknown; use"),
        ({"color_fix": True}, "color_fix=true must be"),
        ({"weights": 5}, "weights=5 must be text"),
    ],
)
def test_a_node_with_a_wrong_value(change, sentence):
    node = {"_target_": "coz.backbones.spandrel.Spandrel", "weights": "x4.pth", "tile_px": 512}
    check_node({"parts": [node]})
    with pytest.raises(UserError) as caught:
        check_node({"parts": [node | change]})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "override", "sentence"),
    [
        ("zoom", "film=maybe", "film=maybe is neither true nor false"),
        ("zoom", "film=1", "film=1 is neither true nor false"),
        ("evaluate", "strips=abc", "strips=abc is not a number; write one, as in strips=24"),
        ("evaluate", "scale=true", "scale=true is not a number"),
        ("evaluate", "strips=null", "strips=null is not a number"),
        ("evaluate", "seed=null", "seed=null is not a number; write one, as in seed=0"),
        ("evaluate", "++backbone.compile=maybe", "backbone.compile=maybe is neither"),
        ("evaluate", "chain.start_px=abc", "chain.start_px=abc is not a number"),
        ("train_sr", "keep=x", "keep=x is not a number"),
        ("train_sr", "++training.learning_rate=fast", "training.learning_rate=fast is not a number"),
        ("train_grpo", "++grpo.lora.r=abc", "grpo.lora.r=abc is not a number"),
        ("prepare", "list=perhaps", "list=perhaps is neither"),
    ],
)
def test_what_was_typed_is_held_against_the_defaults(entry, override, sentence):
    with pytest.raises(UserError) as caught:
        check_typed(["profile=tiny", override], config_name=entry)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        *(
            "scale=2.5",
            "scale=1e2",
            "strips=0",
            "wandb.enabled=true",
            "++backbone.compile=true",
            "at=[0.1,0.2]",
            "prompter=null",
        ),
        *("++backbone.weights=5", "seed=${scale}", "++backbone.lora_rank=null", "outputs=abc", "+wandb.tags=[a]", "~wandb"),
    ],
)
def test_what_is_right_or_unknown_passes(override):
    check_typed([override], config_name="evaluate")


def test_configs_of_the_users_own_are_not_held_against_ours(monkeypatch):
    with pytest.raises(UserError):
        check_typed(["backbone.seed=fixed"], config_name="evaluate")
    monkeypatch.setattr("coz.setting_types.searchpath", lambda: ["hydra.searchpath=[file:///mine]"])
    check_typed(["backbone.seed=fixed"], config_name="evaluate")
    with pytest.raises(UserError):
        check_typed(["seed=fixed"], config_name="evaluate")

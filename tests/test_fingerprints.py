"""What shapes a picture or a prompt is part of its name: a state kept under other settings is never taken for this one's.

Every setting of every part is changed by itself. It must change the fingerprint, or stand below among those that only move
the work: where, how fast, in which portions.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from coz.backbones.liif import Liif
from coz.backbones.osediff_sd3 import OSEDiffSD3
from coz.backbones.osediff_sd21 import OSEDiffSD21
from coz.backbones.s3diff import S3Diff
from coz.backbones.seesr import SeeSR
from coz.critics.server import ServedCritic
from coz.critics.vlm import VlmCritic
from coz.models.chat import CRITIC_QUESTION
from coz.models.internvl import random_internvl
from coz.models.ram import Tagger
from coz.prompters.dape import Dape
from coz.prompters.server import ServedPrompter
from coz.prompters.tags import TagPrompter
from coz.prompters.vlm import VlmPrompter

RANDOM = {"weights": "random", "size": "tiny", "device": "cpu", "precision": "fp32"}
SERVED = {"base_url": "http://localhost:8000/v1", "model": "m"}
PARTS = {
    OSEDiffSD3: RANDOM,
    OSEDiffSD21: RANDOM,
    S3Diff: RANDOM,
    SeeSR: RANDOM | {"tagger": None},
    Liif: RANDOM,
    Dape: RANDOM,
    Tagger: RANDOM,
    TagPrompter: {"device": "cpu"},
    VlmPrompter: RANDOM,
    VlmCritic: RANDOM | {"score": "parse"},
    ServedPrompter: SERVED,
    ServedCritic: SERVED,
}
FILES = {  # paths, whose contents count: tested where the files are made
    *("lora", "vae_encoder", "checkpoint", "degradation_checkpoint", "adapter", "tag_list", "thresholds", "weights"),
    *("lora_rank", "merge_adapter", "loader", "model"),  # these say something of files or of a model in memory
}
MOVES = {  # where, how fast, in which portions
    *("device", "batch_size", "vae_batch_size", "batch_queries", "memory", "offload", "drop_text_encoders"),
    *("remember_prompts", "cache_dir", "download_gb", "concurrency", "timeout_s", "retries", "backoff_s", "api_key_env"),
}
ALIKE = {  # settings of one part that change nothing in the case at hand
    (VlmCritic, "min_mass"),  # of score=expected alone
    *((Tagger, name) for name in ("image_px", "window", "head_heads")),  # of official weights alone
    *((Dape, name) for name in ("image_px", "window", "head_heads")),
}
OTHER = {  # values that no rule below finds
    "size": "full",
    "precision": "bf16",
    "question": "What? " + CRITIC_QUESTION,
    "merge": False,
    "encode_shift": True,
    "tagger": Tagger(**RANDOM),
    "random_loader": random_internvl,
    "identity": "qwen@abc",
    "base_url": "http://elsewhere:8000/v1",
    "positive_prompt": "good",
    "negative_prompt": "bad",
    "added_prompt": "sharp",
    "guidance_scale": 2.0,
    "top_p": 0.5,
    "repetition_penalty": 1.5,
    "max_image_px": 4096,
    "vae_encoder_tile_px": 512,
}


def _settings(part: type) -> list[str]:
    return [name for name in inspect.signature(part).parameters if name not in FILES | MOVES and (part, name) not in ALIKE]


def _other(part: type, name: str) -> object:
    """Another value for a setting."""
    if name in OTHER:
        return OTHER[name]
    hint = get_type_hints(part if dataclasses.is_dataclass(part) else part.__init__)[name]
    value = PARTS[part].get(name, inspect.signature(part).parameters[name].default)
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    assert isinstance(value, int | float | str), f"{part.__name__}.{name}={value!r}: name another value in OTHER"
    return f"{value}2" if isinstance(value, str) else value + (1 if isinstance(value, int) else 0.25)


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part in PARTS for name in _settings(part)], ids=lambda x: getattr(x, "__name__", x)
)
def test_a_setting_that_shapes_the_result_is_in_its_name(part, name, monkeypatch):
    monkeypatch.setattr("coz.models.vlm._check_quantization", lambda *_, **__: None)  # wants bitsandbytes and a GPU
    other = _other(part, name)
    one, two = part(**PARTS[part]), part(**(PARTS[part] | {name: other}))
    assert json.dumps(one.fingerprint, sort_keys=True) != json.dumps(two.fingerprint, sort_keys=True)
    assert part(**PARTS[part]).fingerprint == one.fingerprint

"""What a GRPO recipe says: held against what can be trained, told, and shared out over processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import nn

from coz.errors import UserError
from coz.precedence import CONF
from coz.setting_types import check_node

logger = logging.getLogger(__name__)

RECIPES = ("paper", "trl")
LEAST = {
    "grpo.args.max_steps": 1,
    "grpo.args.per_device_train_batch_size": 1,
    "grpo.args.num_iterations": 1,
    "grpo.args.max_completion_length": 1,
    "grpo.args.num_generations": 2,  # an advantage compares the answers to one question
    "grpo.completions_per_step": 1,
    "grpo.lora.r": 1,
    "watch.first_steps": 1,
    "watch.window": 1,
    "watch.kept_answers": 0,
}


def check_recipe(config: DictConfig) -> None:
    """Refuse arguments of a wrong kind, and counts with which nothing can be trained.

    Raises:
        UserError: naming the setting.
    """
    for node in (config.grpo.args, config.grpo.lora):  # built only beside the model
        check_node(plain(node))
    for key, least in LEAST.items():
        value = OmegaConf.select(config, key)
        if value is not None and value < least:
            raise UserError(f"{key}={value} must be at least {least}")


def describe_recipe(chosen: DictConfig) -> list[str]:
    """Say where the chosen recipe differs from the other one. → the lines."""
    other = RECIPES[1] if chosen.name == RECIPES[0] else RECIPES[0]
    theirs = plain(OmegaConf.load(CONF / "grpo" / f"{RECIPES[0]}.yaml").args)
    if other != RECIPES[0]:
        theirs |= plain(OmegaConf.load(CONF / "grpo" / f"{other}.yaml").args)
    ours = plain(chosen.args)
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    lines = [f"{key}: {ours[key]}  ({other}: {theirs[key]})" for key in differing]
    logger.info("grpo=%s differs from grpo=%s in %d settings:\n  %s", chosen.name, other, len(lines), "\n  ".join(lines))
    return lines


def plain(node: DictConfig) -> dict[str, Any]:
    """A node's values, references resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))


def completions_per_process(grpo: DictConfig, *, processes: int) -> tuple[int, int]:
    """(completions per process at a time, times per step), so that a step has `completions_per_step` in all.

    Raises:
        UserError: numbers that do not divide.
    """
    per_device, total = grpo.args.per_device_train_batch_size, grpo.completions_per_step
    generations = grpo.args.num_generations
    if total % processes:
        raise UserError(f"grpo.completions_per_step={total} cannot be shared by {processes} processes; use a multiple")
    at_a_time = min(per_device, total // processes)
    if at_a_time % generations or (total // processes) % at_a_time:
        raise UserError(
            f"grpo.completions_per_step={total} over {processes} processes, {at_a_time} at a time, are no whole groups of "
            f"num_generations={generations}; change grpo.completions_per_step or grpo.args.per_device_train_batch_size"
        )
    return at_a_time, total // processes // at_a_time


def check_adapted(model: nn.Module, pattern: str | Sequence[str]) -> list[str]:
    """The modules that a LoRA pattern adapts.

    Raises:
        UserError: none, or some of the vision tower, which stays frozen.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(pattern, str):
        adapted = [name for name in linear if re.fullmatch(pattern, name)]
    else:
        adapted = [name for name in linear if name.rpartition(".")[2] in set(pattern) or name in set(pattern)]
    seeing = [name for name in adapted if re.search(r"visual|vision", name)]
    if not adapted or seeing:
        which = f"also adapts {seeing[0]}, of the vision tower" if seeing else "matches no linear layer"
        raise UserError(f"grpo.lora.target_modules={pattern} {which}; give a pattern of the language model's layers")
    return adapted

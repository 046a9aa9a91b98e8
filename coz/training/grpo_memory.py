"""How much GPU memory a GRPO run takes, and how to fit it: 4 × 24 GB or one of 80 GB."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from coz.models.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)

# Qwen2.5-VL-3B's language model
_LAYERS, _HIDDEN, _INNER, _KEY_VALUE = 36, 2048, 11008, 256
_TOKENS_PER_PICTURE = 18 * 18  # 512 px in squares of 28 px
_TEXT_TOKENS = 60
_RESERVE_GB = 1.5  # CUDA's own, fragments, buffers


@dataclass(frozen=True)
class Estimate:
    """Gigabytes on each GPU."""

    policy: float
    adapters: float
    activations: float
    critic: float

    @property
    def total(self) -> float:
        """All together, with what CUDA takes for itself."""
        return self.policy + self.adapters + self.activations + self.critic + _RESERVE_GB


def estimate(
    policy: VisionLanguageModel,
    rewards: Sequence[object],
    *,
    rank: int,
    batch: int,
    completion_tokens: int,
    checkpointing: bool,
) -> Estimate:
    """What a run takes by the models' sizes.

    Args:
        rank: of the LoRA.
        batch: completions at a time on a GPU.
        completion_tokens: of the longest.
    """
    widths = [(_HIDDEN, _HIDDEN)] * 2 + [(_HIDDEN, _KEY_VALUE)] * 2 + [(_HIDDEN, _INNER)] * 3
    adapter_parameters = _LAYERS * rank * sum(a + b for a, b in widths)
    tokens = 2 * _TOKENS_PER_PICTURE + _TEXT_TOKENS + completion_tokens
    inside_layer = tokens * (6 * _HIDDEN + 4 * _INNER) * 2  # bf16, what a layer keeps for its gradients
    activations = tokens * _HIDDEN * 2 * _LAYERS + inside_layer if checkpointing else inside_layer * _LAYERS
    critics: list[Any] = [getattr(reward, "critic", None) for reward in rewards]
    critic_gb = sum(critic.model.memory_gb for critic in critics if hasattr(critic, "model"))
    tiny = policy.weights == "random" and policy.size == "tiny"
    scale = 0.0 if tiny else 1e-9
    return Estimate(
        policy=policy.memory_gb,
        adapters=adapter_parameters * 16 * scale,  # fp32 weight and gradient, Adam's two moments
        activations=batch * activations * scale,
        critic=critic_gb,
    )


def explain_memory(need: Estimate) -> str:
    """Log an estimate, and what to change where it does not fit this GPU. → the text."""
    text = (
        f"estimated memory: policy {need.policy:.1f}, adapters and Adam {need.adapters:.1f}, "
        f"activations {need.activations:.1f}, critic {need.critic:.1f}, CUDA {_RESERVE_GB:.1f}: {need.total:.1f} GB"
    )
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
        text += f" of {total:.0f} GB on each GPU" + ("" if need.total < total else "; " + advice(need, total))
    logger.info("%s", text)
    return text


def advice(need: Estimate, total_gb: float) -> str:
    """What to change where a run does not fit a GPU."""
    for name, share in (("int8", 0.6), ("nf4", 0.4)):  # of bf16's size, vision tower and caches included
        if need.total - need.critic * (1 - share) < total_gb:
            return (
                f"set critic.quantization={name} (from a converted checkpoint: python -m coz.models.internvl), or serve the "
                "critic on a GPU of its own with critic=server"
            )
    if need.total - need.critic < total_gb:
        return "serve the critic on a GPU of its own with critic=server"
    return "lower grpo.args.per_device_train_batch_size, or use deepspeed conf/deepspeed/grpo_zero3.json"

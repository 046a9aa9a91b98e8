"""The plain descent that teaches the small bases of dry runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_WARMUP_STEPS = 20


def descend(
    net: nn.Module,
    losses: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> float:
    """Train all parameters with Adam at a rate that rises at first and then falls to zero; the net is frozen afterwards.

    Args:
        losses: step → what is minimised, and what of it is told.

    Returns:
        The last value told.
    """
    net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    value = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / _WARMUP_STEPS) * (1 - step / steps)
        loss, told = losses(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        value = float(told.detach())
    net.requires_grad_(False)
    return value

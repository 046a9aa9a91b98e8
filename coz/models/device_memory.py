"""What models that share a GPU need of it together, said before any of them is loaded.

A model that can tell has an attribute `demand`; one without is a small net and counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from coz.errors import UserError

GB = 1e9


class NotEnoughMemory(UserError):
    """The GPU is smaller than what the chosen plan needs."""


@dataclass(frozen=True)
class Demand:
    """What a model asks of its device, in GB (10^9 bytes), by its tensors' shapes; the driver's own share comes on top."""

    device: torch.device
    rest_gb: float
    """Between calls: weights that stay."""
    peak_gb: float
    """At the widest moment of a call, weights included."""


def needs_by_device(demands: Sequence[Demand], *, together: bool = False) -> dict[torch.device, float]:
    """Peak memory of each device in GB.

    Args:
        together: the models work at the same time; else one after the other, while the others rest.
    """
    needs: dict[torch.device, float] = {}
    for device in dict.fromkeys(_place(demand) for demand in demands):
        here = [demand for demand in demands if _place(demand) == device]
        resting = sum(demand.rest_gb for demand in here)
        rises = [demand.peak_gb - demand.rest_gb for demand in here]
        needs[device] = resting + (sum(rises) if together else max(rises))
    return needs


def _place(demand: Demand) -> torch.device:
    """`cuda` is the first GPU."""
    return torch.device("cuda", demand.device.index or 0) if demand.device.type == "cuda" else demand.device


def describe_needs(demands: Mapping[str, Demand], *, plan: str, together: bool = False, remedy: str = "") -> list[str]:
    """A line per device for the log: what the models need of it together, and what it has.

    Args:
        demands: by what the model is in the run, such as `backbone`.
        plan: the memory plan's name.
        remedy: what to do where a GPU is too small.

    Raises:
        NotEnoughMemory: a GPU has less than the plan needs.
    """
    lines = []
    for device, need in needs_by_device(list(demands.values()), together=together).items():
        parts = [
            f"{name} {demand.peak_gb:.1f} at work, {demand.rest_gb:.1f} at rest"
            for name, demand in demands.items()
            if _place(demand) == device
        ]
        line = f"memory={plan} needs about {need:.1f} GB on {device} ({'; '.join(parts)})"
        if device.type == "cuda":
            has = torch.cuda.get_device_properties(device).total_memory / GB
            if need > has:
                raise NotEnoughMemory(f"{line}, the GPU has {has:.0f} GB; {remedy or 'use a smaller plan'}")
            line += f", the GPU has {has:.0f}"
        lines.append(line)
    return lines

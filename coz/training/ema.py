"""A moving average of weights, which is often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """a ← d a + (1 - d) w after every step.

    Args:
        parameters: by name.
        decay: d; early on (1 + n) / (10 + n) where that is less, so that the start is forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._updates = 0
        self._values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in after a step."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, parameter in self._parameters.items():
            self._values[name].lerp_(parameter, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The network has the average's weights inside the block."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self._values)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"updates": self._updates, "values": {name: value.cpu() for name, value in self._values.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Out of a checkpoint."""
        self._updates = int(state["updates"])
        for name, value in state["values"].items():
            self._values[name].copy_(value)

"""What the training loop asks of a network that it trains: it knows nothing else about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one process."""

    lq: Tensor  # (B, 3, h, w) in [0, 1], degraded; of hr's size, or a quarter where the trainee is not `enlarged`
    hr: Tensor  # (B, 3, H, W) in [0, 1]
    prompts: Sequence[str]
    indices: Sequence[int]  # numbers of the samples in the run
    seed: int  # of the run; with `indices` it gives everything that the losses draw


@dataclass(frozen=True)
class Outcome:
    """Losses of a batch: what is minimised, and its parts for the log."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Trainee(Protocol):
    """A network under training. An `nn.Module` whose call gives the losses.

    Construction is cheap and checks every setting; `load()` reads weights.
    """

    enlarged: bool
    """Whether it takes degraded images at the target's size (diffusion models) or at a quarter of it."""

    def load(self) -> None: ...

    def __call__(self, batch: Batch) -> Outcome: ...

    def trained(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """What the optimiser changes: parameters by name, in groups. `generator` is the one whose result is kept."""
        ...

    def restore(self, lq: Tensor, *, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """As the backbone will do it, for validation: (B, 3, h, w) in [0, 1] → (B, 3, H, W) in [0, 1], on the device."""
        ...

    def write(self, folder: Path) -> Mapping[str, str]:
        """Write the result with its note (see `coz.models.trained`); returns the settings that load it."""
        ...

    def write_released(self, folder: Path) -> None:
        """Write the result in the format that the authors release, where there is one."""
        ...


def seeded_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator per sample, on the CPU, so that a GPU or another number of processes draws the same."""
    import numpy as np

    states = [int(np.random.SeedSequence([seed, index, 1]).generate_state(1, np.uint64)[0] >> 1) for index in indices]
    return [torch.Generator().manual_seed(state) for state in states]

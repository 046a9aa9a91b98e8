"""S3Diff's view of a picture's degradation: an estimator of blur and noise, and the matrices it puts into adapters.

Zhang et al., "Degradation-Guided One-Step Image Super-Resolution with Diffusion Priors", 2024. Sizes are read from the
shapes of the checkpoint's tensors; module names are those of the authors' files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coz.checkpoint import StateDict, WrongWeights
from coz.models.sd2 import fill

BRANCHES = 2
"""One estimates the blur, one the noise."""


class ResidualBlock(nn.Module):
    """x + conv2(relu(conv1 x)), same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class DegradationNet(nn.Module):
    """Scores of blur and noise in [0, 1], from two branches that share nothing.

    Args:
        widths: channels before and after every layer of a branch's body; a layer that keeps the width is a residual
            block, one that is marked as `True` in `strided` a convolution of stride 2.
        hidden: width of the head.
    """

    def __init__(self, *, widths: list[int], strided: list[bool], hidden: int) -> None:
        super().__init__()

        def body() -> nn.Sequential:
            layers = []
            for before, after, stride in zip(widths, widths[1:], strided, strict=False):
                layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1) if stride else ResidualBlock(after))
            return nn.Sequential(*layers)

        def head() -> nn.Sequential:
            return nn.Sequential(nn.Linear(widths[-1], hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

        self.conv_first = nn.ModuleList(nn.Conv2d(3, widths[0], 3, padding=1) for _ in range(BRANCHES))
        self.body = nn.ModuleList(body() for _ in range(BRANCHES))
        self.fc_degree = nn.ModuleList(head() for _ in range(BRANCHES))

    @classmethod
    def of_width(cls, width: int, last: int, hidden: int = 512) -> DegradationNet:
        """The authors' layout, whose released widths are 64 and 128: six blocks, a strided convolution, two blocks."""
        return cls(widths=[width] * 7 + [last] * 3, strided=[False] * 6 + [True] + [False] * 2, hidden=hidden)

    @classmethod
    def from_state(cls, state: Any, *, what: str) -> DegradationNet:
        """The net of a `de_net.pth`.

        Raises:
            WrongWeights: names the first keys that do not belong there.
        """
        try:
            widths = [state["conv_first.0.weight"].shape[0]]
            strided: list[bool] = []
            while any(name.startswith(f"body.0.{len(strided)}.") for name in state):
                conv = state.get(f"body.0.{len(strided)}.weight")
                strided.append(conv is not None)
                widths.append(widths[-1] if conv is None else conv.shape[0])
            hidden = state["fc_degree.0.0.weight"].shape[0]
        except (KeyError, TypeError, AttributeError) as error:
            raise WrongWeights(f"{what} is not S3Diff's degradation estimator ({error} is missing); give de_net.pth") from error
        return fill(lambda: cls(widths=widths, strided=strided, hidden=hidden), state, what=what)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] → (B, 2)."""
        scores = []
        for first, body, head in zip(self.conv_first, self.body, self.fc_degree, strict=True):
            scores.append(head(body(first(x)).mean((2, 3))))
        return torch.cat(scores, dim=1)


class Modulator(nn.Module):
    """Degradation scores → one r x r matrix for every block of a network.

    Args:
        rows: blocks of the network.
        rank: r of its adapters.
        frequencies: how many fixed frequencies encode each score.
    """

    def __init__(self, *, rows: int, rank: int, frequencies: int, block_width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.rank = rank
        self.de_mlp = nn.Sequential(nn.Linear(2 * BRANCHES * frequencies, hidden), nn.ReLU())
        self.block_mlp = nn.Sequential(nn.Linear(block_width, block_width), nn.ReLU())
        self.fuse_mlp = nn.Linear(hidden + block_width, rank * rank)
        self.block = nn.Embedding(rows, block_width)
        self.register_buffer("frequencies", torch.zeros(frequencies))

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any], net: str, *, rows: int, rank: int, what: str) -> Modulator:
        """The modulator of one network (`unet` or `vae`) out of an `s3diff.pkl`.

        Raises:
            WrongWeights: names the first keys that differ.
        """
        state: StateDict = {"frequencies": checkpoint["w"]}
        for part in ("de_mlp", "block_mlp", "fuse_mlp"):
            tensors = checkpoint[f"state_dict_{net}_{part}"]
            state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        block = checkpoint["state_embeddings"][f"state_dict_{net}_block"]
        state |= {f"block.{name}": tensor for name, tensor in block.items()}
        sizes = {"frequencies": len(checkpoint["w"])}
        if "de_mlp.0.weight" in state and "block.weight" in state:
            sizes |= {"hidden": state["de_mlp.0.weight"].shape[0], "block_width": state["block.weight"].shape[1]}
        return fill(lambda: cls(rows=rows, rank=rank, **sizes), state, what=f"{what}: modulation of the {net}")

    def to_checkpoint(self, net: str) -> dict[str, Any]:
        """The entries of an `s3diff.pkl` that `from_checkpoint` reads, but for `state_embeddings`' other network."""
        entries: dict[str, Any] = {"w": self.frequencies}
        for part in ("de_mlp", "block_mlp", "fuse_mlp"):
            entries[f"state_dict_{net}_{part}"] = dict(getattr(self, part).state_dict())
        entries["state_embeddings"] = {f"state_dict_{net}_block": dict(self.block.state_dict())}
        return entries

    def forward(self, scores: Tensor) -> Tensor:
        """(B, 2) → (B, rows, r, r)."""
        phase = 2 * math.pi * scores[..., None] * self.frequencies
        features = torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(1)  # sin, cos of blur, then of noise
        degradation, block = self.de_mlp(features), self.block_mlp(self.block.weight)
        count, rows = len(degradation), len(block)
        pairs = [degradation[:, None].expand(-1, rows, -1), block[None].expand(count, -1, -1)]
        return self.fuse_mlp(torch.cat(pairs, dim=-1)).view(count, rows, self.rank, self.rank)

"""LIIF (Chen et al., CVPR 2021): a picture as a function of the point, so that any target size can be queried.

An encoder without upsampling gives a feature per pixel; an MLP, asked with the 3 x 3 features around a point, the point's
offset and the size of the target's pixel, answers with a colour. Four answers, one per nearest feature on each diagonal,
are blended by area ("local ensemble").

Two properties of the MLP make the query cheap. Its first layer is linear in the unfolded features, so their share of it is
one 3 x 3 convolution over the picture instead of a 9C-wide product per query and corner. And only rows of that table are
looked up per query, so that memory grows with the input and the number of queries held at once, not with the target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import WrongWeights

CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))  # a corner and the one opposite to it add up to index 3
SHIFT = 1e-6  # without it, whole scales such as 3 fall on exact ties between two features
BATCH_QUERIES = 16_384


@dataclass(frozen=True)
class EdsrSizes:
    """EDSR-baseline's residual blocks and width."""

    blocks: int = 16
    features: int = 64


@dataclass(frozen=True)
class RdnSizes:
    """A residual dense network: `blocks` of `layers` convolutions that add `growth` channels each ("RDN-B")."""

    blocks: int = 16
    layers: int = 8
    growth: int = 64
    features: int = 64


@dataclass(frozen=True)
class LiifSizes:
    """All that the architecture depends on."""

    encoder: EdsrSizes | RdnSizes
    hidden: tuple[int, ...] = (256, 256, 256, 256)

    @property
    def encoder_name(self) -> str:
        return "edsr" if isinstance(self.encoder, EdsrSizes) else "rdn"


FULL = {"edsr": LiifSizes(EdsrSizes()), "rdn": LiifSizes(RdnSizes())}  # the two released checkpoints
TINY = {
    "edsr": LiifSizes(EdsrSizes(blocks=2, features=8), hidden=(16, 16)),
    "rdn": LiifSizes(RdnSizes(blocks=2, layers=2, growth=4, features=8), hidden=(16, 16)),
}


def _conv(channels_in: int, channels_out: int, kernel_px: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_px, padding=kernel_px // 2)


class _EdsrBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(features, features), nn.ReLU(inplace=True), _conv(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Edsr(nn.Module):
    """EDSR-baseline's features: (B, 3, h, w) → (B, features, h, w). LIIF's copy leaves out the mean shift."""

    def __init__(self, sizes: EdsrSizes) -> None:
        super().__init__()
        blocks = [_EdsrBlock(sizes.features) for _ in range(sizes.blocks)]
        self.head = nn.Sequential(_conv(3, sizes.features))
        self.body = nn.Sequential(*blocks, _conv(sizes.features, sizes.features))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.head(x)
        return shallow + self.body(shallow)


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(channels, growth), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(x)), dim=1)


class _DenseBlock(nn.Module):
    def __init__(self, sizes: RdnSizes) -> None:
        super().__init__()
        widths = [sizes.features + i * sizes.growth for i in range(sizes.layers + 1)]
        self.convs = nn.Sequential(*(_DenseLayer(width, sizes.growth) for width in widths[:-1]))
        self.LFF = _conv(widths[-1], sizes.features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.LFF(self.convs(x))


class Rdn(nn.Module):
    """The residual dense network's features: (B, 3, h, w) → (B, features, h, w). Names are the checkpoint's."""

    def __init__(self, sizes: RdnSizes) -> None:
        super().__init__()
        self.SFENet1, self.SFENet2 = _conv(3, sizes.features), _conv(sizes.features, sizes.features)
        self.RDBs = nn.ModuleList(_DenseBlock(sizes) for _ in range(sizes.blocks))
        self.GFF = nn.Sequential(_conv(sizes.blocks * sizes.features, sizes.features, 1), _conv(sizes.features, sizes.features))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.SFENet1(x)
        outputs = [self.SFENet2(shallow)]
        for block in self.RDBs:
            outputs.append(block(outputs[-1]))
        return shallow + self.GFF(torch.cat(outputs[1:], dim=1))


class _Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 3))


class Liif(nn.Module):
    """Encoder and MLP. Pictures and answers are in [-1, 1] (answers may lie outside); coordinates are (row, column)."""

    def __init__(self, sizes: LiifSizes) -> None:
        super().__init__()
        self.encoder = Edsr(sizes.encoder) if isinstance(sizes.encoder, EdsrSizes) else Rdn(sizes.encoder)
        self.imnet = _Mlp(9 * sizes.encoder.features + 4, sizes.hidden)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] → features (B, C, h, w)."""
        return self.encoder(x)

    def feature_table(self, features: Tensor) -> Tensor:
        """The first layer's share that depends on the features alone: (1, C, h, w) → (h·w, hidden).

        Unfolding orders its rows channel by channel, 3 x 3 each, which is a convolution kernel's own order.
        """
        first = self.imnet.layers[0]
        channels = features.shape[1]
        kernel = first.weight[:, : 9 * channels].unflatten(1, (channels, 3, 3))
        return F.conv2d(features, kernel, first.bias, padding=1)[0].flatten(1).t().contiguous()

    def query(self, features: Tensor, coords: Tensor, cells: Tensor, *, batch_queries: int = BATCH_QUERIES) -> Tensor:
        """Colours at free points.

        Args:
            features: (1, C, h, w).
            coords: (N, 2), (row, column) in [-1, 1], float32.
            cells: (N, 2), the size of a target pixel in those units.
            batch_queries: how many are answered at once; bounds the memory, changes no value.

        Returns:
            (N, 3), float32.
        """
        table, shape = self.feature_table(features), features.shape[-2:]
        pieces = zip(coords.split(batch_queries), cells.split(batch_queries), strict=True)
        return torch.cat([self._answer(table, shape, *piece) for piece in pieces])

    def render(self, features: Tensor, size: tuple[int, int], *, batch_queries: int = BATCH_QUERIES) -> Tensor:
        """All pixels of a target: features (1, C, h, w) → (3, *size), float32, on the CPU."""
        height, width = size
        table, shape = self.feature_table(features), features.shape[-2:]
        cell = torch.tensor([2 / height, 2 / width], device=features.device)
        picture = torch.empty(height * width, 3)
        for start in range(0, height * width, batch_queries):
            stop = min(start + batch_queries, height * width)
            coords = pixel_centers(size, start, stop, device=features.device)
            picture[start:stop] = self._answer(table, shape, coords, cell.expand_as(coords)).cpu()
        return picture.t().reshape(3, height, width)

    def _answer(self, table: Tensor, shape: tuple[int, int], coords: Tensor, cells: Tensor) -> Tensor:
        """(N, 2) points and cells → (N, 3), blended over the four corners."""
        height, width = shape
        first, rest = self.imnet.layers[0], self.imnet.layers[1:]
        position_weight = first.weight[:, -4:].t()
        scale = coords.new_tensor([height, width])
        centers = axis_centers(height, coords.device), axis_centers(width, coords.device)
        answers, areas = [], []
        for down, right in CORNERS:
            shift = coords.new_tensor([down / height + SHIFT, right / width + SHIFT])
            corner = (coords + shift).clamp(-1 + SHIFT, 1 - SHIFT)
            rows, columns = (
                ((corner[:, axis] + 1) * (shape[axis] / 2) - 0.5).round().long().clamp(0, shape[axis] - 1) for axis in (0, 1)
            )
            offset = (coords - torch.stack((centers[0][rows], centers[1][columns]), dim=-1)) * scale
            position = torch.cat((offset, cells * scale), dim=-1).to(table.dtype)
            answers.append(rest(torch.addmm(table[rows * width + columns], position, position_weight)).float())
            areas.append(offset.prod(dim=-1).abs() + 1e-9)
        total = torch.stack(areas).sum(dim=0)
        return sum(answer * (area / total)[:, None] for answer, area in zip(answers, reversed(areas), strict=True))


def axis_centers(pixels: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres of `pixels` equal parts of [-1, 1], rounded as LIIF's own grid is. → (pixels,)"""
    return (-1 + 1 / pixels) + 2 / pixels * torch.arange(pixels, dtype=torch.float32, device=device)


def pixel_centers(size: tuple[int, int], start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Points number `start` to `stop` of a target, row by row: → (stop - start, 2)."""
    height, width = size
    flat = torch.arange(start, height * width if stop is None else stop, device=device)
    return torch.stack((axis_centers(height, device)[flat // width], axis_centers(width, device)[flat % width]), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# the official checkpoint


def read_official(checkpoint: object, *, what: str) -> dict[str, Tensor]:
    """The network's tensors out of an official `.pth` (`model.sd`, beside the optimizer's), without unused ones.

    Raises:
        WrongWeights: not a LIIF checkpoint.
    """
    spec = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    state = spec.get("sd") if isinstance(spec, Mapping) else None
    if not isinstance(state, Mapping) or "imnet.layers.0.weight" not in state:
        raise WrongWeights(f"{what} is no LIIF checkpoint (no model.sd with an imnet in it); use edsr-baseline-liif.pth")
    # EDSR's mean shift is stored, yet no forward pass of LIIF uses it.
    return {name: tensor for name, tensor in state.items() if not name.startswith(("encoder.sub_mean.", "encoder.add_mean."))}


def sizes_from(shapes: Mapping[str, tuple[int, ...]], *, what: str) -> LiifSizes:
    """Read the architecture off the tensors' shapes, since the released files do not state it.

    Raises:
        WrongWeights: the encoder is neither EDSR-baseline nor RDN.
    """

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in shapes)

    linear = sorted(int(m[1]) for name in shapes if (m := re.fullmatch(r"imnet\.layers\.(\d+)\.weight", name)))
    hidden = tuple(shapes[f"imnet.layers.{i}.weight"][0] for i in linear[:-1])
    if "encoder.head.0.weight" in shapes:
        edsr = EdsrSizes(blocks=count(r"encoder\.body\.\d+\.body\.0\.weight"), features=shapes["encoder.head.0.weight"][0])
        return LiifSizes(edsr, hidden)
    if "encoder.SFENet1.weight" in shapes and "encoder.RDBs.0.convs.0.conv.0.weight" in shapes:
        rdn = RdnSizes(
            blocks=count(r"encoder\.RDBs\.\d+\.LFF\.weight"),
            layers=count(r"encoder\.RDBs\.0\.convs\.\d+\.conv\.0\.weight"),
            growth=shapes["encoder.RDBs.0.convs.0.conv.0.weight"][0],
            features=shapes["encoder.SFENet1.weight"][0],
        )
        return LiifSizes(rdn, hidden)
    raise WrongWeights(f"{what} has an encoder that is neither EDSR-baseline nor RDN; use one of LIIF's released checkpoints")

"""Low-rank adapters (LoRA) over linear and convolution layers: folded into the weights, or beside them.

An adapter adds `factor * up(down(x))` to a layer. `down` is (rank, in) or (rank, in, k, k), `up` is (out, rank) or
(out, rank, 1, 1). Folded, a model is as fast as without; beside the weights, it can be trained and switched off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one layer's adapter."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


Adapter = dict[str, LoraPair]  # by the layer's name in its model


class AdaptedLayer(nn.Module):
    """A frozen layer with an adapter beside it.

    Args:
        half_output: round the output to float16, as the released code does for the modulations of SD3.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, *, rank: int, factor: float, half_output: bool = False) -> None:
        super().__init__()
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.factor = factor
        self.half_output = half_output
        if isinstance(base, nn.Conv2d):
            shape = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
            self.lora_down = nn.Conv2d(base.in_channels, rank, **shape, **like)
            self.lora_up = nn.Conv2d(rank, base.out_channels, 1, **like)
        else:
            self.lora_down = nn.Linear(base.in_features, rank, **like)
            self.lora_up = nn.Linear(rank, base.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.factor * self.lora_up(self.lora_down(x))
        return y.half() if self.half_output else y


def adapt(model: nn.Module, adapter: Mapping[str, LoraPair], *, factor: float, half_output: bool = False) -> None:
    """Put an adapter beside the layers it names, with its values."""
    for name, pair in adapter.items():
        layer = AdaptedLayer(model.get_submodule(name), rank=pair.rank, factor=factor, half_output=half_output)
        layer.lora_up.weight.data.copy_(pair.up)
        layer.lora_down.weight.data.copy_(pair.down)
        layer.requires_grad_(False)
        set_submodule(model, name, layer)


@torch.no_grad()
def merge(model: nn.Module, adapter: Mapping[str, LoraPair], *, factor: float) -> None:
    """Fold an adapter into the weights of the layers it names; the sum is taken in float32."""
    for name, pair in adapter.items():
        weight = model.get_submodule(name).weight
        update = pair.up.to(weight.device).float().flatten(1) @ pair.down.to(weight.device).float().flatten(1)
        weight.copy_(weight.float() + factor * update.view_as(weight))


def extract(model: nn.Module) -> Adapter:
    """The adapter that lies beside the layers of a model, as float32 copies on the CPU."""
    return {
        name: LoraPair(up=_copy(layer.lora_up.weight), down=_copy(layer.lora_down.weight))
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer)
    }


def random_adapter(layers: Mapping[str, tuple[int, ...]], *, rank: int, generator: torch.Generator) -> Adapter:
    """An adapter whose update has about a tenth of the size of an ordinary weight, for random models.

    Args:
        layers: the shape of each layer's weight, by its name.
    """
    adapter = {}
    for name, (n_out, *inner) in layers.items():
        down = torch.randn(rank, *inner, generator=generator)
        up = torch.randn(n_out, rank, *(1 for _ in inner[1:]), generator=generator)
        adapter[name] = LoraPair(up=up * 0.1 / rank**0.5, down=down / down[0].numel() ** 0.5)
    return adapter


def layer_shapes(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """The weight shapes of the linear and convolution layers of a model, in its order; or of those named."""
    wanted = None if names is None else set(names)
    return {
        name: tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and (wanted is None or name in wanted)
    }


def pair_shapes(weight_shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (up, down) over a layer whose weight has `weight_shape`."""
    n_out, *inner = weight_shape
    return (n_out, rank, *(1 for _ in inner[1:])), (rank, *inner)


def set_submodule(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the submodule `name`, also inside lists."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)

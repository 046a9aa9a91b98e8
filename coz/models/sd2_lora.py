"""Low-rank adapters in the files of OSEDiff and S3Diff: read strictly, merged, or run beside the layer they adapt.

An adapter adds (8 / rank) · B(A(x)) to a linear layer or convolution; 8 is peft's default alpha, which both codes
leave as it is. S3Diff puts a matrix between the two that depends on the picture: (8 / rank) · B(Mᵀ A(x)).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import compare_keys

ALPHA = 8.0

UNET_TARGETS = (
    *("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2", "ff.net.0.proj"),
    *("conv", "conv1", "conv2", "conv_shortcut", "conv_out"),
)
"""Suffixes of the UNet's layers that both codes adapt. OSEDiff adds `conv_in`."""
VAE_TARGETS = r"^encoder\..*(conv1|conv2|conv_in|conv_shortcut|conv|conv_out|to_k|to_q|to_v|to_out\.0)$"
"""The autoencoder's layers that S3Diff adapts. OSEDiff adds `quant_conv`."""


@dataclass(frozen=True)
class Adapter:
    """A (r, in[, k, k]) and B (out, r[, 1, 1]) of one layer."""

    a: Tensor
    b: Tensor

    @property
    def scale(self) -> float:
        return ALPHA / self.a.shape[0]


def matching_layers(net: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Names of the linear layers and convolutions that peft would adapt: by suffix, or by a regular expression."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]


def adapter_shapes(net: nn.Module, layers: Mapping[str, str], *, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapters' tensors as peft saves them.

    Args:
        layers: the adapter's name for every adapted layer's name.
    """
    shapes = {}
    modules = dict(net.named_modules())
    for name, adapter in layers.items():
        if name not in modules:  # a file made for another network: a name that no file has makes the comparison fail
            shapes[f"{name} (a layer that the network lacks)"] = ()
            continue
        out, *rest = modules[name].weight.shape
        shapes[f"{name}.lora_A.{adapter}.weight"] = (rank, *rest)
        shapes[f"{name}.lora_B.{adapter}.weight"] = (out, rank, *(1 for _ in rest[1:]))
    return shapes


def read_adapters(
    net: nn.Module,
    state: Mapping[str, Tensor],
    layers: Mapping[str, str],
    *,
    rank: int,
    what: str,
    also: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Adapter]:
    """Adapters by layer, out of a state dict that must hold exactly these (and the tensors `also` names).

    Raises:
        WrongWeights: names the first keys that differ.
    """
    expected = dict(also or {}) | adapter_shapes(net, layers, rank=rank)
    compare_keys(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what=what)
    return {
        name: Adapter(state[f"{name}.lora_A.{adapter}.weight"], state[f"{name}.lora_B.{adapter}.weight"])
        for name, adapter in layers.items()
    }


@torch.no_grad()
def merge_adapters(net: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Add every adapter to its layer's weight, in float32."""
    for name, adapter in adapters.items():
        layer = net.get_submodule(name)
        delta = adapter.b.float().flatten(1) @ adapter.a.float().flatten(1)
        merged = layer.weight.float() + adapter.scale * delta.view(layer.weight.shape).to(layer.weight.device)
        layer.weight.copy_(merged)


class Modulation:
    """The matrices of the pictures that are being worked on, which all adapted layers of one network read."""

    def __init__(self) -> None:
        self._matrices: Tensor | None = None
        self._owners: Tensor | None = None

    def use(self, matrices: Tensor, owners: Tensor) -> None:
        """From now on, input i of the network belongs to picture `owners[i]`.

        Args:
            matrices: (B, rows, r, r).
            owners: (n,), or (1,) where all inputs belong to one picture.
        """
        owners = owners.to(matrices.device)
        single = bool((owners == owners[0]).all())
        self._matrices, self._owners = matrices, owners[:1] if single else owners

    def row(self, row: int) -> Tensor:
        """(n, r, r), or (1, r, r) where all inputs belong to one picture."""
        if self._matrices is None:
            raise RuntimeError("Modulation.use was not called before the network")
        return self._matrices[self._owners, row]


class AdaptedLayer(nn.Module):
    """A layer with its adapter beside it, modulated or not.

    Where one matrix holds for the whole call, it is folded into the layer's weight for that call: work that depends on
    the weight's size only, not on the picture's, and one large convolution instead of three.
    """

    def __init__(
        self, base: nn.Module, adapter: Adapter, *, modulation: Modulation | None = None, row: int = 0, fold: bool = False
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = adapter.scale
        self.modulation, self.row, self.fold = modulation, row, fold
        self.lora_a = nn.Parameter(adapter.a.to(base.weight), requires_grad=False)
        self.lora_b = nn.Parameter(adapter.b.to(base.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) → (n, …), as the base layer does."""
        matrices = None if self.modulation is None else self.modulation.row(self.row)
        if self.fold and (matrices is None or len(matrices) == 1):
            return self._run(x, self._folded(matrices), self.base.bias)
        low = self._run(x, self.lora_a, None)
        if matrices is not None:
            matrices = matrices.to(low.dtype)
            if low.ndim == 4:  # Mᵀ per sample as a matrix product over flattened space
                mixed = matrices.transpose(1, 2) @ low.flatten(2)
                low = mixed.view(low.shape)
            else:
                low = low @ matrices
        up = F.conv2d(low, self.lora_b) if low.ndim == 4 else F.linear(low, self.lora_b)
        return torch.add(self.base(x), up, alpha=self.scale)

    def _folded(self, matrices: Tensor | None) -> Tensor:
        b = self.lora_b.flatten(1)
        if matrices is not None:
            b = b @ matrices[0].to(b.dtype).T
        weight = self.base.weight
        return torch.addmm(weight.flatten(1), b, self.lora_a.flatten(1), alpha=self.scale).view(weight.shape)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.base, nn.Conv2d):
            return F.conv2d(x, weight, bias, stride=self.base.stride, padding=self.base.padding)
        return F.linear(x, weight, bias)


def attach_adapters(
    net: nn.Module,
    adapters: Mapping[str, Adapter],
    *,
    modulation: Modulation | None = None,
    row_of: Callable[[str], int] = lambda _: 0,
    fold: bool = False,
) -> None:
    """Put an `AdaptedLayer` in the place of every adapted layer.

    Args:
        row_of: the row of the modulation that a layer of this name reads.
    """
    for name, adapter in adapters.items():
        parent, _, leaf = name.rpartition(".")
        layer = AdaptedLayer(net.get_submodule(name), adapter, modulation=modulation, row=row_of(name), fold=fold)
        setattr(net.get_submodule(parent), leaf, layer)


def random_adapters(shapes: Mapping[str, tuple[int, ...]], *, seed: int, std: float = 0.02) -> dict[str, Tensor]:
    """Seeded random tensors of these names and shapes, for models without files."""
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) * std for name, shape in shapes.items()}


def by_adapter(groups: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """(adapter, its layers) … → the adapter of every layer; repeated names count once."""
    return {layer: adapter for adapter, layers in groups for layer in layers}

"""Low-rank adapters in the files of OSEDiff and S3Diff: read strictly, and S3Diff's modulated kind.

An adapter adds (8 / rank) · B(A(x)) to a linear layer or convolution; 8 is peft's default alpha, which both codes
leave as it is. S3Diff puts a matrix between the two that depends on the picture: (8 / rank) · B(Mᵀ A(x)).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import compare_keys
from coz.models import lora

ALPHA = 8.0

UNET_TARGETS = (
    *("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2", "ff.net.0.proj"),
    *("conv", "conv1", "conv2", "conv_shortcut", "conv_out"),
)
"""Suffixes of the UNet's layers that both codes adapt. OSEDiff adds `conv_in`."""
VAE_TARGETS = r"^encoder\..*(conv1|conv2|conv_in|conv_shortcut|conv|conv_out|to_k|to_q|to_v|to_out\.0)$"
"""The autoencoder's layers that S3Diff adapts. OSEDiff adds `quant_conv`."""


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
    shapes: dict[str, tuple[int, ...]] = {}
    modules = dict(net.named_modules())
    for name, adapter in layers.items():
        if name not in modules:  # a file made for another network: a name that no file has makes the comparison fail
            shapes[f"{name} (a layer that the network lacks)"] = ()
            continue
        up, down = lora.pair_shapes(tuple(modules[name].weight.shape), rank)
        shapes |= {f"{name}.lora_A.{adapter}.weight": down, f"{name}.lora_B.{adapter}.weight": up}
    return shapes


def read_adapters(
    net: nn.Module,
    state: Mapping[str, Tensor],
    layers: Mapping[str, str],
    *,
    rank: int,
    what: str,
    also: Mapping[str, tuple[int, ...]] | None = None,
) -> lora.Adapter:
    """Adapters by layer, out of a state dict that must hold exactly these (and the tensors `also` names).

    Raises:
        WrongWeights: names the first keys that differ.
    """
    expected = dict(also or {}) | adapter_shapes(net, layers, rank=rank)
    compare_keys(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what=what)
    return {
        name: lora.LoraPair(up=state[f"{name}.lora_B.{adapter}.weight"], down=state[f"{name}.lora_A.{adapter}.weight"])
        for name, adapter in layers.items()
    }


class Modulation:
    """The matrices of the pictures that are being worked on, which all adapted layers of one network read."""

    def __init__(self) -> None:
        self._matrices: Tensor | None = None
        self._owners: Tensor | None = None

    def use(self, matrices: Tensor, owners: Tensor) -> None:
        """From now on, input i of the network belongs to picture `owners[i]`.

        Args:
            matrices: (B, rows, r, r).
            owners: (n,), on the CPU, so that nothing waits for the GPU.
        """
        single = bool((owners == owners[0]).all())
        self._matrices, self._owners = matrices, (owners[:1] if single else owners).to(matrices.device)

    def row(self, row: int) -> Tensor:
        """(n, r, r), or (1, r, r) where all inputs belong to one picture."""
        if self._matrices is None:
            raise RuntimeError("Modulation.use was not called before the network")
        return self._matrices[self._owners, row]


class ModulatedLayer(nn.Module):
    """A layer with its modulated adapter beside it.

    Args:
        row: of the modulation's matrices.
        fold: where one matrix holds for a whole call, fold the adapter into the weight for that call: work that depends
            on the weight's size only, not on the picture's, and one large convolution instead of three.
    """

    def __init__(self, base: nn.Module, pair: lora.LoraPair, *, modulation: Modulation, row: int, fold: bool) -> None:
        super().__init__()
        self.base = base
        self.factor = ALPHA / pair.rank
        self.modulation, self.row, self.fold = modulation, row, fold
        self.lora_down = nn.Parameter(pair.down.to(base.weight), requires_grad=False)
        self.lora_up = nn.Parameter(pair.up.to(base.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) → (n, …), as the base layer does."""
        matrices = self.modulation.row(self.row).to(self.lora_up.dtype)
        if self.fold and len(matrices) == 1:
            return self._run(x, self._folded(matrices[0]), self.base.bias)
        low = self._run(x, self.lora_down, None)
        if low.ndim == 4:  # Mᵀ of each sample, as a matrix product over flattened space
            low = (matrices.transpose(1, 2) @ low.flatten(2)).view(low.shape)
            update = F.conv2d(low, self.lora_up)
        else:
            update = F.linear(low @ matrices, self.lora_up)
        return torch.add(self.base(x), update, alpha=self.factor)

    def _folded(self, matrix: Tensor) -> Tensor:
        weight = self.base.weight
        up = self.lora_up.flatten(1) @ matrix.T
        return torch.addmm(weight.flatten(1), up, self.lora_down.flatten(1), alpha=self.factor).view(weight.shape)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.base, nn.Conv2d):
            return F.conv2d(x, weight, bias, stride=self.base.stride, padding=self.base.padding)
        return F.linear(x, weight, bias)


def attach_modulated(
    net: nn.Module, adapter: lora.Adapter, *, modulation: Modulation, row_of: Callable[[str], int], fold: bool
) -> None:
    """Put a `ModulatedLayer` in the place of every adapted layer.

    Args:
        row_of: the row of the modulation that a layer of this name reads.
    """
    for name, pair in adapter.items():
        base = net.get_submodule(name)
        layer = ModulatedLayer(base, pair, modulation=modulation, row=row_of(name), fold=fold)
        lora.set_submodule(net, name, layer)


def random_adapters(shapes: Mapping[str, tuple[int, ...]], *, seed: int, std: float = 0.02) -> dict[str, Tensor]:
    """Seeded random tensors of these names and shapes, for models without files."""
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) * std for name, shape in shapes.items()}


def by_adapter(groups: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """(adapter, its layers) … → the adapter of every layer; repeated names count once."""
    return {layer: adapter for adapter, layers in groups for layer in layers}

"""Several trainable adapters over one frozen network, one of them active at a time.

Generator, regulariser and teacher of variational score distillation share their base this way: one copy of the weights
instead of three, and the teacher is the base with no adapter active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.models.lora import Adapter, LoraPair, set_submodule


class AdapterSwitch:
    """Says which adapter of a network acts now; None for the plain network."""

    def __init__(self) -> None:
        self.active: str | None = None

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let the adapter `name` act inside the block."""
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before

    def checkpointing(self) -> Callable[..., object]:
        """A function for diffusers' `enable_gradient_checkpointing`: what is computed again in the backward pass is
        computed with the adapter that acted in the forward pass."""

        def run(module: nn.Module, *args: object) -> object:
            active = self.active

            def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
                return nullcontext(), self.use(active)

            return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)

        return run


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter of one layer: its start values, and its factor."""

    pair: LoraPair
    factor: float


class SwitchedLayer(nn.Module):
    """A frozen linear layer or convolution with adapters beside it.

    Adapters are float32 parameters whatever the base's format, so that small updates are not lost; they act in the
    format of the input.

    Args:
        half_output: round the output to float16, as the released code does for the modulations of SD3.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        switch: AdapterSwitch,
        adapters: Mapping[str, AdapterSpec],
        *,
        half_output: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.switch = switch
        self.half_output = half_output
        self.factors = {name: spec.factor for name, spec in adapters.items()}
        device = base.weight.device
        self.up = nn.ParameterDict({name: _parameter(spec.pair.up, device) for name, spec in adapters.items()})
        self.down = nn.ParameterDict({name: _parameter(spec.pair.down, device) for name, spec in adapters.items()})

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        active = self.switch.active
        if active in self.factors:
            up, down = self.up[active].to(y.dtype), self.down[active].to(y.dtype)
            x = x.to(y.dtype)
            if down.dim() == 4:
                low = F.conv2d(x, down, stride=self.base.stride, padding=self.base.padding)
                y = y + self.factors[active] * F.conv2d(low, up)
            else:
                y = y + self.factors[active] * F.linear(F.linear(x, down), up)
        return y.half() if self.half_output else y


class SwitchedBase(nn.Module):
    """A layer of which one adapter owns a trainable copy (OSEDiff trains the UNet's first convolution whole)."""

    def __init__(self, base: nn.Conv2d, switch: AdapterSwitch, owner: str, *, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.base, self.switch, self.owner = base, switch, owner
        self.own_weight = _parameter(weight, base.weight.device)
        self.own_bias = _parameter(bias, base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.switch.active != self.owner:
            return self.base(x)
        weight, bias = self.own_weight.to(x.dtype), self.own_bias.to(x.dtype)
        return F.conv2d(x, weight, bias, stride=self.base.stride, padding=self.base.padding)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def stride(self) -> tuple[int, ...]:
        return self.base.stride

    @property
    def padding(self) -> tuple[int, ...]:
        return self.base.padding


def attach(
    net: nn.Module,
    switch: AdapterSwitch,
    adapters: Mapping[str, tuple[Adapter, float]],
    *,
    half_output: bool = False,
) -> None:
    """Put adapters beside the layers of a network.

    Args:
        adapters: by the adapter's name, its matrices by layer, and its factor.
    """
    layers = dict.fromkeys(layer for adapter, _ in adapters.values() for layer in adapter)
    for layer in layers:
        specs = {name: AdapterSpec(adapter[layer], factor) for name, (adapter, factor) in adapters.items() if layer in adapter}
        set_submodule(net, layer, SwitchedLayer(net.get_submodule(layer), switch, specs, half_output=half_output))


def detach(net: nn.Module, name: str) -> Adapter:
    """Copies of the matrices of the adapter `name`, by layer, float32 on the CPU."""
    return {
        layer: LoraPair(up=_copy(module.up[name]), down=_copy(module.down[name]))
        for layer, module in net.named_modules()
        if isinstance(module, SwitchedLayer) and name in module.factors
    }


def adapter_parameters(net: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter `name`, by a name that tells layer and matrix."""
    found: dict[str, nn.Parameter] = {}
    for layer, module in net.named_modules():
        if isinstance(module, SwitchedLayer) and name in module.factors:
            found |= {f"{layer}.lora_up": module.up[name], f"{layer}.lora_down": module.down[name]}
        if isinstance(module, SwitchedBase) and name == module.owner:
            layer = layer.removesuffix(".base")
            found |= {f"{layer}.weight": module.own_weight, f"{layer}.bias": module.own_bias}
    return found


def fresh_adapter(layers: Mapping[str, tuple[int, ...]], *, rank: int, seed: int) -> Adapter:
    """An adapter that changes nothing yet: `down` is normal with deviation 1 / rank, `up` is zero.

    Args:
        layers: the shape of each layer's weight.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraPair(
            up=torch.zeros(n_out, rank, *(1 for _ in inner[1:])), down=torch.randn(rank, *inner, generator=generator) / rank
        )
        for name, (n_out, *inner) in layers.items()
    }


def _parameter(x: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(x.detach().to(device, torch.float32, copy=True))


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)

"""Adapters over one base: switched, recomputed as they acted, and each trained alone."""

from __future__ import annotations

import torch
from torch import nn

from coz.models.lora import LoraPair
from coz.models.switched_lora import AdapterSwitch, adapter_parameters, attach, detach, fresh_adapter


def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    net.requires_grad_(False)
    switch = AdapterSwitch()
    layers = {name: tuple(net.get_submodule(name).weight.shape) for name in ("0", "2")}

    def adapter(seed):
        return {n: LoraPair(torch.randn_like(p.up), p.down) for n, p in fresh_adapter(layers, rank=2, seed=seed).items()}

    plain = [parameter.clone() for parameter in net.parameters()]
    attach(net, switch, {"a": (adapter(1), 0.5), "b": (adapter(2), 1.0)})
    return net, switch, plain


def test_only_the_active_adapter_acts_and_learns():
    net, switch, _ = make()
    x = torch.rand(1, 3, 5, 5)
    outputs = {}
    for name in (None, "a", "b"):
        with switch.use(name):
            outputs[name] = net(x)
    assert not torch.equal(outputs["a"], outputs["b"])
    assert not torch.equal(outputs["a"], outputs[None])
    outputs["a"].square().sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(net, "a").values())
    assert all(p.grad is None for p in adapter_parameters(net, "b").values())
    merged = detach(net, "a")
    weight = net[2].base.weight + 0.5 * (merged["2"].up.flatten(1) @ merged["2"].down.flatten(1)).view_as(net[2].base.weight)
    with switch.use("a"):
        hidden = net[1](net[0](x))
        torch.testing.assert_close(net[2](hidden), torch.nn.functional.conv2d(hidden, weight, net[2].base.bias))


def test_a_fresh_adapter_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 4))
    switch, x = AdapterSwitch(), torch.rand(2, 4)
    before = net(x)
    attach(net, switch, {"a": (fresh_adapter({"0": (4, 4)}, rank=2, seed=0), 1.0)})
    with switch.use("a"):
        assert torch.equal(net(x), before)


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass():
    x = torch.rand(1, 3, 5, 5, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        net, switch, _ = make()
        run = switch.checkpointing() if checkpointed else lambda module, *args: module(*args)
        with switch.use("a"):
            y = run(net, x)
        with switch.use("b"):  # the backward pass happens while another adapter is active
            y.square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter_parameters(net, "a").values()])
        assert all(p.grad is None for p in adapter_parameters(net, "b").values())
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)

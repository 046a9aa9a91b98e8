"""What models that share a GPU need together, and that the plans keep what their names promise."""

from __future__ import annotations

from types import SimpleNamespace

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from coz import cli
from coz.backbones.osediff_sd3 import OSEDiffSD3
from coz.models.device_memory import Demand, NotEnoughMemory, describe_needs, needs_by_device
from coz.models.sd3 import SD3OneStep

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
BACKBONE, PROMPTER = Demand(GPU, 4.0, 14.0), Demand(GPU, 8.0, 9.5)


def test_one_works_while_the_others_rest():
    assert needs_by_device([BACKBONE, PROMPTER]) == {GPU: 4 + 8 + 10}
    assert needs_by_device([BACKBONE, PROMPTER], together=True) == {GPU: 14 + 9.5}


def test_an_offloaded_prompter_counts_only_while_it_is_asked():
    assert needs_by_device([BACKBONE, Demand(GPU, 0.0, 9.5)]) == {GPU: 14.0}
    assert needs_by_device([Demand(GPU, 4.0, 5.0), Demand(GPU, 0.0, 9.5)]) == {GPU: 13.5}


def test_devices_are_counted_apart_and_cuda_is_the_first_gpu():
    second = Demand(torch.device("cuda:1"), 8.0, 9.5)
    assert needs_by_device([Demand(torch.device("cuda"), 4.0, 14.0), second]) == {GPU: 14.0, torch.device("cuda:1"): 9.5}


def test_a_gpu_too_small_is_refused_with_the_smaller_plans(monkeypatch):
    parts = {"backbone": BACKBONE, "prompter": PROMPTER}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24e9))
    (line,) = describe_needs(parts, plan="24gb")
    assert line.startswith("memory=24gb needs about 22.0 GB on cuda:0")
    assert line.endswith("the GPU has 24")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16e9))
    with pytest.raises(NotEnoughMemory, match=r"22\.0 GB.*the GPU has 16 GB; use memory=12gb"):
        describe_needs(parts, plan="24gb", remedy="use memory=12gb")


@pytest.fixture
def resolve():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield lambda *overrides: cli.resolve_overrides(list(overrides), config_name="evaluate", sweep=False)


@pytest.mark.parametrize(("plan", "gb"), [("full", 32), ("24gb", 24), ("16gb", 16), ("12gb", 12)])
def test_the_papers_pair_fits_what_a_plan_is_named_after(resolve, plan, gb):
    """Full-size architectures, by their tensors' shapes; a GB is kept for the driver and fragments."""
    random = ("backbone.weights=random", "prompter.weights=random", "device=cpu", "precision=bf16")
    config = resolve("method=coz_vlm", f"memory={plan}", *random)
    demands = [cli.build(config[part]).demand(batch=4) for part in ("backbone", "prompter")]
    (need,) = needs_by_device(demands, together=bool(config.engine.overlap)).values()
    assert 0.5 * gb < need < gb - 1


def test_two_gpus_part_the_pair(resolve):
    config = resolve("method=coz_vlm", "memory=two_gpus", "device=cuda:0")
    assert (config.backbone.device, config.prompter.device) == ("cuda:0", "cuda:1")


def test_what_is_typed_wins_over_the_plan(resolve):
    config = resolve("method=coz_vlm", "memory=12gb", "prompter.offload=none", "backbone.memory=full")
    assert (config.prompter.offload, config.backbone.memory, config.backbone.offload) == ("none", "full", "cpu")


def test_an_offloaded_image_model_visits_for_each_call(monkeypatch):
    stays = OSEDiffSD3(weights="random", size="tiny", device="cpu", precision="fp32")
    visits = OSEDiffSD3(weights="random", size="tiny", device="cpu", precision="fp32", offload="cpu")
    moves: list[str] = []
    monkeypatch.setattr(SD3OneStep, "to", lambda self, device: moves.append(str(device)))
    view = torch.rand(1, 3, 8, 8)
    assert torch.equal(stays(view, size=32), visits(view, size=32))  # a CPU has one memory: nothing moves
    assert moves == []
    visits._device, visits._visits = torch.device("cpu"), True
    assert torch.equal(stays(view, size=32), visits(view, size=32))
    assert moves == ["cpu", "cpu"]

"""The losses of SD3's training, and the gradients of its adapters, equal the released code's with recorded draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coz.models.lora_files import read_released_list
from coz.models.sd3 import adaln_layers
from coz.training.losses import VSD, LossWeights
from coz.training.one_step import Draws, OneStepTrainee
from coz.training.sd3 import SD3Nets

VARIANTS = {"official": "", "clean32": "clean32."}
SETTINGS = VSD(guidance=1, floor=0)  # vsd=released


class Recorded:
    """A parity set's training step, in one of its two variants."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.folder, self.variant = folder, variant
        self.config = json.loads((folder / "config.json").read_text())
        self.values = json.loads((folder / "losses.json").read_text())
        self.tensors = load_file(folder / "losses.safetensors")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors.get(VARIANTS[self.variant] + name, self.tensors.get(name))

    def trainee(self, **weights: float) -> OneStepTrainee:
        nets = SD3Nets(
            weights=str(self.folder / "pipeline"),
            lora=str(self.folder / "sr_lora.pkl"),
            vae_encoder=str(self.folder / "vae_encoder.pt"),
            device="cpu",
            precision="fp32",
            released=True,
            half_modulations=self.variant == "official",
        )
        trainee = OneStepTrainee(nets=nets, loss=LossWeights(**{"l2": 0, "lpips": 0, "vsd": 0, **weights}), vsd=SETTINGS)
        trainee.load()
        regulariser = read_released_list(self.folder / "reg_lora.pkl", adaln_layers_of(nets), rank=None)
        for name, parameter in nets.trained("regulariser").items():
            layer, _, part = name.removeprefix("transformer.").rpartition(".lora_")
            parameter.data.copy_(getattr(regulariser[layer], part))
        return trainee

    @property
    def draws(self) -> Draws:
        batch = len(self["gen.x_src"])
        return Draws(
            posterior=self["gen.noise"],
            vsd_noise=self["vsd.noise"],
            regulariser_noise=self["diff.noise"],
            vsd_uniform=self["vsd.u"].expand(batch),
            regulariser_uniform=self["diff.u"].expand(batch),
        )

    def run(self, trainee: OneStepTrainee):
        if self.variant == "official":
            embeds = (self["gen.prompt_embeds"].float(), self["gen.pooled_embeds"].float())
        else:  # recorded in half only
            embeds = trainee.nets.embed(self.config["train_prompts"])
        return trainee.losses(self["gen.x_src"], self["gen.x_tgt"], embeds=embeds, negative=(), draws=self.draws)

    def grad_norms(self, loss: str) -> dict[str, float]:
        start = f"{VARIANTS[self.variant]}{loss}.grad."
        found = {name.removeprefix(start): norm for name, norm in self.values["grad_norm"].items() if name.startswith(start)}
        found.pop("z0", None)
        assert found
        return found

    @property
    def tolerances(self) -> tuple[float, float]:
        stated = self.config["tolerances"]
        return stated["losses_rel"][self.variant], stated["grads_rel_norm"][self.variant]


def adaln_layers_of(nets: SD3Nets) -> dict[str, tuple[int, ...]]:
    return adaln_layers(nets._source.skeletons[0])


@pytest.fixture(scope="module", params=VARIANTS)
def recorded(parity, request) -> Recorded:
    folder = parity("osediff_sd3")
    if not (folder / "losses.json").is_file():
        pytest.skip(f"{folder} records no losses; give --parity-dir")
    return Recorded(folder, request.param)


def assert_gradients(trainee: OneStepTrainee, group: str, recorded: Recorded, loss: str) -> None:
    parameters = trainee.trained()[group] if group == "generator" else trainee.nets.trained(group)
    norms = recorded.grad_norms(loss)
    seen = 0
    for name, parameter in parameters.items():
        layer, _, part = name.rpartition(".lora_")
        if layer.startswith("vae."):
            key = f"{layer}.lora_{'A' if part == 'down' else 'B'}.default_encoder.weight"
        else:
            net = "transformer_reg" if group == "regulariser" else "transformer"
            key = f"{net}.{layer.removeprefix('transformer.')}.lora_{part}.weight"
        assert parameter.grad is not None, name
        assert parameter.grad.norm().item() == pytest.approx(norms[key], rel=recorded.tolerances[1]), name
        seen += 1
    assert seen == len(norms)


def test_pixel_loss(recorded):
    """The release has no training script; its harness took the plain squared error."""
    trainee = recorded.trainee(l2=1)
    outcome = recorded.run(trainee)
    expected = recorded.values["losses"][f"{VARIANTS[recorded.variant]}probe_mse.loss"]
    assert outcome.parts["l2"].item() == pytest.approx(expected, rel=recorded.tolerances[0])
    outcome.total.backward()
    assert_gradients(trainee, "generator", recorded, "probe_mse")


def test_distillation_and_regulariser(recorded):
    trainee = recorded.trainee(vsd=1)
    outcome = recorded.run(trainee)
    losses = recorded.values["losses"]
    for part, name in (("vsd", "vsd"), ("regulariser", "diff")):
        expected = losses[f"{VARIANTS[recorded.variant]}{name}.loss"]
        assert outcome.parts[part].item() == pytest.approx(expected, rel=recorded.tolerances[0]), part
    outcome.total.backward()
    assert_gradients(trainee, "generator", recorded, "vsd")
    assert_gradients(trainee, "regulariser", recorded, "diff")


def test_released_schedule(recorded):
    trainee = recorded.trainee(vsd=1)
    torch.testing.assert_close(trainee.nets.process.times, recorded["scheduler.timesteps_1000"], rtol=1e-5, atol=1e-3)
    assert trainee.nets.process.distillation_times(recorded["vsd.u"]).item() == pytest.approx(
        recorded["vsd.t"].item(), rel=1e-5
    )

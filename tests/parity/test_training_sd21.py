"""One training step of OSEDiff on SD2.1 equals the authors': losses, gradients, clipping and the update."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coz.training.losses import VSD, LossWeights
from coz.training.one_step import Draws, OneStepTrainee
from coz.training.sd21 import SD21Nets


@dataclass
class Step:
    """A parity set's training step, opened."""

    folder: Path
    config: dict
    scalars: dict
    arrays: dict[str, torch.Tensor]

    @property
    def tolerance(self) -> dict:
        return self.config["tolerance"]

    @property
    def draws(self) -> Draws:
        a = self.arrays
        return Draws(
            posterior=a["draw0_vae_sample_noise"],
            vsd_noise=a["draw3_dm_noise"],
            regulariser_noise=a["draw4_diff_noise"],
            vsd_uniform=(a["draw2_dm_timesteps"].double() - 20 + 0.5) / 960,
            regulariser_uniform=(a["draw5_diff_timesteps"].double() + 0.5) / 1000,
        )

    def pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = np.load(self.folder / "inputs.npz")
        lq, hr = (torch.from_numpy(inputs[name]).permute(0, 3, 1, 2).contiguous() for name in ("x_src_u8", "x_tgt_u8"))
        return lq.float() / 255 * 2 - 1, hr.float() / 255 * 2 - 1

    def trainee(self, *, l2: float, vsd: float) -> OneStepTrainee:
        nets = SD21Nets(
            weights=str(self.folder / "model"),
            checkpoint=str(self.folder / "osediff.pkl"),
            rank=self.config["dims"]["lora_rank"],
            device="cpu",
            precision="fp32",
            regulariser_layers="others",
            clamp_image=True,
        )
        settings = VSD(guidance=self.config["training"]["cfg_vsd"], floor=0)
        trainee = OneStepTrainee(nets=nets, loss=LossWeights(l2=l2, lpips=0, vsd=vsd), vsd=settings)
        trainee.load()
        lora = load_file(self.folder / "reg_unet_lora.safetensors")
        for name, parameter in nets.trained("regulariser").items():
            parameter.data.copy_(lora[peft_name(name.removeprefix("unet."), "default_others")])
        return trainee

    def run(self, trainee: OneStepTrainee):
        lq, hr = self.pictures()
        nets, training = trainee.nets, self.config["training"]
        embeds = nets.embed(training["prompts"])
        negative = nets.embed([training["neg_prompt"]] * len(training["prompts"]))
        return trainee.losses(lq, hr, embeds=embeds, negative=negative, draws=self.draws)


def peft_name(name: str, adapter: str) -> str:
    layer, _, part = name.rpartition(".lora_")
    return f"{layer}.lora_{'A' if part == 'down' else 'B'}.{adapter}.weight"


def official_name(name: str, step: Step) -> str:
    """How the authors' modules name a parameter of ours."""
    if name.startswith("vae."):
        return peft_name(name, "default_encoder")
    if name in ("unet.conv_in.weight", "unet.conv_in.bias"):
        return name.replace("conv_in.", "conv_in.base_layer.")
    for adapter in ("default_encoder", "default_decoder", "default_others"):
        candidate = peft_name(name, adapter)
        if candidate in step.scalars["gen_grad_norms"]:
            return candidate
    raise KeyError(name)


@pytest.fixture(scope="module")
def step(parity) -> Step:
    folder = parity("osediff_sd21")
    if not (folder / "training.json").is_file():
        pytest.skip(f"{folder} records no training; give --parity-dir")
    arrays = {name: torch.from_numpy(array) for name, array in np.load(folder / "training.npz").items()}
    config = json.loads((folder / "config.json").read_text())
    return Step(folder, config, json.loads((folder / "training.json").read_text()), arrays)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize(("part", "l2", "vsd"), [("l2", 1, 0), ("kl", 0, 1)])
def test_gradients_of_each_loss(step, part, l2, vsd):
    trainee = step.trainee(l2=l2, vsd=vsd)
    outcome = step.run(trainee)
    outcome.total.backward()
    losses, limits = step.scalars["losses"], step.tolerance["grad_norms"]
    name = "vsd" if part == "kl" else part
    assert outcome.parts[name].item() == pytest.approx(losses[part], **{"rel": step.tolerance["losses"]["rtol"]})
    for name, parameter in trainee.nets.trained("generator").items():
        norm = step.scalars["gen_grad_norms"][official_name(name, step)][part]
        found = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert found == pytest.approx(norm or 0.0, rel=limits["rtol"], abs=limits["atol"]), (part, name)


def test_whole_step(step):
    """Both losses, clipping and AdamW, for the generator and for the regulariser."""
    trainee = step.trainee(l2=1, vsd=1)
    outcome = step.run(trainee)
    losses = step.scalars["losses"]
    assert outcome.parts["regulariser"].item() == pytest.approx(losses["diff"], rel=step.tolerance["losses"]["rtol"])
    assert outcome.total.item() == pytest.approx(
        losses["total_without_lpips"] + losses["diff"], rel=step.tolerance["losses"]["rtol"]
    )
    outcome.total.backward()
    values, arrays, seen = step.config["training"]["optimizer"], step.arrays, 0
    groups = {"generator": "gen", "regulariser": "reg"}
    for group, short in groups.items():
        parameters = trainee.nets.trained(group)
        names = {
            name: official_name(name, step) if group == "generator" else peft_name(name[5:], "default_others")
            for name in parameters
        }
        for name, parameter in parameters.items():
            expected = arrays.get(f"gradtotal/{names[name]}" if group == "generator" else f"reg_grad/{names[name]}")
            if expected is not None:
                close(parameter.grad, expected, step.tolerance["grad_arrays"])
                seen += 1
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), values["max_grad_norm"])
        expected = step.scalars[f"total_grad_norm_{short}_before_clip"]
        assert norm.item() == pytest.approx(expected, rel=step.tolerance["grad_norms"]["rtol"])
        settings = {key: values[key] for key in ("lr", "betas", "weight_decay", "eps")}
        torch.optim.AdamW(parameters.values(), **settings).step()
        for name, parameter in parameters.items():
            expected = arrays.get(f"after_step/{names[name]}" if group == "generator" else f"reg_after_step/{names[name]}")
            if expected is not None:
                torch.testing.assert_close(parameter.data, expected, rtol=0, atol=step.tolerance["after_step"]["atol"])
    assert seen >= 10


def test_lpips_of_the_recorded_prediction(step):
    from coz.checkpoint import WeightsNotFound
    from coz.perceptual import find_trunk, load_lpips

    try:
        find_trunk("vgg")
    except WeightsNotFound as error:
        pytest.skip(str(error))
    recorded = step.scalars["lpips_vgg"]
    _, hr = step.pictures()
    prediction = step.arrays["x_tgt_pred"].clone().requires_grad_()
    value = load_lpips("vgg")(prediction, hr).mean()
    value.backward()
    assert value.item() == pytest.approx(recorded["mean"], rel=1e-5)
    assert prediction.grad.norm().item() == pytest.approx(recorded["grad_norm_wrt_x_tgt_pred"], rel=1e-3)

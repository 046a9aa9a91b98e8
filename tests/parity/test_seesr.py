"""SeeSR equals the authors' code, stage by stage, on a tiny random model."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.backbones.seesr import UPSCALE, SeeSR
from coz.image import from_pil, to_uint8
from coz.models import latent_tiles, sd2
from coz.models.image_attention import build_controlnet_with_images, build_unet_with_images


@pytest.fixture(scope="module")
def folder(parity):
    found = parity("seesr")
    if not (found / "config.json").is_file():  # tests/golden holds the full-size keys only
        pytest.skip("the parity set seesr is not on this machine; give --parity-dir")
    return found


@pytest.fixture(scope="module")
def full_size_keys(released_keys):
    return released_keys("seesr")


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def recorded(folder, config):
    return {name: load_file(folder / "expected" / f"{name}.safetensors") for name in config["runs"]}


@pytest.fixture(scope="module")
def backbone(folder, config):
    """A loaded model whose tagger gives the recorded embeddings of the run that `set_run` chose."""

    class RecordedTagger:
        run = ""

        def __call__(self, image):
            return [config["tags"]] * len(image), embeddings(folder, self.run)

    model = SeeSR(
        weights=str(folder / "sd2_base"),
        checkpoint=str(folder / "seesr"),
        tagger=RecordedTagger(),
        added_prompt=config["added_prompt"],
        negative_prompt=config["neg_prompt"],
        start=config["start_point"],
        device="cpu",
        precision="fp32",
    )
    model.load()
    return model


def embeddings(folder, run):
    return load_file(folder / "inputs" / run / "ram.safetensors")["ram_embeds"]


def set_run(model, name, run):
    model.tagger.run = name
    model.steps, model.process_px = run["num_inference_steps"], run["process_size"]
    model.guidance_scale, model.conditioning_scale = run["guidance_scale"], run["conditioning_scale"]
    model.latent_tile, model.latent_overlap = run["latent_tiled_size"], run["latent_tiled_overlap"]


def picture(folder, run):
    return from_pil(Image.open(folder / "inputs" / run / "lr.png"))


def levels(path):
    return to_uint8(from_pil(Image.open(path)))[0].astype(int)


def close(actual, expected, atol):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= atol


def same_picture(image, path):
    """Within one level, and 99.5 % of the values equal."""
    expected, actual = levels(path), to_uint8(image, rounding="truncate")[0].astype(int)
    assert actual.shape == expected.shape
    assert abs(actual - expected).max() <= 1
    assert (actual == expected).mean() >= 0.995


def test_prompts_and_start_equal_the_release(folder, config, recorded, backbone):
    atol = config["tolerances_abs"]
    assert config["upscale"] == UPSCALE
    assert config["start_steps"] == sd2.LAST_TIMESTEP
    assert backbone.full_prompt(config["tags"], config["user_prompt"]) == config["pos_prompt"]
    for name, run in config["runs"].items():
        set_run(backbone, name, run)
        expected = recorded[name]
        for kind in ("pos", "neg"):
            assert torch.equal(backbone.encode_prompts.ids([config[f"{kind}_prompt"]]), expected[f"{kind}_ids"])
            close(backbone.encode_prompts([config[f"{kind}_prompt"]]), expected[f"{kind}_embeds"], atol["embeds"])
        source = backbone.prepare(picture(folder, name))
        assert (to_uint8(source)[0] == levels(folder / "expected" / f"{name}_source.png")).all()
        moments = backbone.codec.moments(source * 2 - 1)
        close(moments, expected["moments"][:1], atol["moments"])
        close(backbone.codec.latent(moments, expected["vae_noise"][:1]), expected["lr_latent"], atol["lr_latent"])
        start = backbone.begin(moments, expected["vae_noise"][:1], expected["init_noise"])
        close(start, expected["start_latent"], atol["start_latent"])
        assert backbone.timesteps() == expected["timesteps"].tolist()


def remember(seen, key):
    """A hook that keeps a module's first output."""

    def hook(module, inputs, output):
        seen.setdefault(key, output[0] if isinstance(output, tuple) else output)

    return hook


def test_networks_equal_the_release(folder, config, recorded, backbone):
    atol = config["tolerances_abs"]
    for name, run in config["runs"].items():
        set_run(backbone, name, run)
        expected = recorded[name]
        seen, hooks = {}, []
        for key in (key for key in expected if key.startswith("stage.")):
            _, net, layer = key.split(".", 2)
            module = (backbone._unet if net == "unet" else backbone._control).get_submodule(layer)
            if layer == "controlnet_cond_embedding":
                module = backbone._conditions.net
            hooks.append(module.register_forward_hook(remember(seen, key), prepend=True))
        source = backbone.prepare(picture(folder, name))
        backbone.condition(source)
        tiles = {"tile": run["latent_tiled_size"], "overlap": run["latent_tiled_overlap"]}
        boxes = latent_tiles.plan_tiles(*expected["start_latent"].shape[-2:], **tiles)
        text = torch.cat([expected["neg_embeds"], expected["pos_embeds"]])
        embeds = embeddings(folder, name).expand(2, -1, -1)
        calls = sum(key.startswith("cn_in.") for key in expected)
        assert calls == len(boxes) * run["num_inference_steps"]
        for call in range(calls):
            condition = backbone._conditions.crops(torch.tensor([0]), [boxes[call % len(boxes)]]).expand(2, -1, -1, -1)
            inputs = (expected[f"cn_in.{call}"], int(expected[f"t.{call}"]), text, embeds, condition)
            close(backbone.noise(*inputs), expected[f"unet_out.{call}"], atol["unet_out"])
            if f"cn_mid.{call}" in expected:
                down, middle = backbone.control(*inputs)
                close(middle, expected[f"cn_mid.{call}"], atol["cn_mid"])
                for number, residual in enumerate(down):
                    if f"cn_down.{call}.{number:02d}" in expected:
                        close(residual, expected[f"cn_down.{call}.{number:02d}"], atol["cn_down"])
        for hook in hooks:
            hook.remove()
        for key, output in seen.items():
            close(output.expand_as(expected[key]), expected[key], atol["stage"])
        assert len(seen) == sum(key.startswith("stage.") for key in expected)


def test_steps_equal_the_release(folder, config, recorded, backbone):
    atol = config["tolerances_abs"]
    for name, run in config["runs"].items():
        set_run(backbone, name, run)
        expected = recorded[name]
        backbone.condition(backbone.prepare(picture(folder, name)))
        latent = expected["start_latent"]
        for index, timestep in enumerate(backbone.timesteps()):
            inputs = (timestep, expected["pos_embeds"], expected["neg_embeds"], embeddings(folder, name))
            close(backbone.predict(expected[f"latent_in.{index}"], *inputs), expected[f"cfg_pred.{index}"], atol["cfg_pred"])
            latent = backbone.step(latent, backbone.predict(latent, *inputs), timestep, expected[f"step_noise.{index}"])
            close(latent, expected[f"latent_out.{index}"], atol["latent_out"])
        close(backbone.codec.decode(latent), expected["decoded"], atol["decoded"])


def test_pictures_equal_the_release(folder, config, recorded, backbone):
    for name, run in config["runs"].items():
        set_run(backbone, name, run)
        lr = picture(folder, name)
        source = backbone.prepare(lr)
        size = (lr.shape[-2] * UPSCALE, lr.shape[-1] * UPSCALE)
        for label, fix in (("nofix", "none"), ("wavelet", "wavelet"), ("adain", "adain")):
            backbone.color_fix = fix
            image = backbone.finish(recorded[name]["decoded"], source, size)
            same_picture(image, folder / "expected" / f"{name}_{label}.png")
        backbone.color_fix = "none"
        image = backbone.finish(recorded[name]["decoded"], source, source.shape[-2:])
        same_picture(image, folder / "expected" / f"{name}_decoded.png")


def test_whole_program_equals_the_release(folder, config, recorded, backbone, monkeypatch):
    name, run = next(iter(config["runs"].items()))
    set_run(backbone, name, run)
    expected, lr = recorded[name], picture(folder, name)
    steps = range(run["num_inference_steps"])
    draws = iter([expected["vae_noise"][:1], expected["init_noise"], *(expected[f"step_noise.{i}"] for i in steps)])
    monkeypatch.setattr(sd2, "draw_noise", lambda *_: next(draws))
    backbone.color_fix = "adain"
    image = backbone(lr, size=(lr.shape[-2] * UPSCALE, lr.shape[-1] * UPSCALE), prompts=[config["user_prompt"]])
    same_picture(image, folder / "expected" / f"{name}_adain.png")


def test_full_size_names_and_shapes(full_size_keys):
    recorded = full_size_keys
    own = sd2.architecture("full")
    with torch.device("meta"):
        nets = {
            "seesr/unet": build_unet_with_images(recorded["seesr/unet_config"]),
            "seesr/controlnet": build_controlnet_with_images(recorded["seesr/controlnet_config"]),
            "sd2_base/vae": sd2.build_vae(own["vae"]),
            "sd2_base/text_encoder": sd2.build_text_encoder(own["text_encoder"]),
        }
        random = {
            "seesr/unet": build_unet_with_images(own["unet"]),
            "seesr/controlnet": build_controlnet_with_images(own["controlnet"]),
        }
    for name, net in [*nets.items(), *random.items()]:
        expected = {key.removeprefix("text_model."): tuple(shape) for key, shape in recorded[name].items()}
        expected = {key: shape for key, shape in expected.items() if not key.endswith("position_ids")}
        assert {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()} == expected, name

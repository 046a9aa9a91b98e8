"""OSEDiff on Stable Diffusion 2.1 equals the authors' code, stage by stage, on a tiny random model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from coz.backbones import osediff_sd21
from coz.backbones.osediff_sd21 import OSEDiffSD21
from coz.models import latent_tiles, sd2, vae_tiles


@pytest.fixture(scope="module")
def folder(parity):
    found = parity("osediff_sd21")
    if not (found / "config.json").is_file():  # tests/golden holds the full-size keys only
        pytest.skip("the parity set osediff_sd21 is not on this machine; give --parity-dir")
    return found


@pytest.fixture(scope="module")
def full_size_keys(released_keys):
    return released_keys("osediff_sd21")


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def recorded(folder):
    return {name: torch.from_numpy(array) for name, array in np.load(folder / "inference.npz").items()}


@pytest.fixture(scope="module")
def backbone(folder):
    """`backbone(case, merge)`: one loaded model per way of holding the adapters, set to the tiles of a case."""
    models = {}

    def get(case, *, merge=True):
        if merge not in models:
            models[merge] = OSEDiffSD21(
                weights=str(folder / "model"),
                checkpoint=folder / "osediff.pkl",
                device="cpu",
                precision="fp32",
                merge_lora=merge,
            )
            models[merge].load()
        model = models[merge]
        model.latent_tile, model.latent_overlap = case["latent_tiled_size"], case["latent_tiled_overlap"]
        model.codec.encoder_tile_px, model.codec.decoder_tile = case["vae_encoder_tiled_size"], case["vae_decoder_tiled_size"]
        return model

    return get


def picture(folder, case):
    pixels = torch.from_numpy(np.load(folder / "inputs.npz")[case["lq"]])
    return pixels.permute(2, 0, 1)[None].float().contiguous() / 255 * 2 - 1


def close(actual, expected, tolerance):
    """Within a tolerance that is relative to the spread of the expected values."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.std()


def test_every_stage_equals_the_release(folder, config, recorded, backbone):
    tolerance = config["tolerance"]
    for name, case in config["cases"].items():
        model = backbone(case)
        expected = {key.partition("/")[2]: value for key, value in recorded.items() if key.startswith(f"{name}/")}
        assert torch.equal(model.encode_prompts.ids([case["prompt"]]), expected["input_ids"]), name
        embeds = model.encode_prompts([case["prompt"]])
        close(embeds, expected["prompt_embeds"], tolerance["prompt_embeds"])
        moments = model.codec.moments(picture(folder, case))
        close(moments, expected["moments"], tolerance["moments"])
        latent = model.codec.latent(moments, expected["vae_sample_noise"])
        close(latent, expected["latent"], tolerance["latent"])
        prediction = model.predict(expected["latent"], embeds)
        close(prediction, expected["model_pred"], tolerance["model_pred"])
        clean = model.denoise(latent, model.predict(latent, embeds))
        close(clean, expected["x_denoised"], tolerance["x_denoised"])
        image = model.codec.decode(clean)
        clamped = image.clamp(-1, 1)[0]
        crop = clamped[:, 16:80, 24:104]
        assert (crop - expected["image_crop_f32"]).abs().max() <= tolerance["image_f32"]["atol"], name
        if "image_u16" in expected:
            codes = ((clamped + 1) / 2 * 65535).round().permute(1, 2, 0)
            assert (codes - expected["image_u16"].float()).abs().max() <= tolerance["image_u16"]["codes"], name


def test_tiles_see_what_the_release_saw(config, recorded, backbone):
    for name, case in config["cases"].items():
        if f"{name}/unet_tile_outputs" not in recorded:
            continue
        model = backbone(case)
        latent, embeds = recorded[f"{name}/latent"], recorded[f"{name}/prompt_embeds"]
        tiles = {"tile": case["latent_tiled_size"], "overlap": case["latent_tiled_overlap"]}
        boxes = latent_tiles.plan_tiles(*latent.shape[-2:], **tiles)
        assert len(boxes) == case["n_unet_calls"]
        for box, expected in zip(boxes, recorded[f"{name}/unet_tile_outputs"], strict=True):
            output = model.predict(box.crop(latent), embeds)
            close(output[0], expected, config["tolerance"]["unet_tile_outputs"])


def test_merged_equals_unmerged(config, recorded, backbone, folder):
    name, case = next((n, c) for n, c in config["cases"].items() if c["n_unet_calls"] == 1)
    latent, embeds = recorded[f"{name}/latent"], recorded[f"{name}/prompt_embeds"]
    both = {merge: backbone(case, merge=merge) for merge in (True, False)}
    predictions = {merge: model.predict(latent, embeds) for merge, model in both.items()}
    moments = {merge: model.codec.moments(picture(folder, case)) for merge, model in both.items()}
    for values in (predictions, moments):
        assert (values[True] - values[False]).abs().max() <= 1e-5 * max(1.0, float(values[False].abs().max()))
    merged = {key.partition("/")[2]: v for key, v in recorded.items() if key.startswith("untiled_merged_lora/")}
    close(predictions[True], merged["model_pred"], config["tolerance"]["model_pred"])
    close(moments[True], merged["moments"], config["tolerance"]["moments"])


def test_gaussian_weights(folder, config):
    for name, expected in np.load(folder / "gaussian_weights.npz").items():
        side = int(name.removeprefix("tile").partition("_")[0])
        rtol = config["tolerance"]["gaussian_weights"]["rtol"]
        np.testing.assert_allclose(latent_tiles.tile_weights(side).numpy(), expected, rtol=rtol, atol=0)


def test_latent_tiling_plans(folder):
    for plan in json.loads((folder / "tiling_plans.json").read_text())["latent"]:
        tiles = {"tile": plan["tile"], "overlap": plan["overlap"]}
        boxes = latent_tiles.plan_tiles(*plan["latent_hw"], **tiles)
        assert [[b.top, b.bottom, b.left, b.right] for b in boxes] == plan["boxes_y0y1x0x1"]

        def number_of_call(crops, _, where, boxes=boxes):
            return torch.stack([torch.full_like(crops[0], boxes.index(box) + 1) for box in where])

        blend = latent_tiles.predict_in_tiles(torch.zeros(1, 1, *plan["latent_hw"]), number_of_call, batch_size=3, **tiles)
        assert float(blend.double().sum()) == pytest.approx(plan["blend_of_call_index_checksum"], rel=1e-6)


def test_autoencoder_tiling_plans(folder):
    for plan in json.loads((folder / "tiling_plans.json").read_text())["vae"]:
        height, width = plan["hw"]
        settings = {"tile": plan["tile"], "margin": plan["pad"]}
        own = vae_tiles.DECODER_MARGIN if plan["is_decoder"] else vae_tiles.ENCODER_MARGIN_PX
        assert own == plan["pad"]
        assert vae_tiles.is_tiled(height, width, **settings) == plan["tiled"]
        if not plan["tiled"]:
            continue
        boxes = [(y, x) for y in vae_tiles.plan_spans(height, **settings) for x in vae_tiles.plan_spans(width, **settings)]
        up, down = (8, 1) if plan["is_decoder"] else (1, 8)
        reads = [[x.read_start, x.read_end, y.read_start, y.read_end] for y, x in boxes]
        pastes = [[v * up // down for v in (x.paste_start, x.paste_end, y.paste_start, y.paste_end)] for y, x in boxes]
        assert reads == plan["in_bboxes_x0x1y0y1"]
        assert pastes == plan["out_bboxes_x0x1y0y1"]


def test_full_size_names_and_shapes(full_size_keys):
    recorded = full_size_keys
    with torch.device("meta"):
        unet = sd2.build_unet(sd2.architecture("full")["unet"] | recorded["unet_config"])
        vae = sd2.build_vae(sd2.architecture("full")["vae"] | recorded["vae_config"])
    own = osediff_sd21.adapter_layers(unet, vae)
    for group in ("encoder", "decoder", "others"):
        assert set(own[f"unet_lora_{group}_modules"]) == set(recorded[f"unet_lora_{group}_modules"])
    in_file = [name for name, _ in recorded["vae_lora_encoder_modules_run_length"]]
    assert set(own["vae_lora_encoder_modules"]) == set(in_file)
    ranks = {"rank_unet": recorded["rank_unet"], "rank_vae": recorded["rank_vae"]}
    shapes = osediff_sd21.checkpoint_shapes(unet, vae, own, **ranks)
    for own_shapes, part in zip(shapes, ("unet", "vae"), strict=True):
        assert own_shapes == {name: tuple(shape) for name, shape in recorded[f"state_dict_{part}"]}

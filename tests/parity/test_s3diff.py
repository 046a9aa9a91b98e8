"""S3Diff equals the authors' code, stage by stage, on a tiny random model."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.backbones import s3diff
from coz.image import from_pil, to_uint8
from coz.models import latent_tiles, sd2, sd2_lora
from coz.models.degradation_modulation import DegradationNet, Modulator


@pytest.fixture(scope="module")
def folder(parity):
    found = parity("s3diff")
    if not (found / "config.json").is_file():  # tests/golden holds the full-size keys only
        pytest.skip("the parity set s3diff is not on this machine; give --parity-dir")
    return found


@pytest.fixture(scope="module")
def full_size_keys(released_keys):
    return released_keys("s3diff")


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def recorded(folder, config):
    return {name: load_file(folder / "expected" / f"{name}.safetensors") for name in config["runs"]}


@pytest.fixture(scope="module")
def backbone(folder, config):
    model = s3diff.S3Diff(
        weights=str(folder / "sd_turbo"),
        checkpoint=folder / "s3diff.pkl",
        degradation_checkpoint=folder / "de_net.pth",
        positive_prompt=config["pos_prompt"],
        negative_prompt=config["neg_prompt"],
        guidance_scale=config["guidance_scale"],
        device="cpu",
        precision="fp32",
        fold_lora=False,
    )
    model.load()
    return model


def fold(model, value):
    for net in (model._unet, model.codec.vae):
        for layer in net.modules():
            if isinstance(layer, sd2_lora.ModulatedLayer):
                layer.fold = value


def set_tiles(model, run):
    model.latent_tile, model.latent_overlap = run["latent_tiled_size"], run["latent_tiled_overlap"]
    model.codec.encoder_tile_px, model.codec.decoder_tile = run["vae_encoder_tiled_size"], run["vae_decoder_tiled_size"]


def picture(folder, run):
    return from_pil(Image.open(folder / "inputs" / run / "lr.png"))


def tolerances(config, run):
    """The set's tolerances, with those that it gives for one run."""
    given = config["tolerances_abs"]
    return {key: value for key, value in given.items() if not isinstance(value, dict)} | given.get(run, {})


def remember(seen, key):
    """A hook that keeps a module's first output."""

    def hook(module, inputs, output):
        seen.setdefault(key, output)

    return hook


def close(actual, expected, atol):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= atol


def same_picture(image, path):
    """Within one level after truncation, and 99.5 % of the values equal."""
    expected = to_uint8(from_pil(Image.open(path)))[0].astype(int)
    levels = to_uint8(image, rounding="truncate")[0].astype(int)
    assert levels.shape == expected.shape
    assert abs(levels - expected).max() <= 1
    assert (levels == expected).mean() >= 0.995


@pytest.mark.parametrize("folded", [False, True])
def test_every_stage_equals_the_release(folder, config, recorded, backbone, folded):
    fold(backbone, folded)
    for name, run in config["runs"].items():
        if folded and name != "vae_tiled":
            continue
        set_tiles(backbone, run)
        expected, atol, lr = recorded[name], tolerances(config, name), picture(folder, name)
        upsampled = s3diff.upsample(lr)
        x = s3diff.pad_reflect((upsampled * 2 - 1).clamp(-1, 1), multiple=s3diff.PAD_MULTIPLE_PX)
        assert config["pad_multiple"] == s3diff.PAD_MULTIPLE_PX
        assert config["upscale"] == s3diff.UPSCALE
        scores = backbone.score(lr)
        matrices = backbone.modulate(scores)
        embeds = {kind: backbone.encode_prompts([config[f"{kind}_prompt"]]) for kind in ("pos", "neg")}
        moments = backbone.moments(x, matrices["vae"])
        latent = backbone.codec.latent(moments, expected["vae_noise"])
        prediction = backbone.predict(latent, embeds["pos"], embeds["neg"], matrices["unet"])
        clean = backbone.denoise(latent, prediction)
        results = {
            "upsampled": (upsampled, atol["upsampled"]),
            "c_t": (x, atol["c_t"]),
            "deg_score": (scores, atol["deg_score"]),
            **{f"{net}_de_mod": (matrices[net], atol["de_mod"]) for net in matrices},
            **{f"{kind}_embeds": (value, atol["embeds"]) for kind, value in embeds.items()},
            "moments": (moments, atol["moments"]),
            "lq_latent": (latent, atol["lq_latent"]),
            "model_pred": (prediction, atol["model_pred"]),
            "x_denoised": (clean, atol["x_denoised"]),
            "decoded": (backbone.codec.decode(clean), atol["decoded"]),
        }
        for key, (actual, bound) in results.items():
            if key in expected:
                close(actual, expected[key], bound)
        for kind in ("pos", "neg"):
            if f"{kind}_ids" in expected:
                assert torch.equal(backbone.encode_prompts.ids([config[f"{kind}_prompt"]]), expected[f"{kind}_ids"])
    fold(backbone, False)


def test_layers_and_tiles_equal_the_release(config, recorded, backbone):
    for name, run in config["runs"].items():
        expected = recorded[name]
        if "unet_in.0" not in expected:
            continue
        set_tiles(backbone, run)
        matrices = backbone.modulate(expected["deg_score"])
        seen = {}
        hooks = []
        for key in (key for key in expected if key.startswith("stage.")):
            _, net, layer = key.split(".", 2)
            module = (backbone._unet if net == "unet" else backbone.codec.vae).get_submodule(layer)
            hooks.append(module.register_forward_hook(remember(seen, key)))
        backbone.moments(expected["c_t"], matrices["vae"])
        boxes = latent_tiles.plan_tiles(
            *expected["lq_latent"].shape[-2:], tile=run["latent_tiled_size"], overlap=run["latent_tiled_overlap"]
        )
        assert len(boxes) == sum(key.startswith("unet_in.") for key in expected)
        weight = backbone.guidance_scale
        for number, box in enumerate(boxes):
            crop = box.crop(expected["lq_latent"])
            close(crop, expected[f"unet_in.{number}"], config["tolerances_abs"]["lq_latent"])
            for kind, scale in (("pos", 1.0), ("neg", 0.0)):
                backbone.guidance_scale = scale
                output = backbone.predict(crop, expected["pos_embeds"], expected["neg_embeds"], matrices["unet"])
                close(output, expected[f"unet_{kind}.{number}"], config["tolerances_abs"]["unet"])
        backbone.guidance_scale = weight
        for hook in hooks:
            hook.remove()
        for key, output in seen.items():
            close(output, expected[key], config["tolerances_abs"]["stage"])


def test_pictures_equal_the_release(folder, config, recorded, backbone):
    for path in sorted((folder / "expected").glob("*.png")):
        name, _, fix = path.stem.rpartition("_")
        backbone.color_fix = {"nofix": "none"}.get(fix, fix)
        image = backbone.finish(recorded[name]["decoded"], s3diff.upsample(picture(folder, name)))
        same_picture(image, path)


def test_whole_program_equals_the_release(folder, config, recorded, backbone):
    name = next(iter(config["runs"]))
    set_tiles(backbone, config["runs"][name])
    texts = backbone.positive_texts([""])
    for fix, label in (("none", "nofix"), ("adain", "adain"), ("wavelet", "wavelet")):
        path = folder / "expected" / f"{name}_{label}.png"
        if path.is_file():
            backbone.color_fix = fix
            image = backbone.enlarge(picture(folder, name), texts=texts, seeds=None, noise=recorded[name]["vae_noise"])
            same_picture(image, path)


def test_full_size_names_and_shapes(full_size_keys):
    recorded = full_size_keys
    pickled = recorded["s3diff.pkl"]
    with torch.device("meta"):
        unet = sd2.build_unet(sd2.architecture("full")["unet"])
        vae = sd2.build_vae(sd2.architecture("full")["vae"])
        text = sd2.build_text_encoder(sd2.architecture("full")["text_encoder"])
        degradation = DegradationNet.of_width(64, 128)
        ranks = {"unet": pickled["rank_unet"]["value"], "vae": pickled["rank_vae"]["value"]}
        modulators = {net: Modulator(rows=rows, rank=ranks[net], frequencies=64) for net, rows in (("unet", 10), ("vae", 6))}
    nets = {"unet": unet, "vae": vae}
    assert shapes(unet) == listed(recorded["sd_turbo/unet"])
    assert shapes(vae) == listed(recorded["sd_turbo/vae"])
    assert shapes(text) == {
        name.removeprefix("text_model."): shape
        for name, shape in listed(recorded["sd_turbo/text_encoder"]).items()
        if not name.endswith("position_ids")
    }
    assert shapes(degradation) == listed(recorded["de_net.pth"])
    targets = {key: pickled[key]["value"] for key in ("unet_lora_target_modules", "vae_lora_target_modules")}
    for net, layers in s3diff.checkpoint_layers(unet, vae, targets).items():
        own = sd2_lora.adapter_shapes(nets[net], layers, rank=ranks[net])
        if net == "unet":
            own |= {f"conv_in.{name}": tuple(tensor.shape) for name, tensor in unet.conv_in.state_dict().items()}
        assert own == listed(pickled[f"state_dict_{net}"])
        for part in ("de_mlp", "block_mlp", "fuse_mlp"):
            assert shapes(getattr(modulators[net], part)) == listed(pickled[f"state_dict_{net}_{part}"])
        assert shapes(modulators[net].block) == listed(pickled["state_embeddings"][f"state_dict_{net}_block"])
    assert tuple(pickled["w"]) == tuple(modulators["unet"].frequencies.shape)


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def listed(record):
    return {name: tuple(shape) for name, shape in record.items()}

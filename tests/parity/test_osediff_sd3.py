"""OSEDiff on SD3 equals the released code: by stage, in both number formats, and along its chains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.backbones.osediff_sd3 import OSEDiffSD3
from coz.image import CENTER, from_pil, resize, to_uint8, view_at
from coz.models.diffusers_folder import meta_model
from coz.models.lora import AdaptedLayer, LoraPair, adapt, pair_shapes
from coz.models.sd3 import adaln_layers, encoder_layers
from coz.models.sd3_sizes import SIZES

VARIANTS = {"official": ("", "released"), "clean32": ("clean32.", "fp32")}
EXACT = {"official": "official_with_half", "clean32": "clean32"}
EMBEDS = {"official": "official_half", "clean32": "clean32"}


@dataclass
class Case:
    """A parity set, opened."""

    folder: Path
    config: dict
    io: dict[str, torch.Tensor]

    @property
    def tolerances(self) -> dict:
        return self.config["tolerances"]

    @property
    def sizes(self) -> list[str]:
        return [f"{height}x{width}" for height, width in self.config["stage_sizes_hw"]]

    def backbone(self, **settings: object) -> OSEDiffSD3:
        defaults = {
            "weights": str(self.folder / "pipeline"),
            "lora": str(self.folder / "sr_lora.pkl"),
            "vae_encoder": str(self.folder / "vae_encoder.pt"),
            "lora_rank": self.config["lora_rank"],
            "device": "cpu",
            "precision": "fp32",
        }
        return OSEDiffSD3(**{**defaults, **settings})

    def recorded(self, prefix: str, name: str) -> torch.Tensor | None:
        return self.io.get(f"{prefix}{name}")


@pytest.fixture(scope="module")
def case(parity) -> Case:
    folder = parity("osediff_sd3")
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds key lists only; give --parity-dir")
    return Case(folder, json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors"))


@pytest.fixture(scope="module")
def backbones(case) -> dict[str, OSEDiffSD3]:
    return {variant: case.backbone(precision=precision) for variant, (_, precision) in VARIANTS.items()}


def _off(found: torch.Tensor, expected: torch.Tensor | None) -> float:
    if expected is None:
        return 0.0
    assert found.shape == expected.shape
    return (found.float() - expected.float()).abs().max().item()


def _one_step(backbone: OSEDiffSD3):
    return backbone._image_model()


# ---------------------------------------------------------------------------------------------------------------------
# by stage


def test_token_ids_equal(case, backbones):
    backbones["clean32"].load()
    for name, text in case.config["prompts"].items():
        ids = backbones["clean32"]._text.token_ids([text])
        for i, rows in enumerate(ids.values(), start=1):
            assert torch.equal(rows, case.io[f"prompt.{name}.ids{i}"]), (name, i)


def test_timestep_equals(case, backbones):
    assert _one_step(backbones["official"]).timestep == case.io["timestep"].item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_embeddings(case, backbones, variant):
    prefix, _ = VARIANTS[variant]
    names, texts = zip(*case.config["prompts"].items(), strict=True)
    embeds, pooled = backbones[variant].encode_prompts(texts)
    for i, name in enumerate(names):
        expected = case.io[f"{prefix}prompt.{name}.prompt_embeds"], case.io[f"{prefix}prompt.{name}.pooled_embeds"]
        assert _off(embeds[i : i + 1], expected[0]) <= case.tolerances["prompt_embeds_abs"][EMBEDS[variant]]
        assert _off(pooled[i : i + 1], expected[1]) <= case.tolerances["pooled_embeds_abs"][EMBEDS[variant]]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_moments_and_latent(case, backbones, variant):
    prefix, _ = VARIANTS[variant]
    atol = case.tolerances["vae_mean_logvar_latent_abs"]
    for size in case.sizes:
        x = case.io[f"{size}.x_src"]
        mean, logvar = _one_step(backbones[variant]).moments(x)
        latent = backbones[variant].encode_image(x, case.io[f"{size}.noise"])
        for name, found in (("vae_mean", mean), ("vae_logvar", logvar), ("latent", latent)):
            expected = case.recorded(prefix, f"{size}.{name}")
            assert _off(found, case.io[f"{size}.{name}"] if expected is None else expected) <= atol, (size, name)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_velocity_and_image_from_recorded_embeddings(case, backbones, variant):
    prefix, _ = VARIANTS[variant]
    atol = case.tolerances["v_denoised_image_abs_from_recorded_embeds"][EXACT[variant]]
    model = _one_step(backbones[variant])
    seen = 0
    for size in case.sizes:
        latent = model.encode_image(case.io[f"{size}.x_src"], case.io[f"{size}.noise"])
        for name in case.config["prompts"]:
            embeds = case.io[f"{prefix}prompt.{name}.prompt_embeds"], case.io[f"{prefix}prompt.{name}.pooled_embeds"]
            velocity = model.velocity(latent, *embeds)
            stages = {"v": velocity, "denoised": latent - velocity, "image": model.decode(latent - velocity)}
            for stage, found in stages.items():
                expected = case.recorded(prefix, f"{size}.{name}.{stage}")
                seen += expected is not None
                assert _off(found, expected) <= atol, (size, name, stage)
    assert seen > 2 * len(case.sizes)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_inner_values(case, backbones, variant):
    """Modulations and the tokens after every block, of the one run that is recorded."""
    prefix, _ = VARIANTS[variant]
    names = [key for key in case.io if key.startswith(f"{prefix}deep.")]
    atol = case.tolerances["v_denoised_image_abs_from_recorded_embeds"][EXACT[variant]]
    size, prompt = names[0].removeprefix(prefix).split(".")[1:3]
    start = f"{prefix}deep.{size}.{prompt}."
    model = _one_step(backbones[variant])
    found: dict[str, torch.Tensor] = {}
    transformer = model.transformer

    def note(name: str, pick=lambda output: output):
        return lambda _module, _inputs, output: found.update({name: pick(output)})

    hooks = [transformer.time_text_embed.register_forward_hook(note("temb"))]
    hooks += [transformer.pos_embed.register_forward_hook(note("patch_tokens"))]
    for i, block in enumerate(transformer.transformer_blocks):
        hooks += [block.register_forward_hook(note(f"block{i}.hidden", lambda output: output[1]))]
        hooks += [block.register_forward_hook(note(f"block{i}.context", lambda output: output[0]))]
    for layer in (key.removeprefix(f"{start}adaln.") for key in names if ".adaln." in key):
        hooks += [transformer.get_submodule(layer).register_forward_hook(note(f"adaln.{layer}"))]
    embeds = case.io[f"{prefix}prompt.{prompt}.prompt_embeds"], case.io[f"{prefix}prompt.{prompt}.pooled_embeds"]
    model.velocity(model.encode_image(case.io[f"{size}.x_src"], case.io[f"{size}.noise"]), *embeds)
    for hook in hooks:
        hook.remove()
    compared = [key for key in names if key.removeprefix(start) in found]
    assert len(compared) >= len(names) - 1  # context_tokens has no module of its own
    for key in compared:
        # a modulation that lies between two halves may fall to either side
        spacing = 2**-10 * case.io[key].float().abs().max().item() if case.io[key].dtype == torch.float16 else 0
        assert _off(found[key.removeprefix(start)], case.io[key]) <= atol + spacing, key


@pytest.mark.parametrize("variant", VARIANTS)
def test_end_to_end_with_own_embeddings(case, backbones, variant):
    prefix, _ = VARIANTS[variant]
    texts = case.config["prompts"]
    for size in case.sizes:
        embeds, pooled = backbones[variant].encode_prompts(list(texts.values()))
        x, noise = (case.io[f"{size}.{part}"].expand(len(texts), -1, -1, -1) for part in ("x_src", "noise"))
        images = backbones[variant].restore(x, prompt_embeds=embeds, pooled_embeds=pooled, noise=noise)
        for i, name in enumerate(texts):
            expected = case.recorded(prefix, f"{size}.{name}.image")
            assert _off(images[i : i + 1], expected) <= case.tolerances["end_to_end_image_abs"][variant]
            if variant == "clean32":
                official = case.io[f"{size}.{name}.image"]
                limits = case.tolerances["end_to_end_float32_against_official"]
                assert _off(images[i : i + 1], official) <= limits["image_abs"]
                assert (images[i : i + 1] - official).square().mean().sqrt() <= limits["image_rms"]


# ---------------------------------------------------------------------------------------------------------------------
# chains


def _levels(path: Path) -> torch.Tensor:
    return from_pil(Image.open(path))


def _difference(found: torch.Tensor, path: Path) -> np.ndarray:
    """Grey levels between a result, quantized as the release does, and a recorded PNG."""
    return np.abs(to_uint8(found, rounding="truncate")[0].astype(int) - np.asarray(Image.open(path).convert("RGB")).astype(int))


def _input_path(folder: Path, step: int) -> Path:
    paths = [folder / f"{step}_input.png", folder / f"0_input_for_{step}.png"]
    return next(path for path in paths if path.is_file())


def _chain(case: Case) -> dict:
    file = case.folder / "chain" / "chain.json"
    if not file.is_file():
        pytest.skip("this copy of the set has no recorded chains; give --parity-dir")
    return json.loads(file.read_text())


def _diffusion_runs(case: Case) -> tuple[dict, dict[str, list[str]]]:
    chain = _chain(case)
    return chain, {name: run["prompts_used"] for name, run in chain["runs"].items() if run["prompts_used"]}


@pytest.fixture(scope="module")
def recorded_embeds(case):
    chain = _chain(case)
    tensors = load_file(case.folder / "chain" / "prompt_embeds.safetensors")
    return {
        text: {"prompt_embeds": tensors[f"{i}.prompt_embeds"], "pooled_embeds": tensors[f"{i}.pooled_embeds"]}
        for text, i in chain["prompt_embeds_index"].items()
    }


@pytest.mark.parametrize("precision", ["released", "fp32"])
def test_every_chain_step_from_its_recorded_input(case, backbones, recorded_embeds, precision):
    backbone = backbones["official" if precision == "released" else "clean32"]
    noise = load_file(case.folder / "chain" / "noise.safetensors")
    limits = case.tolerances["chain_png_levels"]
    for run, prompts in _diffusion_runs(case)[1].items():
        folder = case.folder / "chain" / run
        for step, prompt in enumerate(prompts, start=1):
            x = _levels(_input_path(folder, step)) * 2 - 1
            image = backbone.restore(x, noise=noise[f"step{step}"], **recorded_embeds[prompt]) * 0.5 + 0.5
            off = _difference(image, folder / f"{step}.png")
            assert off.max() <= limits["per_step_from_recorded_input"], (run, step)
            # fp32 leaves the release's half roundings out, which moves values anywhere: counted by value, not by pixel
            share = (off > 0).mean() if precision == "fp32" else (off > 0).any(-1).mean()
            assert share <= limits["per_step_pixels_off_max_fraction"], (run, step)


def _chain_input(state: torch.Tensor, first: torch.Tensor, step: int, *, recursive: bool, factor: float) -> torch.Tensor:
    """The centre of the last state, or of the first one where the run is not recursive, enlarged to the state's size."""
    side = state.shape[-1]
    view = view_at(side, factor if recursive else factor**step, CENTER)
    return resize(view.crop(state if recursive else first), side)


@pytest.mark.parametrize(("precision", "own"), [("released", False), ("released", True), ("fp32", False)])
def test_free_running_chain(case, backbones, recorded_embeds, precision, own):
    """From the start state on, every step from our own last state.

    A step whose input still equals the recorded one is held to one level. A CPU other than the recording one rounds
    differently in the last bit, which flips a few truncated levels in ten thousand, and random weights amplify these from
    step to step: from the first flip on, the set's limits for a chain that has started to deviate apply.
    """
    backbone = backbones["official" if precision == "released" else "clean32"]
    noise = load_file(case.folder / "chain" / "noise.safetensors")
    limits = case.tolerances["chain_png_levels"]
    chain, runs = _diffusion_runs(case)
    for run, prompts in runs.items():
        folder = case.folder / "chain" / run
        first = state = _levels(folder / "0.png")
        for step, prompt in enumerate(prompts, start=1):
            x = _chain_input(state, first, step, recursive=run.startswith("recursive"), factor=chain["upscale"])
            same = torch.equal(x, _levels(_input_path(folder, step)))
            assert same or step > 1
            embeds = recorded_embeds[prompt]
            if own:
                embeds = dict(zip(("prompt_embeds", "pooled_embeds"), backbone.encode_prompts([prompt]), strict=True))
            strict = limits["free_running_with_recorded_embeds"] if precision == "released" and not own else 0
            limit = strict if strict and same else limits["free_running_with_own_embeds"][step - 1]
            image = backbone.restore(x * 2 - 1, noise=noise[f"step{step}"], **embeds) * 0.5 + 0.5
            assert _difference(image, folder / f"{step}.png").max() <= limit, (run, step)
            state = from_pil(Image.fromarray(to_uint8(image, rounding="truncate")[0]))


# ---------------------------------------------------------------------------------------------------------------------
# full size


def test_full_size_names_and_shapes(released_keys):
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    keys = released_keys("osediff_sd3")
    for part in ("transformer", "vae"):
        ours = getattr(SIZES["full"], part)
        assert all(ours[key] == value for key, value in keys[f"{part}_config"].items() if key in ours)
    rank = keys["lora_rank"]
    transformer = meta_model(SD3Transformer2DModel, keys["transformer_config"])
    vae = meta_model(AutoencoderKL, keys["vae_config"])
    counts = keys["base_counts"]
    assert sum(p.numel() for p in transformer.parameters()) == counts["transformer_params"]
    assert list(transformer.pos_embed.pos_embed.shape) == counts["transformer_pos_embed_buffer"]
    assert sum(p.numel() for p in vae.parameters()) == counts["vae_params"]
    assert sum(p.numel() for p in vae.encoder.parameters()) == counts["vae_encoder_params"]

    for model, layers in ((transformer, adaln_layers(transformer)), (vae.encoder, encoder_layers(vae))):
        pairs = {
            name: LoraPair(*(torch.empty(s, device="meta") for s in pair_shapes(shape, rank))) for name, shape in layers.items()
        }
        adapt(model, pairs, factor=1.0)
    found = [
        [f"{name}.{part}.weight", list(getattr(layer, part).weight.shape)]
        for name, layer in transformer.named_modules()
        if isinstance(layer, AdaptedLayer)
        for part in ("lora_up", "lora_down")
    ]
    assert found == keys["sr_lora_pkl"]["entries"]
    names = {".base.": ".base_layer.", ".lora_down.": ".lora_A.default_encoder.", ".lora_up.": ".lora_B.default_encoder."}
    state = {}
    for key, tensor in vae.encoder.state_dict().items():
        for ours, peft in names.items():
            key = key.replace(ours, peft)
        state[key] = list(tensor.shape)
    assert state == dict(map(tuple, keys["vae_encoder_pt"]["entries"]))

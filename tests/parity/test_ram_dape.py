"""RAM and DAPE equal the official code, by stage: pixels, Swin, embeddings, head, tags, names and shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.checkpoint import WrongWeights, compare_keys, load_tensors
from coz.image import from_pil
from coz.models import ram_network as ram
from coz.models.ram import Tagger
from coz.prompters.dape import Dape

VARIANTS = ("ram", "dape", "dape_tied")


@pytest.fixture(scope="module")
def golden(parity):
    folder = parity("ram_dape")
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds only the list of names and shapes; give --parity-dir")
    expected = load_file(folder / "expected.safetensors")
    return folder, json.loads((folder / "config.json").read_text()), expected


@pytest.fixture(scope="module")
def states(golden):
    folder, config, _ = golden
    plain = ram.read_official(load_tensors(folder / config["checkpoint"]["ram"]), what="ram")
    folded = {name: ram.fold_lora(plain, load_tensors(folder / f"{name}.pth"), what=name) for name in VARIANTS[1:]}
    return {"ram": plain} | folded


@pytest.fixture(scope="module")
def models(golden, states):
    model = golden[1]["model"]
    made = {}
    for name, state in states.items():
        sizes = ram.sizes_from(
            {key: tuple(tensor.shape) for key, tensor in state.items()},
            image_px=model["image_size"],
            head_heads=model["head"]["num_attention_heads"],
            window=model["window_size"],
            what=name,
        )
        assert list(sizes.heads) == model["num_heads"]
        made[name] = ram.load_official(state, sizes, what=name)
    return made


@pytest.fixture(scope="module")
def pixels(golden):
    folder, config, _ = golden
    views = [from_pil(Image.open(folder / image["file"])) for image in config["images"]]
    return views, torch.cat([ram.preprocess(view, config["model"]["image_size"]) for view in views])


def _close(found, expected, atol):
    np.testing.assert_allclose(found.detach().numpy(), expected.numpy(), rtol=0, atol=atol)


def test_preprocessing_equals_the_release(golden, pixels):
    folder, config, _ = golden
    expected, atol = load_file(folder / "preprocessed.safetensors"), config["tolerances"]["preprocessed_atol"]
    views, prepared = pixels
    side = config["model"]["image_size"]
    middle = slice(side // 2 - 32, side // 2 + 32)
    for k, view in enumerate(views):
        _close(prepared[k], expected[f"pixel_values.{k}"], atol)
        aliased = ram.preprocess(view, side, antialias=False)[0, :, middle, middle]
        _close(prepared[k, :, middle, middle], expected[f"center64.tensor_antialias.{k}"], atol)
        _close(aliased, expected[f"center64.tensor_no_antialias.{k}"], atol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_equal_the_release(golden, models, pixels, variant):
    _, config, expected = golden
    atol, model = config["tolerances"], models[variant]
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    stages = len(model.visual.layers)
    watched = {"patch_embed": model.visual.patch_embed, f"swin_stage{stages - 1}": model.visual.layers[-1]}
    watched |= {f"swin_stage{i - 1}": model.visual.layers[i].downsample for i in range(1, stages)}
    watched |= {f"head_layer{i}": layer for i, layer in enumerate(model.head)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    seen["swin_out"] = model.image_tokens(pixels[1])
    seen["image_embeds"] = model.image_proj(seen["swin_out"])
    seen["logits"] = model.logits(seen["image_embeds"])
    seen["sigmoid"] = seen["logits"].sigmoid()
    for hook in hooks:
        hook.remove()

    compared = 0
    for name, found in seen.items():
        recorded = expected.get(f"{variant}.{name}")
        if recorded is None:
            continue
        kind = name if name in ("image_embeds", "sigmoid") else "logits" if name.startswith(("head", "logits")) else "swin"
        found = found[: len(recorded)].flatten(1, 2) if found.ndim == 4 else found[: len(recorded)]
        _close(found, recorded, atol[f"{kind}_atol"])
        compared += 1
    assert compared >= 4
    if variant == "ram":
        _close(model.label_queries(), expected["label_queries"], atol["logits_atol"])


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_folded_weights_equal_the_release(golden, states, variant):
    _, config, expected = golden
    head = "tagging_head.encoder.layer.0.crossattention.self"
    official = {
        "stage0_block0.qkv_weight": "visual_encoder.layers.0.blocks.0.attn.qkv.weight",
        "head0.query_weight": f"{head}.query.weight",
        "head0.key_weight": f"{head}.key.weight",
    }
    compared = 0
    for short, name in official.items():
        if f"{variant}.merged.{short}" in expected:
            _close(states[variant][name], expected[f"{variant}.merged.{short}"], config["tolerances"]["swin_atol"])
            compared += 1
    assert compared


def test_bias_tables_are_resized_as_in_the_release(golden):
    folder, config, _ = golden
    tables = load_file(folder / "relpos_interp.safetensors")
    for name, table in tables.items():
        if name.startswith("src_"):
            recorded = tables[name.replace("src_", "dst_")]
            resized = ram.resize_bias_table(table, int(name.rpartition("w")[2]))
            _close(resized, recorded, config["tolerances"]["relpos_interp_atol"])


def _settings(folder, config, variant):
    return {
        "weights": str(folder / config["checkpoint"]["ram"]),
        "lora": None if variant == "ram" else str(folder / f"{variant}.pth"),
        "tag_list": str(folder / "tags.txt"),
        "thresholds": str(folder / "thresholds.txt"),
        "image_px": config["model"]["image_size"],
        "window": config["model"]["window_size"],
        "head_heads": config["model"]["head"]["num_attention_heads"],
        "device": "cpu",
        "precision": "fp32",
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_tags_equal_the_release(golden, pixels, variant):
    folder, config, expected = golden
    recorded = json.loads((folder / "expected_text.json").read_text(encoding="utf-8"))[variant]["tags"]
    tagger = Tagger(**_settings(folder, config, variant))
    for k, view in enumerate(pixels[0]):
        tags, embeds = tagger(view)
        assert tags == [recorded[k]]
        if f"{variant}.image_embeds" in expected:
            _close(embeds[0], expected[f"{variant}.image_embeds"][k], config["tolerances"]["image_embeds_atol"])
    assert Dape(**_settings(folder, config, variant))(pixels[0][0], None) == recorded[:1]


def _on_meta(keys):
    return {name: torch.empty(shape, device="meta") for name, shape, *_ in keys}


@pytest.mark.parametrize("alias", ["tagging_head", "vision_multi"])
def test_full_size_has_the_released_names_and_shapes(alias, released_keys):
    lists = released_keys("ram_dape")
    released = lists["ram"]["keys"]
    stored = {name.replace("tagging_head", alias): tensor for name, tensor in _on_meta(released).items()}
    state = ram.read_official({"model": stored}, what="the list")
    assert set(state) == {name for name, *_, needed in released if needed}
    sizes = ram.sizes_from({n: tuple(t.shape) for n, t in state.items()}, image_px=384, head_heads=4, what="the list")
    assert sizes == ram.FULL

    adapted = ram.fold_lora(state, _on_meta(lists["dape"]["keys"]), what="DAPE")
    assert {name: t.shape for name, t in adapted.items()} == {name: t.shape for name, t in state.items()}
    with torch.device("meta"):
        model = ram.Ram(ram.FULL)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_keys(expected, {name: tuple(t.shape) for name, t in ram.to_our_names(state).items()}, what="the list")


def test_files_that_do_not_fit_are_refused(golden, states):
    state, what = dict(states["ram"]), "the file"
    model = golden[1]["model"]
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    sizes = ram.sizes_from(shapes, image_px=model["image_size"], head_heads=4, what=what)
    del state["tagging_head.encoder.layer.0.crossattention.self.key.bias"], state["fc.bias"]
    with pytest.raises(WrongWeights, match=r"2 missing \(head\.0\.attention\.in_proj_bias, fc\.bias\)"):
        ram.load_official(state, sizes, what=what)
    with pytest.raises(WrongWeights, match=r"1 unexpected \(visual\.extra\)"):
        ram.load_official(states["ram"] | {"visual_encoder.extra": torch.zeros(1)}, sizes, what=what)
    pair = {"visual_encoder.nothing.lora_A": torch.zeros(8, 4), "visual_encoder.nothing.lora_B": torch.zeros(4, 8)}
    with pytest.raises(WrongWeights, match=r"visual_encoder\.nothing, which the RAM checkpoint lacks"):
        ram.fold_lora(states["ram"], pair, what=what)
    with pytest.raises(WrongWeights, match="no DAPE checkpoint"):
        ram.fold_lora(states["ram"], states["ram"], what=what)

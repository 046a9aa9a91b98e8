"""InternVL2.5 from its original layout equals the official classes: tiles, text, vision, projector, logits, answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.checkpoint import WrongWeights
from coz.models import internvl_chat as chat
from coz.models import internvl_weights as weights


@pytest.fixture(scope="module")
def golden(parity):
    folder = parity("internvl25")
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds only the list of names and shapes; give --parity-dir")
    return folder, json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    folder, config, _ = golden
    return weights.load_native(folder / "original", image_token_id=config["token_ids"]["ctx"])


def _close(found, expected, atol, where=None):
    found, expected = found.detach().numpy(), expected.numpy()
    if where is not None:
        found, expected = found[where], expected[where]
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@torch.inference_mode()
def test_vision_and_projector_equal_the_release(golden, model):
    _, config, io = golden
    tolerance = config["tolerances"]
    seen = {}
    hook = model.model.multi_modal_projector.layer_norm.register_forward_pre_hook(
        lambda module, inputs: seen.__setitem__("shuffled", inputs[0])
    )
    features = model.model.get_image_features(
        io["input.pixel_values"], vision_feature_layer=-1, vision_feature_select_strategy="default"
    )
    hook.remove()
    _close(seen["shuffled"], io["expected.projector.shuffled"], tolerance["vision_max_abs"])
    _close(features.pooler_output, io["expected.projector.features"], tolerance["features_max_abs"])
    vision = model.model.vision_tower(io["input.pixel_values"], output_hidden_states=True)
    for k, hidden in enumerate(vision.hidden_states):
        _close(hidden, io[f"expected.vision.hidden.{k}"], tolerance["vision_max_abs"])
    _close(vision.last_hidden_state, io["expected.vision.last_hidden_state"], tolerance["vision_max_abs"])


@pytest.mark.parametrize("case", ["one", "batch"])
@torch.inference_mode()
def test_logits_and_answers_equal_the_release(golden, model, case):
    _, config, io = golden
    tolerance = config["tolerances"]
    ids, mask = io[f"input.{case}.input_ids"], io[f"input.{case}.attention_mask"]
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": io["input.pixel_values"]}
    real = mask.bool().numpy()
    out = model(**inputs, position_ids=io[f"expected.{case}.position_ids"], output_hidden_states=True)
    _close(out.hidden_states[0], io[f"expected.{case}.inputs_embeds"], tolerance["inputs_embeds_max_abs"], real)
    for k, hidden in enumerate(out.hidden_states):
        _close(hidden, io[f"expected.{case}.hidden.{k}"], tolerance["hidden_max_abs"], real)
    _close(out.logits, io[f"expected.{case}.logits"], tolerance["logits_max_abs"], real)
    _close(
        model(**inputs).logits, io.get(f"expected.{case}.logits_plain_positions", out.logits), tolerance["logits_max_abs"], real
    )

    recorded = io[f"expected.{case}.generated"]
    answer = model.generate(
        **inputs,
        max_new_tokens=recorded.shape[1],
        min_new_tokens=recorded.shape[1],
        do_sample=False,
        pad_token_id=config["token_ids"]["pad"],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(answer.sequences[:, ids.shape[1] :], recorded)
    _close(torch.stack(answer.logits, 1), io[f"expected.{case}.step_logits"], tolerance["step_logits_max_abs"])


def _close_pixels(ours, recorded, atol):
    """Within the set's tolerance; another Pillow (12.3 against 13.0) may round one pixel in a thousand a level further."""
    difference = (ours - recorded).abs()
    assert float(difference.max()) <= 2 * atol
    assert float((difference > atol).float().mean()) <= 1e-3


def test_tiles_equal_the_release(golden):
    folder, config, _ = golden
    tiling, stored = json.loads((folder / "tiling.json").read_text()), load_file(folder / "tiles.safetensors")
    for entry in [*tiling["by_size"], *tiling["pictures"]]:
        grid = chat.best_grid(entry["width"], entry["height"], tile_px=entry["image_size"], max_tiles=entry["max_num"])
        boxes = chat.tile_boxes(grid, entry["image_size"])
        assert list(grid) == entry["grid"]
        assert [list(box) for box in boxes] == entry["boxes"]
        assert len(boxes) + (entry["use_thumbnail"] and len(boxes) > 1) == entry["tiles"]

    same_pillow = Image.__version__ == config["versions"]["pillow"]
    atol = config["tolerances"]["tiles_max_abs" if same_pillow else "tiles_max_abs_other_pillow"]
    compared = 0
    for entry in tiling["pictures"]:
        picture, px = Image.open(folder / entry["file"]), entry["image_size"]
        tiles = chat.cut_tiles(picture, tile_px=px, max_tiles=entry["max_num"], thumbnail=entry["use_thumbnail"])
        assert len(tiles) == entry["tiles"] == len(entry["uint8_sha256"])
        if same_pillow:
            assert [hashlib.sha256(np.asarray(t).tobytes()).hexdigest() for t in tiles] == entry["uint8_sha256"]
        pixels, name = chat.normalize(tiles), Path(entry["file"]).stem
        places = {"first": 0, "middle": len(tiles) // 2, "last": -1} | {f"tile{entry.get('tile')}": entry.get("tile")}
        for place, index in places.items():
            if f"{name}.{place}" in stored:
                recorded = stored[f"{name}.{place}"]
                if place == "middle" and len(tiles) % 2 == 0:  # either of the two in the middle
                    index -= int((pixels[index] - recorded).abs().max() > (pixels[index - 1] - recorded).abs().max())
                _close_pixels(pixels[index], recorded, atol)
                compared += 1
            if f"{name}.{place}.stride7" in stored:
                _close_pixels(pixels[index, :, ::7, ::7], stored[f"{name}.{place}.stride7"], atol)
                compared += 1
    assert compared == len(stored)


def test_prompts_equal_the_release(golden):
    folder = golden[0]
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    assert prompts["system_message"] == chat.SYSTEM_MESSAGE
    for case in prompts["cases"]:
        batch = case["call"] == "batch_chat"
        questions, segments = (case["question"], case["segments"]) if batch else ([case["question"]], [case["segments"]])
        counts = case["num_patches_list"]
        counts = [case["tiles_total"]] if counts is None else counts
        rows = [[count] for count in counts] if batch else [counts]
        for question, row, expected in zip(questions, rows, segments, strict=True):
            history = case.get("history", [])
            if row and not history:
                question = chat.with_place(question)
            turns = [turn for asked, answer in history for turn in (("user", asked), ("assistant", answer))]
            text = chat.expand_places(
                chat.chat_text([*turns, ("user", question)]), row, tokens_per_tile=case["num_image_token"]
            )
            whole = "".join(chat.CONTEXT * part["img_context"] if isinstance(part, dict) else part for part in expected)
            assert text == whole, case["name"]


def test_full_size_has_the_released_names_and_shapes(released_keys):
    released = released_keys("internvl25")
    shapes = {name: tuple(shape) for name, shape in released["keys"]}
    config = weights.native_config(released["config"], image_token_id=weights.IMAGE_TOKEN_ID)
    weights.check_shapes(shapes, config, what="the list")
    ours = weights.native_config(weights.FULL_CONFIG, image_token_id=weights.IMAGE_TOKEN_ID)
    assert ours.to_dict() == config.to_dict()
    assert weights.tokens_per_tile(released["config"]) == 256

    wrong = dict(shapes)
    wrong["mlp1.2.weight"] = wrong.pop("mlp1.1.weight")
    with pytest.raises(WrongWeights, match=r"1 missing .*linear_1\.weight.*1 unexpected \(mlp1\.2\.weight\)"):
        weights.check_shapes(wrong, config, what="the list")

"""The tagger and DAPE as a prompter: tags follow the picture, thresholds are strict, lists and files are checked."""

from __future__ import annotations

import pytest
import torch

from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.models import ram_network
from coz.models.ram import Tagger
from coz.prompters.base import Prompter
from coz.prompters.dape import Dape

CPU = {"device": "cpu", "precision": "fp32"}


def _views(count, *side_px):
    """Pictures that differ in color and texture."""
    noise = torch.rand(count, 3, *side_px, generator=torch.Generator().manual_seed(2))
    tint = torch.linspace(0, 1, count * 3).reshape(count, 3, 1, 1)
    return 0.5 * noise + 0.5 * tint


@pytest.fixture(scope="module")
def prompter():
    return Dape(weights="random", size="tiny", **CPU)


def test_prompts_are_tags_that_follow_the_picture_and_not_the_context(prompter):
    assert isinstance(prompter, Prompter)
    views = _views(4, 96, 96)
    prompts = prompter(views, None)
    assert prompts == prompter(views, views.flip(0), seeds=[1, 2, 3, 4])
    assert len(set(prompts)) > 1
    for prompt in prompts:
        tags = prompt.split(", ") if prompt else []
        assert all(len(tag) == 7 and tag.startswith("tag") and tag[3:].isdigit() for tag in tags)
        assert tags == sorted(set(tags))
    assert any(prompts)


def test_batches_equal_single_images(monkeypatch):
    tagger, views = Tagger(weights="random", size="tiny", **CPU), _views(5, 70, 90)
    texts, embeds = tagger(views)
    singles = [tagger(view[None]) for view in views]
    assert texts == [single[0][0] for single in singles]
    torch.testing.assert_close(embeds, torch.cat([single[1] for single in singles]), rtol=0, atol=2e-5)
    monkeypatch.setattr("coz.models.ram.BATCH_IMAGES", 2)
    assert tagger(views)[0] == texts
    assert embeds.shape[0] == 5
    assert embeds.shape[2] == 512
    assert embeds.dtype == torch.float32


def test_random_models_follow_the_seed_and_leave_the_global_generator_alone(prompter):
    torch.manual_seed(9)
    state = torch.get_rng_state()
    view = _views(1, 64, 64)
    other = Dape(weights="random", size="tiny", seed=1, **CPU)
    again = Dape(weights="random", size="tiny", seed=0, **CPU)
    assert again(view, None) == prompter(view, None) != other(view, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint == prompter.fingerprint != other.fingerprint
    assert prompter.fingerprint["weights"] == "random"


def test_every_random_weight_follows_the_seed():
    models = []
    for before in (1, 2):
        torch.manual_seed(before)
        models.append(ram_network.random_model(ram_network.TINY, seed=0).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.fixture
def folder(tmp_path):
    """A RAM checkpoint in the official layout with the official file names, written from a random model."""
    model = ram_network.random_model(ram_network.TINY, seed=4)
    state = {_official_name(name): tensor for name, tensor in model.state_dict().items()}
    for i in range(ram_network.TINY.head_layers):
        layer = f"tagging_head.encoder.layer.{i}.crossattention.self"
        parts = state.pop(f"head.{i}.attention.in_proj_bias").chunk(3)
        state |= {f"{layer}.{name}.bias": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
    torch.save({"model": state}, tmp_path / "ram_swin_large_14m.pth")
    (tmp_path / "data").mkdir()
    count = ram_network.TINY.tags
    (tmp_path / "data" / "ram_tag_list.txt").write_text("\n".join(f"thing {i}" for i in range(count)) + "\n")
    (tmp_path / "data" / "ram_tag_list_threshold.txt").write_text("0.5\n" * count)
    return tmp_path


def _official_name(name):
    parts = name.split(".")
    if parts[0] == "visual":
        if "downsample" in parts:
            parts[2] = str(int(parts[2]) - 1)
        return ".".join(["visual_encoder", *parts[1:]])
    if parts[0] != "head" or "in_proj_bias" in parts:
        return name
    places = {
        "attention.q_proj_weight": "crossattention.self.query.weight",
        "attention.k_proj_weight": "crossattention.self.key.weight",
        "attention.v_proj_weight": "crossattention.self.value.weight",
        "attention.out_proj": "crossattention.output.dense",
        "attention_norm": "crossattention.output.LayerNorm",
        "mlp_in": "intermediate.dense",
        "mlp_out": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    rest = ".".join(parts[2:])
    place = next(key for key in places if rest.startswith(key))
    return f"tagging_head.encoder.layer.{parts[1]}.{rest.replace(place, places[place])}"


def test_lists_are_found_beside_the_checkpoint(folder):
    settings = {"image_px": ram_network.TINY.image_px} | CPU
    from_folder = Tagger(weights=str(folder), **settings)
    from_file = Tagger(weights=str(folder / "ram_swin_large_14m.pth"), **settings)
    view = _views(1, 64, 64)
    texts, embeds = from_folder(view)
    assert texts[0].startswith("thing ")
    assert texts == from_file(view)[0]
    expected = ram_network.random_model(ram_network.TINY, seed=4).image_embeds(ram_network.preprocess(view, 64))
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


def test_thresholds_are_strict(folder):
    settings = {"weights": str(folder), "image_px": ram_network.TINY.image_px} | CPU
    view = _views(1, 64, 64)
    model = ram_network.random_model(ram_network.TINY, seed=4)
    with torch.inference_mode():
        odds = model.logits(model.image_embeds(ram_network.preprocess(view, 64))).sigmoid()[0]
    best = odds.argmax().item()
    thresholds = torch.ones(len(odds))
    file = folder / "thresholds.txt"
    for shift, prompt in ((0.0, ""), (-1e-3, f"thing {best}"), (1e-3, "")):
        thresholds[best] = odds[best] + shift
        file.write_text("\n".join(repr(value.item()) for value in thresholds))
        assert Tagger(thresholds=str(file), **settings)(view)[0] == [prompt]


def test_another_window_resizes_the_bias_tables(folder):
    settings = {"weights": str(folder)} | CPU
    small = Tagger(image_px=64, **settings)
    large = Tagger(image_px=128, window=8, **settings)
    view = _views(1, 128, 128)
    assert small(view)[1].shape[1] == 1 + (64 // 8) ** 2
    assert large(view)[1].shape[1] == 1 + (128 // 8) ** 2
    assert small.fingerprint != large.fingerprint


def test_resized_tables_keep_the_center_and_symmetry():
    side = torch.linspace(-1, 1, 13)
    table = (side[:, None] ** 2 + side**2).flatten()[:, None]
    resized = ram_network.resize_bias_table(table, 12).reshape(23, 23)
    torch.testing.assert_close(resized[11, 11], torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(resized, resized.flip(0).t(), rtol=0, atol=1e-5)
    assert ram_network.resize_bias_table(table, 7) is table


def test_mistakes_are_named_before_weights_load(folder):
    with pytest.raises(WeightsNotFound, match=r"spaces/nobody/nothing.*coz\.prepare"):
        Dape(weights="spaces/nobody/nothing", **CPU)
    with pytest.raises(WeightsNotFound, match=r"lora=.*DAPE\.pth does not exist"):
        Dape(weights=str(folder), lora=str(folder / "DAPE.pth"), **CPU)
    with pytest.raises(UserError, match="size=huge"):
        Dape(weights="random", size="huge", **CPU)
    (folder / "data" / "ram_tag_list_threshold.txt").write_text("0.5\n0.6\n")
    with pytest.raises(WrongWeights, match="2 thresholds for 60 tags"):
        Dape(weights=str(folder), **CPU)
    (folder / "data" / "ram_tag_list_threshold.txt").write_text("half\n")
    with pytest.raises(WrongWeights, match="one number a line"):
        Dape(weights=str(folder), **CPU)
    (folder / "data" / "ram_tag_list.txt").unlink()
    with pytest.raises(WeightsNotFound, match=r"ram_tag_list\.txt; .*xinyu1205/recognize-anything.*tag_list=") as missing:
        Dape(weights=str(folder / "ram_swin_large_14m.pth"), **CPU)
    assert "data" in str(missing.value)


def test_a_list_of_another_length_than_the_checkpoint_is_refused(folder):
    for file, line in (("ram_tag_list.txt", "thing"), ("ram_tag_list_threshold.txt", "0.5")):
        (folder / "data" / file).write_text(f"{line}\n" * 7)
    with pytest.raises(WrongWeights, match="knows 60 tags, tag_list has 7"):
        Dape(weights=str(folder), image_px=64, **CPU).load()

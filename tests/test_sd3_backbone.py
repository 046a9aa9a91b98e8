"""OSEDiff on SD3 with random weights: seeds, batches, prompts, adapters, memory, and what it says to wrong files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coz.backbones.base import Backbone
from coz.backbones.osediff_sd3 import OSEDiffSD3
from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.models.lora import adapt, extract, merge, random_adapter
from coz.models.lora_files import LoraInfo, read_adapters, read_info, write_adapters
from coz.models.sd3 import adaln_layers, encoder_layers
from coz.models.sd3_memory import PLANS, component_bytes, estimate_gb
from coz.models.sd3_sizes import SIZES
from coz.models.sd3_source import RandomSource


def _tiny(**settings: object) -> OSEDiffSD3:
    return OSEDiffSD3(**{"weights": "random", "size": "tiny", "device": "cpu", "precision": "fp32", **settings})


@pytest.fixture(scope="module")
def backbone() -> OSEDiffSD3:
    return _tiny()


@pytest.fixture(scope="module")
def views() -> torch.Tensor:
    return torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(1))


PROMPTS = ["a brick wall", "", "a yellow flower"]


def test_keeps_the_contract(backbone, views):
    assert isinstance(backbone, Backbone)
    image = backbone(views, size=(32, 40))
    assert image.shape == (3, 3, 32, 40)
    assert image.dtype == torch.float32
    assert image.device.type == "cpu"
    assert 0 <= image.min() < image.max() <= 1
    json.dumps(backbone.fingerprint)


def test_a_batch_equals_single_images(backbone, views):
    together = backbone(views, size=32, prompts=PROMPTS, seeds=[5, 6, 7])
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (5, 6, 7), strict=True)):
        alone = backbone(views[i : i + 1], size=32, prompts=[prompt], seeds=[seed])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


def test_seeds_draw_the_noise_and_prompts_change_the_image(backbone, views):
    one = views[:1]
    image = backbone(one, size=32, seeds=[1])
    assert torch.equal(image, backbone(one, size=32, seeds=[1]))
    assert (image - backbone(one, size=32, seeds=[2])).abs().max() > 1e-3
    assert (image - backbone(one, size=32, seeds=[1], prompts=["a brick wall"])).abs().max() > 1e-4


def test_the_global_generator_stays_as_it_is():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    _tiny()(torch.zeros(1, 3, 16, 16), size=16)
    assert torch.equal(torch.rand(2), expected)


def test_the_mode_needs_no_seed(views):
    backbone = _tiny(posterior="mode")
    assert torch.equal(backbone(views[:1], size=32, seeds=[1]), backbone(views[:1], size=32, seeds=[2]))


def test_the_encode_shift_is_subtracted_where_asked(backbone, views):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    shifted = _tiny(encode_shift=True).encode_image(x)
    config = SIZES["tiny"].vae
    expected = backbone.encode_image(x) - config["shift_factor"] * config["scaling_factor"]
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)


def test_each_prompt_is_encoded_once(views, monkeypatch):
    backbone = _tiny(remember_prompts=2)
    backbone.load()
    seen = []
    encode = backbone._text.encode
    monkeypatch.setattr(backbone._text, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    backbone(views, size=16)
    backbone(views, size=16, prompts=["a", "a", ""])
    backbone(views, size=16, prompts=["b", "c", "d"])
    assert seen == ["", "a", "b", "c", "d"]
    backbone(views[:2], size=16, prompts=["", "d"])
    assert seen == ["", "a", "b", "c", "d"]  # the empty prompt stays, although three others came after it
    backbone(views[:1], size=16, prompts=["a"])
    assert seen[-1] == "a"


def test_without_t5_its_rows_are_zeros():
    backbone = _tiny(text_encoder_3=False)
    embeds, _ = backbone.encode_prompts(["a wall"])
    assert embeds.shape[1] == 77 + 512
    assert embeds[:, 77:].abs().max() == 0
    assert embeds[:, :77].abs().max() > 0


@pytest.mark.parametrize("memory", [name for name in PLANS if name != "full"])
def test_memory_plans_change_nothing_but_memory(backbone, views, memory):
    images = [model(views, size=32, prompts=PROMPTS, seeds=[1, 2, 3]) for model in (backbone, _tiny(memory=memory))]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_dropped_text_encoders_are_read_before_the_image_model_and_give_the_same(backbone, views, monkeypatch):
    dropping = _tiny(drop_text_encoders=True)
    order = []
    for name in ("transformer", "text_encoder"):
        read = getattr(RandomSource, name)
        monkeypatch.setattr(
            RandomSource, name, lambda *args, read=read, name=name, **kw: (order.append(name), read(*args, **kw))[1]
        )
    image = dropping(views, size=32, prompts=PROMPTS)
    torch.testing.assert_close(image, backbone(views, size=32, prompts=PROMPTS), rtol=0, atol=1e-5)
    assert order == ["text_encoder"] * 3 + ["transformer"]
    assert not dropping._text._encoders


def test_t5_streamed_layer_by_layer_gives_the_same():
    from accelerate import cpu_offload

    source = RandomSource(size="tiny")
    ids = torch.arange(12)[None]
    whole = source.text_encoder("text_encoder_3", dtype=torch.float32)
    streamed = source.text_encoder("text_encoder_3", dtype=torch.float32)
    cpu_offload(streamed, execution_device=torch.device("cpu"))
    assert torch.equal(whole(ids).last_hidden_state, streamed(ids).last_hidden_state)


def test_merged_equals_unmerged(views):
    merged, beside = (_tiny(merge=flag)(views, size=32, seeds=[1, 2, 3]) for flag in (True, False))
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, stride=2, padding=1)])
def test_an_adapter_adds_up_times_down(layer):
    model = nn.Sequential(layer)
    generator = torch.Generator().manual_seed(0)
    adapter = random_adapter({"0": tuple(layer.weight.shape)}, rank=2, generator=generator)
    x = torch.randn(2, 6, *([8, 8] if layer.weight.ndim == 4 else []), generator=generator)
    plain = model(x)
    adapt(model, adapter, factor=0.5)
    beside = model(x)
    assert (beside - plain).abs().max() > 1e-3
    kept = extract(model)["0"]
    assert torch.equal(kept.up, adapter["0"].up)
    folded = nn.Sequential(layer)
    merge(folded, {"0": kept}, factor=0.5)
    torch.testing.assert_close(folded(x), beside, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_estimates_match_the_known_sizes():
    dtypes = dict.fromkeys(("transformer", "vae", "text"), torch.bfloat16)
    sizes = component_bytes(RandomSource(size="full").shapes, dtypes=dtypes, use_t5=True)
    assert sizes.transformer / 2 == pytest.approx(2.03e9, rel=0.05)
    assert sizes.vae / 2 == pytest.approx(83.8e6, rel=0.001)
    assert [round(count / 2e6) for count in sizes.text] == [124, 695, 4762]
    needs = [estimate_gb(PLANS[name], sizes, batch=16)[1] for name in ("full", "24gb", "16gb", "12gb")]
    assert needs == sorted(needs, reverse=True)
    assert needs[1] < 24
    assert needs[2] < 16
    assert needs[3] < 12


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture(scope="module")
def released(tmp_path_factory, backbone) -> dict[str, str]:
    """A tiny model on disk in the released formats: base folder without T5, list of the LoRA, wrapped VAE encoder."""
    folder = tmp_path_factory.mktemp("released")
    source = RandomSource(size="tiny")
    device, dtype = torch.device("cpu"), torch.float32
    transformer, vae = source.transformer(dtype=dtype, device=device), source.vae(dtype=dtype, device=device)
    for name, part in (("transformer", transformer), ("vae", vae)):
        part.save_pretrained(folder / "base" / name)
    for name in ("text_encoder", "text_encoder_2"):
        source.text_encoder(name, dtype=dtype).save_pretrained(folder / "base" / name)
        source.tokenizer(name).save_pretrained(folder / "base" / name.replace("text_encoder", "tokenizer"))
    (folder / "base" / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))

    adapters = _tiny()._adapters.parts
    flat = [matrix for pair in adapters["transformer"].values() for matrix in (pair.up, pair.down)]
    torch.save(flat, folder / "lora.pkl")
    state = {}
    for key, value in vae.encoder.state_dict().items():
        layer, _, kind = key.rpartition(".")
        adapted = layer in adapters["vae_encoder"]
        state[f"{layer}.base_layer.{kind}" if adapted else key] = value
    for name, pair in adapters["vae_encoder"].items():
        state[f"{name}.lora_A.default_encoder.weight"] = pair.down
        state[f"{name}.lora_B.default_encoder.weight"] = pair.up / 2  # peft's alpha of 8 over a rank of 4
    torch.save(state, folder / "vae.pt")
    return {"weights": str(folder / "base"), "lora": str(folder / "lora.pkl"), "vae_encoder": str(folder / "vae.pt")}


def _from_files(files: dict[str, str], **settings: object) -> OSEDiffSD3:
    return OSEDiffSD3(**{**files, "device": "cpu", "precision": "fp32", "text_encoder_3": False, **settings})


def test_files_give_the_model_that_was_saved(released, views):
    expected = _tiny(text_encoder_3=False)(views, size=32, prompts=PROMPTS)
    torch.testing.assert_close(_from_files(released)(views, size=32, prompts=PROMPTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_the_list_may_be_a_safetensors_file(released, named, tmp_path):
    flat = torch.load(released["lora"], weights_only=True)
    layers = list(_tiny()._adapters.parts["transformer"])
    names = [f"{layer}.{part}.weight" for layer in layers for part in ("lora_up", "lora_down")]
    keys = names if named else map(str, range(len(flat)))
    save_file(dict(zip(keys, flat, strict=True)), tmp_path / "lora.safetensors")
    found = _from_files({**released, "lora": str(tmp_path / "lora.safetensors")})._adapters.parts["transformer"]
    assert all(torch.equal(found[layer].up, flat[2 * i]) for i, layer in enumerate(layers))


def test_our_own_format_comes_back_as_written(released, views, tmp_path):
    adapters = _tiny()._adapters
    info = LoraInfo(rank=4, encode_shift=True, base="random")
    path = tmp_path / "run" / "lora.safetensors"
    write_adapters(path, adapters.parts, info)
    assert read_info(path) == info
    ours = _from_files({**released, "lora": str(path), "vae_encoder": None})
    assert ours.fingerprint["encode_shift"] is True
    expected = _tiny(text_encoder_3=False, encode_shift=True)(views, size=32)
    torch.testing.assert_close(ours(views, size=32), expected, rtol=0, atol=1e-5)


def test_our_own_format_is_read_strictly(tmp_path):
    transformer, vae = RandomSource(size="tiny").skeletons
    layers = {"transformer": adaln_layers(transformer), "vae_encoder": encoder_layers(vae)}
    parts = _tiny()._adapters.parts
    path = tmp_path / "lora.safetensors"
    write_adapters(path, parts, LoraInfo(rank=8, encode_shift=False, base="random"))
    with pytest.raises(WrongWeights, match=r"rank 8 expected.*norm1\.linear\.lora_up\.weight"):
        read_adapters(path, layers)
    pair = next(iter(parts["transformer"].values()))
    write_adapters(path, {"transformer": {"elsewhere": pair}}, LoraInfo(rank=4, encode_shift=False, base="random"))
    with pytest.raises(WrongWeights, match="has no layers elsewhere"):
        read_adapters(path, layers)


def _broken_copy(released: dict[str, str], tmp_path: Path, part: str) -> tuple[dict[str, str], Path]:
    shutil.copytree(released["weights"], tmp_path / "base")
    return {**released, "weights": str(tmp_path / "base")}, next((tmp_path / "base" / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_a_truncated_file_is_named_before_loading(released, tmp_path, part):
    files, path = _broken_copy(released, tmp_path, part)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WrongWeights, match=f"{path.name} cannot be read"):
        _from_files(files)


def test_another_models_weights_are_named_by_their_keys(released, tmp_path):
    files, path = _broken_copy(released, tmp_path, "transformer")
    state = load_file(path)
    state["down_blocks.0.resnets.0.conv1.weight"] = state.pop("proj_out.weight")
    save_file(state, path)
    with pytest.raises(WrongWeights, match=r"1 missing \(proj_out.weight\); 1 unexpected \(down_blocks"):
        _from_files(files)


def test_an_sd2_folder_is_refused(released, tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(WrongWeights, match="UNet"):
        _from_files({**released, "weights": str(tmp_path)})


def test_other_loras_are_refused(released, tmp_path):
    flat = torch.load(released["lora"], weights_only=True)
    path = tmp_path / "lora.pkl"
    files = {**released, "lora": str(path)}
    for content, words in [
        ({"rank_unet": 4, "state_dict_unet": {}}, "not the flat list.*rank_unet, state_dict_unet"),
        (flat[:-2], "2 missing"),
        ([*flat, flat[0]], r"1 unexpected \(6\)"),
        ([*flat[:-1], flat[-1][:, :-1]], "of another shape"),
        ("nothing", "holds a str"),
    ]:
        torch.save(content, path)
        with pytest.raises(WrongWeights, match=words):
            _from_files(files)
    with pytest.raises(WrongWeights, match=r"rank 8 expected.*norm1\.linear\.lora_up\.weight \(192, 4\)"):
        _from_files(released, lora_rank=8)


def test_another_vae_encoder_is_refused(released, tmp_path):
    state = torch.load(released["vae_encoder"], weights_only=True)
    path = tmp_path / "vae.pt"
    torch.save({key: value for key, value in state.items() if not key.startswith("conv_out")}, path)
    with pytest.raises(WrongWeights, match=r"conv_out\.weight, conv_out\.bias"):
        _from_files({**released, "vae_encoder": str(path)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": "huge"}, "size=huge"),
        ({"precision": "int8"}, "precision=int8"),
        ({"precision": "released", "merge": True}, "merge=false"),
        ({"memory": "8gb"}, "memory=8gb is unknown; use full"),
        ({"posterior": "mean"}, "posterior=mean"),
    ],
)
def test_settings_that_cannot_work_are_said_at_construction(settings, words):
    with pytest.raises(UserError, match=words):
        _tiny(**settings)


def test_missing_files_are_said_at_construction(released):
    with pytest.raises(WeightsNotFound, match="lora is not set"):
        _from_files({"weights": released["weights"]})
    with pytest.raises(WeightsNotFound, match="needs vae_encoder"):
        _from_files({**released, "vae_encoder": None})
    with pytest.raises(WeightsNotFound, match=r"lora=nowhere\.pkl does not exist"):
        _from_files({**released, "lora": "nowhere.pkl"})


def test_a_size_beyond_the_position_table_is_refused(backbone):
    with pytest.raises(UserError, match="3072 px of one SD3 pass"):
        backbone(torch.zeros(1, 3, 8, 8), size=3088)


def test_an_incomplete_folder_is_told_what_it_lacks_and_no_download(tmp_path):
    with pytest.raises(WeightsNotFound, match="lacks transformer") as caught:
        OSEDiffSD3(weights=str(tmp_path), lora="x.pkl", device="cpu")
    assert "complete folder" in str(caught.value)
    assert "coz.prepare" not in str(caught.value)

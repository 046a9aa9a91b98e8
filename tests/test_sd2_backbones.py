"""The SD2 family with tiny random weights: batches, odd sizes, prompts, wrong files."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from coz.backbones.base import Backbone
from coz.backbones.osediff_sd21 import OSEDiffSD21, random_checkpoint
from coz.backbones.s3diff import POSITIVE, S3Diff, pad_reflect
from coz.backbones.seesr import SeeSR
from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.image import resize
from coz.models import sd2
from coz.models.random_tokenizers import CLIP_PAD_SD2, clip_tokenizer

CONF = Path(__file__).resolve().parents[1] / "conf" / "backbone"
CLASSES = {"osediff_sd21": OSEDiffSD21, "s3diff": S3Diff, "seesr": SeeSR}
TINY = {"weights": "random", "size": "tiny", "device": "cpu", "precision": "fp32", "latent_tile": 6, "latent_overlap": 2}


class MeanTagger:
    """Tags and embeddings that differ from picture to picture."""

    def __call__(self, image):
        mean = image.mean((1, 2, 3))
        tags = ["bright sky" if value > 0.5 else "dark water" for value in mean]
        return tags, torch.sin(mean.view(-1, 1, 1) * torch.arange(1, 5 * 512 + 1).view(1, 5, 512))


def make(name, **settings):
    extra = {"seesr": {"steps": 2, "process_px": 32, "tagger": MeanTagger()}}.get(name, {})
    return CLASSES[name](**(TINY | extra | settings))


@pytest.fixture(scope="module")
def models():
    return {name: make(name) for name in CLASSES}


@pytest.fixture
def views():
    source = torch.Generator().manual_seed(5)
    coarse = torch.rand(3, 3, 6, 8, generator=source) * torch.tensor([0.3, 1.0, 0.6]).view(3, 1, 1, 1)
    return resize(coarse, (14, 18))


@pytest.mark.parametrize("name", CLASSES)
def test_contract(name, models, views):
    model = models[name]
    assert isinstance(model, Backbone)
    state = torch.random.get_rng_state()
    image = model(views[:1], size=(56, 72), seeds=[3])
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator must stay as it was"
    assert image.shape == (1, 3, 56, 72)
    assert image.dtype == torch.float32
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    assert image.std() > 0.01
    assert model.fingerprint["name"] == name
    assert model.fingerprint["weights"] == {"weights": "random", "size": "tiny", "seed": 0}
    assert make(name, seed=1).fingerprint != model.fingerprint
    again = make(name)
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again(views[:1], size=(56, 72), seeds=[3]), image), "random weights must depend on the seed alone"


@pytest.mark.parametrize("name", CLASSES)
def test_batches_equal_single_images(name, models, views, monkeypatch):
    """Different pictures (so degradations and tags), prompts and seeds; three tiles per call, so that calls mix pictures."""
    model = models[name]
    prompts, seeds = ["a cat", "", "a red door"], [1, 2, 3]
    monkeypatch.setattr(model, "color_fix", "none")  # which works on 8-bit pictures and amplifies a level
    together = model(views, size=(56, 72), prompts=prompts, seeds=seeds)
    monkeypatch.setattr(model, "batch_size", 3)
    monkeypatch.setattr(model, "fold_lora", False, raising=False)
    in_threes = model(views, size=(56, 72), prompts=prompts, seeds=seeds)
    for index in range(3):
        alone = model(views[index : index + 1], size=(56, 72), prompts=[prompts[index]], seeds=[seeds[index]])
        for batch in (together, in_threes):
            difference = (batch[index] - alone[0]).abs()  # the result may be an 8-bit picture: one level, rarely
            assert difference.max() <= 1.01 / 255
            assert (difference > 1e-3).float().mean() < 0.01
    assert (together[0] - together[1]).abs().max() > 0.05


@pytest.mark.parametrize("name", CLASSES)
def test_prompts_and_seeds_reach_the_output(name, models, views):
    model = models[name]
    base = model(views[:1], size=48, prompts=["a cat"], seeds=[1])
    assert not torch.equal(base, model(views[:1], size=48, prompts=["white snow on old stone"], seeds=[1]))
    assert not torch.equal(base, model(views[:1], size=48, prompts=["a cat"], seeds=[2]))
    assert torch.equal(base, model(views[:1], size=48, prompts=["a cat"], seeds=[1]))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("view", "size"), [((5, 3), (8, 8)), ((1, 1), (17, 9)), ((40, 9), (129, 30)), ((1, 30), (1, 30))])
def test_odd_sizes(name, models, views, view, size):
    image = models[name](resize(views[:1], view), size=size)
    assert image.shape == (1, 3, *size)
    assert image.isfinite().all()


def test_narrow_pictures_are_refused_or_right():
    lr = torch.rand(1, 3, 1, 200)
    assert make("osediff_sd21", latent_overlap=0)(lr, size=(1, 1200)).shape == (1, 3, 1, 1200)
    with pytest.raises(UserError, match=r"latent of 150 x 1 .* latent_overlap=2.*latent_tile to 13"):
        make("osediff_sd21")(lr, size=(1, 1200))
    with pytest.raises(UserError, match="too narrow for SeeSR"):
        make("seesr", process_px=512)(lr, size=(1, 4000))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_tile": 32, "latent_overlap": 32}, "latent_tile=32 must exceed latent_overlap=32"),
        ({"vae_encoder_tile_px": 100}, "vae_encoder_tile_px=100"),
        ({"vae_decoder_tile": 0}, "vae_decoder_tile=0"),
        ({"posterior": "mean"}, "posterior=mean is unknown; use sample or mode"),
        ({"color_fix": "lab"}, "color_fix=lab"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"size": "huge"}, "size=huge"),
        ({"device": "abacus"}, "device=abacus"),
        ({"weights": "/nowhere/at/all"}, "coz.prepare"),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(name, settings, message):
    with pytest.raises(UserError, match=message):
        make(name, **settings)


def test_seesr_refuses_step_counts_without_a_schedule():
    for steps in (0, 1000):
        with pytest.raises(UserError, match=f"steps={steps}"):
            make("seesr", steps=steps)


@pytest.mark.parametrize("name", CLASSES)
def test_configuration_binds_to_the_constructor(name):
    whole = OmegaConf.create({"device": "auto", "precision": "auto", "node": OmegaConf.load(CONF / f"{name}.yaml")})
    node = OmegaConf.to_container(whole.node, resolve=True)
    target = node.pop("_target_")
    assert target == f"{CLASSES[name].__module__}.{CLASSES[name].__qualname__}"
    parameters = inspect.signature(CLASSES[name]).parameters
    assert set(node) == set(parameters), "every setting stands in the file, and no other"
    shared = set(node) - {"device", "precision", "checkpoint", "degradation_checkpoint", "tagger"}
    for key in shared:
        assert node[key] == parameters[key].default, key


def test_how_prompts_join():
    s3diff, seesr = make("s3diff"), make("seesr")
    assert s3diff.positive_texts(["a cat", ""]) == [f"{POSITIVE} a cat", POSITIVE]
    assert seesr.full_prompt("cat, dog", "") == "cat, dog, ,clean, high-resolution, 8k"
    assert seesr.full_prompt("cat, dog", "a cat") == "cat, dog, a cat,clean, high-resolution, 8k"
    s3diff, seesr = make("s3diff", prompt_merge="replace"), make("seesr", prompt_merge="replace")
    assert s3diff.positive_texts(["a cat", ""]) == ["a cat", POSITIVE]
    assert seesr.full_prompt("cat, dog", "a cat") == "a cat"
    assert seesr.full_prompt("cat, dog", "") == "cat, dog, ,clean, high-resolution, 8k"


@pytest.mark.parametrize("name", ["s3diff", "seesr"])
def test_no_guidance_leaves_the_negative_prompt_out(name, models, views, monkeypatch):
    model = models[name]
    images = {}
    for scale in (1.0, 3.0):
        for text in ("blur", "snow on old stone"):
            monkeypatch.setattr(model, "guidance_scale", scale)
            monkeypatch.setattr(model, "negative_prompt", text)
            images[scale, text] = model(views[:1], size=32)
    assert torch.equal(images[1.0, "blur"], images[1.0, "snow on old stone"])
    assert not torch.equal(images[3.0, "blur"], images[3.0, "snow on old stone"])


def test_folded_adapters_equal_separate_ones(views):
    """With a modulation in between: (W + (8/r) B Mᵀ A) x = W x + (8/r) B(Mᵀ A x)."""
    folded, separate = make("s3diff", color_fix="none"), make("s3diff", color_fix="none", fold_lora=False)
    difference = (folded(views[:1], size=(56, 72)) - separate(views[:1], size=(56, 72))).abs()
    assert difference.max() <= 1.01 / 255
    assert (difference > 1e-3).float().mean() < 0.01


def test_reflected_padding():
    x = torch.rand(1, 3, 40, 50)
    expected = torch.nn.functional.pad(x, (0, 14, 0, 24), mode="reflect")
    assert torch.equal(pad_reflect(x, multiple=64), expected)
    assert pad_reflect(torch.tensor([[0.0, 1.0, 2.0]]), multiple=8).tolist() == [[0, 1, 2, 1, 0, 1, 2, 1]] * 8
    assert pad_reflect(torch.tensor([[7.0]]), multiple=4).tolist() == [[7] * 4] * 4


def test_prompts_are_encoded_once():
    text_encoder = sd2.build_random(lambda: sd2.build_text_encoder(sd2.architecture("tiny")["text_encoder"]), seed=0)
    encoder = sd2.PromptEncoder(clip_tokenizer(pad_token=CLIP_PAD_SD2), text_encoder, capacity=2)
    batches = []
    text_encoder.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    first = encoder(["a", "b", "a"])
    assert batches == [2]
    assert torch.equal(first[0], first[2])
    assert torch.equal(encoder(["b", "a"]), first[[1, 0]])
    assert batches == [2]
    encoder(["c"])  # the longest unused, "b", is forgotten
    encoder(["a"])
    assert batches == [2, 1]
    encoder(["b"])
    assert batches == [2, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny random model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("sd2")
    source = sd2.Weights.find("random", parts=sd2.BASE_PARTS, what="", size_gb=0, size="tiny")
    encoder = source.prompt_encoder(torch.device("cpu"), torch.float32)
    source.unet().save_pretrained(folder / "unet")
    source.vae().save_pretrained(folder / "vae")
    encoder.text_encoder.save_pretrained(folder / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).touch()
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(source.config("scheduler")))
    return folder


@pytest.fixture
def checkpoint(base_folder, tmp_path):
    """`checkpoint(**changes)`: an osediff.pkl for the folder, with changed entries."""
    source = sd2.Weights.find(str(base_folder), parts=sd2.BASE_PARTS, what="", size_gb=0)
    state = random_checkpoint(source.unet(), source.vae(), rank=2, seed=0)

    def write(**changes):
        torch.save(state | changes, tmp_path / "osediff.pkl")
        return tmp_path / "osediff.pkl"

    write.state = state
    return write


def from_files(base_folder, checkpoint):
    return OSEDiffSD21(weights=str(base_folder), checkpoint=checkpoint, device="cpu", precision="fp32")


def test_a_folder_loads_and_is_identified_by_its_content(base_folder, checkpoint, views):
    model = from_files(base_folder, checkpoint())
    before = model.fingerprint
    state = torch.random.get_rng_state()
    assert model(views[:1], size=32).isfinite().all()
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.fingerprint == before
    other = dict(checkpoint.state["state_dict_vae"])
    name = next(iter(other))
    other[name] = other[name] + 1
    assert from_files(base_folder, checkpoint(state_dict_vae=other)).fingerprint != before


def test_wrong_files_are_named(base_folder, checkpoint, tmp_path):
    with pytest.raises(UserError, match="checkpoint is not set"):
        from_files(base_folder, None)
    with pytest.raises(WeightsNotFound, match="does not exist"):
        from_files(base_folder, tmp_path / "none.pkl")
    with pytest.raises(WrongWeights, match=r"conv_in\.lora_A.* instead of \(3,"):
        from_files(base_folder, checkpoint(rank_unet=3)).load()
    fewer = {k: v for k, v in checkpoint.state["state_dict_unet"].items() if "mid_block.resnets.1.conv2" not in k}
    with pytest.raises(WrongWeights, match=r"2 missing \(mid_block\.resnets\.1\.conv2\.lora_A"):
        from_files(base_folder, checkpoint(state_dict_unet=fewer)).load()
    with pytest.raises(WrongWeights, match="a layer that the network lacks"):
        from_files(base_folder, checkpoint(unet_lora_others_modules=["mid_block.no_such_layer"])).load()
    torch.save({"params": {}}, tmp_path / "other.pkl")
    with pytest.raises(WrongWeights, match="lacks unet_lora_encoder_modules"):
        from_files(base_folder, tmp_path / "other.pkl").load()
    with pytest.raises(WrongWeights, match="lacks unet_lora_target_modules"):
        S3Diff(weights=str(base_folder), checkpoint=checkpoint(), degradation_checkpoint=checkpoint(), device="cpu").load()


def test_a_pickle_that_runs_code_is_refused(base_folder, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"state_dict_unet": Malicious()}))
    with pytest.raises(WrongWeights):
        from_files(base_folder, tmp_path / "bad.pkl").load()
    assert not (tmp_path / "ran").exists()


def test_another_networks_weights_name_the_first_keys(base_folder, checkpoint, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(base_folder, folder)
    shutil.copy(base_folder / "vae/diffusion_pytorch_model.safetensors", folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(WrongWeights, match=r"unet does not fit the model: keys \d+ missing \(conv_in\.weight"):
        from_files(folder, checkpoint()).load()
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(WrongWeights, match="cut off"):
        from_files(folder, checkpoint()).load()
    (folder / "unet/config.json").unlink()
    with pytest.raises(WeightsNotFound, match=r"unet/config\.json"):
        from_files(folder, checkpoint())


def test_old_names_of_the_autoencoders_attention(base_folder, checkpoint, tmp_path, views):
    """Checkpoints of 2022, as SD2's own, say query, key, value, proj_attn."""
    folder = tmp_path / "old"
    shutil.copytree(base_folder, folder)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    words = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in load_file(path).items():
        for new, old in words.items():
            name = name.replace(new, old)
        state[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_file(state, path)
    images = [from_files(place, checkpoint())(views[:1], size=32) for place in (folder, base_folder)]
    assert torch.equal(*images)

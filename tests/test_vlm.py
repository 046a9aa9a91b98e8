"""Vision-language models: a random one stands for all."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.models.chat import ChatRequest, chat_messages, chat_requests, critic_messages
from coz.models.decoding import Sampling
from coz.models.encoding import number_tokens
from coz.models.random_vlm import random_vlm
from coz.models.vlm import VisionLanguageModel

CPU = {"device": "cpu", "precision": "fp32"}
SHORT = Sampling(max_new_tokens=8)


def _tiny(**settings):
    return VisionLanguageModel(**({"weights": "random", "size": "tiny"} | CPU | settings))


@pytest.fixture(scope="module")
def tiny():
    model = _tiny(batch_size=4)
    model.load()
    return model


@pytest.fixture(scope="module")
def states():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 56, 56, generator=generator), torch.rand(3, 3, 56, 56, generator=generator)


def _ask(states, *, context=True):
    return chat_requests(*states, pair=context, messages=chat_messages(context="pair" if context else "single"))


@pytest.fixture(scope="module")
def mixed(states):
    """Requests of different lengths and numbers of pictures, so that a batch needs padding."""
    pair, single = _ask(states), _ask(states, context=False)
    return [pair[0], single[1], ChatRequest(critic_messages("stone, leaf"), pair[2].images)]


@pytest.mark.parametrize(
    "sampling", [SHORT, Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1)]
)
def test_batched_answers_equal_single_ones(tiny, mixed, sampling):
    together = tiny.answer(mixed, sampling=sampling, seeds=[3, 4, 5])
    alone = [tiny.answer([request], sampling=sampling, seeds=[seed])[0] for request, seed in zip(mixed, (3, 4, 5), strict=True)]
    assert together == alone
    assert tiny.answer(mixed[::-1], sampling=sampling, seeds=[5, 4, 3]) == together[::-1]
    assert len(set(together)) == 3


def test_seeds_matter_only_where_something_is_drawn(tiny, mixed):
    drawing = Sampling(max_new_tokens=8, temperature=1.0)
    assert tiny.answer(mixed, sampling=SHORT, seeds=[0, 0, 0]) == tiny.answer(mixed, sampling=SHORT, seeds=[1, 1, 1])
    assert tiny.answer(mixed, sampling=drawing, seeds=[0, 0, 0]) != tiny.answer(mixed, sampling=drawing, seeds=[1, 1, 1])


def test_changing_only_the_context_changes_input_and_answer(tiny, states):
    current, context = states
    before, after = _ask((current, context)), _ask((current, context.flip(0)))
    inputs = [tiny._inputs(tiny._loaded[1], requests) for requests in (before, after)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    assert not torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])
    assert tiny.answer(before, sampling=SHORT)[0] != tiny.answer(after, sampling=SHORT)[0]


def test_answers_have_the_length_asked_for(tiny, mixed, monkeypatch):
    tokenizer, lengths = tiny._loaded[1].tokenizer, []
    monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **_: lengths.append(ids.shape[1]) or [""] * len(ids))
    tiny.answer(mixed[:1], sampling=Sampling(max_new_tokens=5, min_new_tokens=5))
    assert lengths == [5]


def test_number_probabilities_equal_brute_force(tiny, mixed):
    """Each of 0…100 written out behind the prompt and read in a pass of its own; Qwen's digits are single tokens."""
    model, processor = tiny._loaded
    shares, masses = tiny.rate(mixed)
    for row, request in enumerate(mixed):
        inputs = tiny._inputs(processor, [request])
        numbers = number_tokens(processor, request.messages, range(101))
        assert [len(number) for number in (numbers[7], numbers[42], numbers[100])] == [1, 2, 3]
        joint = torch.tensor([_probability(model, inputs, number, numbers) for number in numbers], dtype=torch.float64)
        expectation = (joint / joint.sum() * torch.arange(101)).sum() / 100
        torch.testing.assert_close(shares[row].double(), joint / joint.sum(), rtol=1e-3, atol=0)  # 100 too, which is rare
        assert masses[row].item() == pytest.approx(joint.sum().item(), rel=1e-4)
        assert ((shares[row].double() * torch.arange(101)).sum() / 100).item() == pytest.approx(expectation.item(), abs=1e-5)
    assert torch.allclose(shares.sum(1), torch.ones(3))


def _probability(model, inputs, number, numbers):
    written = torch.tensor([number])
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], written], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(written)], 1)
    with torch.no_grad():
        after = model(**longer).logits[0, -len(number) - 1 :].double().softmax(-1)
    probability = 1.0
    for place, token in enumerate(number):
        probability *= after[place, token].item()
    further = {other[len(number)] for other in numbers if len(other) > len(number) and other[: len(number)] == number}
    return probability * (1 - sum(after[-1, token].item() for token in further))


def test_random_weights_follow_their_seed_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    one, again, other = (
        random_vlm(size="tiny", seed=seed, dtype=torch.float32, device=torch.device("cpu"))[0].lm_head.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_full_size_has_the_real_models_parameters():
    from transformers import Qwen2_5_VLForConditionalGeneration

    from coz.models.random_vlm import random_config, random_tokenizer

    config = random_config(size="full", tokenizer=random_tokenizer())
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_754_622_976  # Qwen2.5-VL-3B-Instruct's count


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in tiny._loaded:
        part.save_pretrained(path)
    return path


def test_a_folder_gives_the_answers_of_the_model_it_was_saved_from(tiny, folder, mixed):
    read = VisionLanguageModel(weights=str(folder), **CPU)
    assert read.answer(mixed, sampling=SHORT) == tiny.answer(mixed, sampling=SHORT)
    assert read.memory_gb > 0


def test_a_folder_that_lacks_tensors_is_refused(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    state = load_file(broken / "model.safetensors")
    state.pop(next(name for name in state if "q_proj" in name))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongWeights, match="missing_keys"):
        VisionLanguageModel(weights=str(broken), **CPU).load()


def _adapter(folder, *, names=lambda name: name, target=None):
    """A LoRA with effect, written by peft; `names` changes its tensors' names, `target` the recorded pattern."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    model, _ = random_vlm(size="tiny", seed=0, dtype=torch.float32, device=torch.device("cpu"))
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|up_proj)"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    adapted.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({names(name): tensor for name, tensor in load_file(file).items()}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    if target is not None:
        config["target_modules"] = target
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapted.eval()


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("layout", ["peft", "ms-swift"])
def test_adapters_act_as_peft_has_them(tiny, mixed, tmp_path, layout, merge):
    swift = {
        "names": lambda name: name.replace("model.language_model.", "model."),  # as transformers called them before 4.52
        "target": r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    }
    place = tmp_path / "v0-20250601" / "checkpoint-10" if layout == "ms-swift" else tmp_path
    reference = _adapter(place, **(swift if layout == "ms-swift" else {}))
    model = _tiny(adapter=str(tmp_path), merge_adapter=merge)
    model.load()
    inputs = tiny._inputs(tiny._loaded[1], mixed)
    expected = _logits(reference, inputs)
    torch.testing.assert_close(_logits(model._loaded[0], inputs), expected, atol=1e-3, rtol=1e-4)
    assert (_logits(tiny._loaded[0], inputs) - expected).abs().max() > 0.1
    assert model.fingerprint["adapter"] != tiny.fingerprint["adapter"]


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path):
    for step in (9, 10):
        _adapter(tmp_path / f"checkpoint-{step}")
    assert _tiny(adapter=str(tmp_path))._adapter_folder.name == "checkpoint-10"


def test_an_adapter_for_another_model_is_refused(tmp_path):
    _adapter(tmp_path, names=lambda name: name.replace("layers.1.", "layers.7."))
    with pytest.raises(WrongWeights, match=r"layers\.7"):
        _tiny(adapter=str(tmp_path)).load()


def test_an_incomplete_adapter_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _adapter(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state.pop(next(name for name in state if "lora_B" in name))
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WrongWeights, match="1 missing"):
        _tiny(adapter=str(tmp_path)).load()


# ---------------------------------------------------------------------------------------------------------------------
# mistakes, identity


def test_missing_weights_are_named_at_construction(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFound, match=r"nobody/no-such-model.*coz\.prepare"):
        VisionLanguageModel(weights="nobody/no-such-model", **CPU)
    with pytest.raises(WeightsNotFound, match="adapter"):
        _tiny(adapter=str(tmp_path))


def test_the_original_internvl_layout_is_named_or_handed_to_its_loader(tiny, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WrongWeights, match="critic=internvl"):
        VisionLanguageModel(weights=str(tmp_path), **CPU)
    asked = []

    def loader(**settings):
        asked.append(settings)
        return tiny._loaded

    model = VisionLanguageModel(weights=str(tmp_path), loader=loader, **CPU)
    model.load()
    assert asked == [{"folder": tmp_path, "dtype": torch.float32, "device": torch.device("cpu")}]
    assert model._loaded[1] is tiny._loaded[1]


def test_quantization_needs_its_package_and_a_checkpoint(monkeypatch, folder):
    with pytest.raises(UserError, match="weights=random"):
        _tiny(quantization="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes"):
        VisionLanguageModel(weights=str(folder), quantization="int8", **CPU)


@pytest.mark.parametrize("settings", [{"size": "huge"}, {"quantization": "int3"}, {"offload": "disk"}, {"batch_size": 0}])
def test_wrong_settings_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        _tiny(**settings)


def test_a_model_travels_without_its_weights(tiny, mixed):
    copy = pickle.loads(pickle.dumps(tiny))
    assert not copy.loaded
    assert len(pickle.dumps(tiny)) < 10_000
    assert copy.answer(mixed[:1], sampling=SHORT) == tiny.answer(mixed[:1], sampling=SHORT)


def test_a_held_model_answers_as_itself(tiny, mixed):
    held = VisionLanguageModel.holding(*tiny._loaded, identity={"weights": "converted"})
    assert held.answer(mixed, sampling=SHORT) == tiny.answer(mixed, sampling=SHORT)
    assert held.fingerprint == {"weights": "converted"}
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(held)


def test_fingerprints_tell_models_apart(folder):
    prints = [_tiny().fingerprint, _tiny(seed=1).fingerprint, VisionLanguageModel(weights=str(folder), **CPU).fingerprint]
    assert len({json.dumps(dict(f), sort_keys=True) for f in prints}) == 3


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantization_takes_the_language_model_and_leaves_the_eyes(tiny, folder, mixed, quantization):
    pytest.importorskip("bitsandbytes")
    model = VisionLanguageModel(weights=str(folder), quantization=quantization, device="cpu", precision="fp32")
    shares, _ = model.rate(mixed)
    reference, _ = tiny.rate(mixed)
    assert ((shares - reference) @ torch.arange(101.0)).abs().max() < 10  # of 100; random weights are the worst case
    inner = model._loaded[0]
    linear = {name: type(module).__name__ for name, module in inner.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all((kind == "Linear") == ("visual" in name or "lm_head" in name) for name, kind in linear.items())

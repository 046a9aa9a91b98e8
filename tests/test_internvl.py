"""InternVL2.5: the tokenizer rebuilt from SentencePiece, the converter, batches of picture pairs, random models, mistakes."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.models import internvl
from coz.models.internvl_chat import CONTEXT, PLACE, OriginalProcessor, best_grid, chat_text, cut_tiles
from coz.models.internvl_tokenizer import random_tokenizer, read_tokenizer

QUESTION = f"First Image: {PLACE}\nSecond Image: {PLACE}\nDescription: {{}}\nRating (0-100):"
BEHIND = ["<quad>", "</quad>", "<box>"]  # added behind the last piece, as InternVL does
RENAMED = ["<|plugin|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", CONTEXT]  # take the ids of pieces kept free
SENTENCES = [
    "The second image is a zoom-in of the first image. Please rate the quality of the following description.",
    "Output only a single score between 0 and 100. A close-up of brown fur with fine strands and soft shadows.",
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    "system user assistant First Image Second Image Rating Description",
]
TEXTS = [
    "The second image",
    "  two  spaces, a tab\tand a\nnew line \n",
    "bytes: ☃ é 𝄞 ﬁ",
    " leading and trailing ",
    "▁under the line ▁▁",
    "",
    "<|im_start|>user\nFirst Image: <img><IMG_CONTEXT><IMG_CONTEXT></img>\nRate it.<|im_end|>\n<|im_start|>assistant\n",
    "a<box>b</quad> c <quad> [UNUSED_9]d",
    "85 100 0.5",
]


def _train(*, dummy_prefix, kept_whole):
    """A SentencePiece model with pieces kept free for added tokens, as InternLM2's has."""
    import sentencepiece

    free = [f"[UNUSED_{i}]" for i in range(len(RENAMED))]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=free + (["[UNUSED_9]"] if kept_whole else []),
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue(), free


def _write_tokenizer(folder, *, dummy_prefix=True, kept_whole=True):
    import sentencepiece

    model, free = _train(dummy_prefix=dummy_prefix, kept_whole=kept_whole)
    (folder / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    added = {pieces.piece_to_id(piece): token for piece, token in zip(free, RENAMED, strict=True)}
    added |= {i: pieces.id_to_piece(i) for i in range(3)}
    added |= {pieces.get_piece_size() + i: token for i, token in enumerate(BEHIND)}
    entries = {str(index): {"content": token, "special": True} for index, token in sorted(added.items())}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    return pieces, added


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in the original layout, tokenizer and all, with random tensors of the right names."""
    folder = tmp_path_factory.mktemp("original")
    pieces, _ = _write_tokenizer(folder)
    width, vocabulary = 32, pieces.get_piece_size() + len(BEHIND)
    language = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
    full = internvl.FULL_CONFIG
    config = full | {"force_image_size": 56, "max_dynamic_patch": 4}
    config |= {"llm_config": full["llm_config"] | language, "vision_config": full["vision_config"] | vision}
    (folder / "config.json").write_text(json.dumps(config))
    layer, block = "language_model.model.layers.0.", "vision_model.encoder.layers.0."
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, 16),
        "vision_model.embeddings.position_embedding": (1, 17, 16),
        "vision_model.embeddings.patch_embedding.weight": (16, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (16,),
        **{f"{block}{name}": (16,) for name in ("ls1", "ls2", "attn.proj.bias", "mlp.fc2.bias")},
        **{f"{block}norm{i}.{part}": (16,) for i in (1, 2) for part in ("weight", "bias")},
        f"{block}attn.qkv.weight": (48, 16),
        f"{block}attn.qkv.bias": (48,),
        f"{block}attn.proj.weight": (16, 16),
        f"{block}mlp.fc1.weight": (24, 16),
        f"{block}mlp.fc1.bias": (24,),
        f"{block}mlp.fc2.weight": (16, 24),
        "mlp1.0.weight": (64,),
        "mlp1.0.bias": (64,),
        "mlp1.1.weight": (width, 64),
        "mlp1.1.bias": (width,),
        "mlp1.3.weight": (width, width),
        "mlp1.3.bias": (width,),
        "language_model.model.tok_embeddings.weight": (vocabulary, width),
        "language_model.model.norm.weight": (width,),
        "language_model.output.weight": (vocabulary, width),
        f"{layer}attention.wqkv.weight": (64, width),
        f"{layer}attention.wo.weight": (width, width),
        f"{layer}attention_norm.weight": (width,),
        f"{layer}ffn_norm.weight": (width,),
        f"{layer}feed_forward.w1.weight": (48, width),
        f"{layer}feed_forward.w3.weight": (48, width),
        f"{layer}feed_forward.w2.weight": (width, 48),
    }
    draw = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    return folder


def _pictures(*sizes):
    return [Image.effect_noise(size, 60 + 10 * i).convert("RGB") for i, size in enumerate(sizes)]


def _chunk_by_chunk(text, pieces, added):
    """What the checkpoint's own slow tokenizer does: `<s>`, then SentencePiece between added tokens."""
    by_token = {token: index for index, token in added.items()}
    pattern = "(" + "|".join(re.escape(token) for token in sorted(by_token, key=len, reverse=True)) + ")"
    ids = [pieces.bos_id()]
    for chunk in re.split(pattern, text):
        ids += [by_token[chunk]] if chunk in by_token else pieces.encode(chunk)
    return ids


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("kept_whole", [True, False])
def test_tokenizer_gives_sentencepiece_ids_between_added_tokens(tmp_path, dummy_prefix, kept_whole):
    pieces, added = _write_tokenizer(tmp_path, dummy_prefix=dummy_prefix, kept_whole=kept_whole)
    tokenizer = read_tokenizer(tmp_path)
    for index, token in added.items():
        assert tokenizer.convert_tokens_to_ids(token) == index
    assert len(tokenizer) == pieces.get_piece_size() + len(BEHIND)
    for text in [*TEXTS, *SENTENCES]:
        assert tokenizer(text)["input_ids"] == _chunk_by_chunk(text, pieces, added), text
    for text in SENTENCES:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_without_its_tokens_or_with_a_wrong_id_is_refused(tmp_path):
    _, added = _write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    entries = {str(i): {"content": token} for i, token in added.items()}
    entries[str(max(added) + 5)] = {"content": "<far>"}
    config.write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(WrongWeights, match=r"<far> would have id \d+ instead of"):
        read_tokenizer(tmp_path)
    config.write_text("{}")
    with pytest.raises(WrongWeights, match=r"lack .*<img>"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(WrongWeights, match="no SentencePiece model"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(WeightsNotFound, match=r"tokenizer\.model.* does not exist"):
        read_tokenizer(tmp_path)


@torch.inference_mode()
def test_converted_folder_is_read_by_transformers_and_says_the_same(original, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    target = tmp_path / "native"
    assert internvl.main([str(original), str(target)]) == 0
    model, processor = internvl.load_original(folder=original, dtype=torch.float32, device="cpu")
    native = AutoModelForImageTextToText.from_pretrained(target, local_files_only=True)
    native_processor = AutoProcessor.from_pretrained(target, local_files_only=True)
    assert native.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {n: t.shape for n, t in native.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}

    pair = _pictures((56, 56), (130, 60))
    parts = [{"type": "image"}, {"type": "text", "text": "\nand "}, {"type": "image"}, {"type": "text", "text": "\nRate it."}]
    messages = [{"role": "user", "content": parts}]
    ours = processor(images=[pair], text=[processor.apply_chat_template(messages)])
    text = native_processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = native_processor(images=[pair], text=[text], return_tensors="pt")
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    assert (theirs["pixel_values"] - ours["pixel_values"]).abs().max() < 0.05
    torch.testing.assert_close(native(**ours).logits, model(**ours).logits, rtol=0, atol=1e-6)


def test_a_target_that_holds_something_is_left_alone(original, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert internvl.main([str(original), str(tmp_path)]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_folders_of_another_kind_are_refused(original, tmp_path):
    def with_config(change):
        config = json.loads((original / "config.json").read_text())
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return internvl.read_config(tmp_path)

    with pytest.raises(WrongWeights, match="model_type=internvl, which is not"):
        with_config(lambda c: c.update(model_type="internvl"))
    with pytest.raises(WrongWeights, match="Qwen2ForCausalLM is not converted"):
        with_config(lambda c: c["llm_config"].update(architectures=["Qwen2ForCausalLM"]))
    with pytest.raises(WrongWeights, match="vision tower is the 6B one"):
        with_config(lambda c: c["vision_config"].update(qk_normalization=True))
    assert issubclass(WrongWeights, UserError)


@torch.inference_mode()
def test_batches_of_pairs_are_padded_left_and_equal_single_ones():
    model, processor = internvl.random_internvl(size="tiny", seed=0, dtype=torch.float32, device="cpu")
    rows = [_pictures((56, 56), (200, 60)), _pictures((30, 80), (56, 56)), _pictures((512, 512), (56, 56))]
    questions = [QUESTION.format(words) for words in ("fur", "a wall of old red bricks", f"an {PLACE} of moss")]
    together = processor.ask(rows, questions)
    mask = together["attention_mask"]
    assert mask[:, -1].all()
    assert (mask.diff(dim=1) >= 0).all()
    assert not mask.all()
    tiles = [sum(len(cut_tiles(picture, tile_px=56)) for picture in row) for row in rows]
    assert len(together["pixel_values"]) == sum(tiles)
    contexts = (together["input_ids"] == processor.tokenizer.convert_tokens_to_ids(CONTEXT)).sum(1)
    assert contexts.tolist() == [count * processor.tokens_per_tile for count in tiles]

    batch = model.generate(**together, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(batch.logits, 1)
    for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
        single = processor.ask([row], [question])
        answer = model.generate(**single, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(logits[i, : len(answer.logits)], torch.stack(answer.logits, 1)[0], rtol=0, atol=1e-4)
    swapped = model(**processor.ask([rows[0][::-1]], [questions[0]])).logits[0, -1]
    assert (swapped - logits[0, 0]).abs().max() > 1e-2


def test_messages_become_the_official_text():
    processor = OriginalProcessor(tokenizer=random_tokenizer(), tile_px=56, tokens_per_tile=4)
    content = [{"type": "text", "text": "A: "}, {"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    assert text == chat_text([("user", f"A: {PLACE}\nWhat?")])
    own = processor.apply_chat_template([{"role": "system", "content": "Be short."}, {"role": "user", "content": content}])
    assert own.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nA: ")
    closed = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=False)
    assert text == closed + "<|im_start|>assistant\n"
    ids = processor(images=[_pictures((56, 56))], text=[text])["input_ids"][0]
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(ids[1:]).count(CONTEXT) == 4
    with pytest.raises(ValueError, match="2 pictures but 1 places"):
        processor(images=[_pictures((9, 9), (9, 9))], text=[text])


def test_states_of_the_chain_are_one_tile_and_other_pictures_more():
    assert best_grid(512, 512, tile_px=448) == (1, 1)
    assert best_grid(2000, 1000, tile_px=448) == (4, 2)
    assert best_grid(1, 900, tile_px=448) == (1, 12)
    assert len(cut_tiles(Image.new("L", (2000, 1000)), tile_px=28)) == 9


def test_random_models_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (
        internvl.random_internvl(size="tiny", seed=seed, dtype=torch.float32, device="cpu")[0].lm_head.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

"""Tokenizers for random models behave as the real ones where it matters: padding, special ids, length."""

from __future__ import annotations

import pytest

from coz.models.random_tokenizers import CLIP_PAD_SD2, CLIP_PAD_SD3, clip_tokenizer, t5_tokenizer

TEXT = "A red brick wall, near the river: é!"


@pytest.mark.parametrize("pad_token", [CLIP_PAD_SD2, CLIP_PAD_SD3])
def test_clip_pads_to_77_and_ends_with_the_highest_id(pad_token):
    tokenizer = clip_tokenizer(pad_token=pad_token)
    ids = tokenizer([TEXT, ""], padding="max_length", max_length=77, truncation=True).input_ids
    end = len(tokenizer) - 1
    pad = 0 if pad_token == CLIP_PAD_SD2 else end
    assert [len(row) for row in ids] == [77, 77]
    assert ids[1] == [end - 1, end] + [pad] * 75
    assert ids[0][0] == end - 1
    assert ids[0].index(end) > 10
    assert max(map(max, ids)) == end


def test_clip_knows_words_and_bytes():
    tokenizer = clip_tokenizer(pad_token=CLIP_PAD_SD3)
    assert tokenizer.tokenize("brick wall") == ["brick</w>", "wall</w>"]
    assert tokenizer.unk_token_id not in tokenizer("日本", add_special_tokens=False).input_ids
    assert tokenizer("a red wall").input_ids != tokenizer("a red tree").input_ids


def test_clip_cuts_long_texts():
    ids = clip_tokenizer(pad_token=CLIP_PAD_SD2)("wall " * 200, truncation=True, max_length=77).input_ids
    assert len(ids) == 77
    assert ids[-1] == max(ids)


def test_t5_pads_with_zero_and_ends_with_one():
    tokenizer = t5_tokenizer()
    ids = tokenizer([TEXT, ""], padding="max_length", max_length=512, truncation=True).input_ids
    assert [len(row) for row in ids] == [512, 512]
    assert ids[1] == [1] + [0] * 511
    assert 1 in ids[0]
    assert len(set(ids[0])) > 8
    assert len(tokenizer("wall " * 900, truncation=True, max_length=512).input_ids) == 512

"""Tokenizers for randomly initialised models, built in code: no file, no hub.

They have the form of the real ones (byte-level BPE of CLIP, Unigram of T5) and a vocabulary of characters and a few
hundred common English words, so that prompts of ordinary length give token counts of the usual order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

CLIP_PAD_SD2 = "!"
"""Pad token of Stable Diffusion 2.x and of SD3's second tokenizer (id 0)."""
CLIP_PAD_SD3 = "<|endoftext|>"
"""Pad token of SD3's first tokenizer."""

_WORDS = """
a an and are as at background behind between black blue bright brick brown building by car cat clear close cloud cloudy
color dark day detail detailed dog door down face field flower flowers from garden gold grass gray green ground hair hand
head high house image in inside is it landscape large leaf leaves left light lines long macro man metal moss mountain near
night of old on orange outside over painting paper pattern people person photo picture pink plant purple quality red right
river road rock room rough round sand scene sea sharp showing shows side sign sky small smooth snow soft stone street
structure sun surface table tall texture that the their this top tower tree trees two under up view wall water weathered
white wild window with woman wood wooden yellow
"""


def clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer of about 1,000 tokens, 77 long, whose end-of-text token has the highest id (as CLIP's has).

    Args:
        pad_token: `CLIP_PAD_SD2` ("!", id 0) or `CLIP_PAD_SD3` (the end-of-text token).
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())  # "!" comes first, as in CLIP's own vocabulary
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            merges[left, right] = None
            left += right
    tokens = dict.fromkeys([*characters, *(f"{c}</w>" for c in characters), *(a + b for a, b in merges)])
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of a few hundred tokens: pad is 0, end of sequence 1, unknown 2; one sequence holds up to 512."""
    from transformers import T5Tokenizer

    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -6.0) for word in _WORDS.split()]
    pieces += [(character, -8.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)

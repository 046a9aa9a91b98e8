"""A Qwen2.5-VL with random weights, and a processor for it, made from nothing: no file, no hub.

Qwen's vocabulary cannot be had without its files, so the tokenizer here is a byte-level one with Qwen's rules and special
tokens over a small vocabulary; digits stay single tokens, as in Qwen's. Its chat template writes what Qwen2.5-VL's own
writes for the messages of this package (a test compares them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2TokenizerFast

Size = Literal["full", "tiny"]

SPECIAL_TOKENS = (  # in the order of Qwen's ids from 151643 on
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORDS = """
The second image is a zoom in of first Based on this knowledge what Give me set words What Please rate quality
following description how well it describes Output only single score between and Description Rating First Second Image
system user assistant You are helpful cat dog stone leaf fur bark water sky window brick texture metal wood grass
feather sand snow glass rust moss petal shell cloth skin scale eye wing tile road sign
""".split()  # noqa: SIM905  (a list of this many would be unreadable)
_CHAT_TEMPLATE = (  # ChatML: every message between <|im_start|> and <|im_end|>, a default system message where none leads
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def random_vlm(
    *, size: Size, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Qwen2_5_VLProcessor]:
    """A model with seeded random weights on `device`, and its processor. The global generators are left as they were."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    processor = random_processor(size=size)
    config = random_config(size=size, tokenizer=processor.tokenizer)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):  # the full size takes minutes to draw on a CPU and seconds on a GPU
            model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    to_id = processor.tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = [to_id("<|im_end|>"), to_id("<|endoftext|>")]
    model.generation_config.pad_token_id = to_id("<|endoftext|>")
    return model.eval(), processor


def random_config(*, size: Size, tokenizer: Qwen2TokenizerFast) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B-Instruct's architecture, or a very small one of the same parts."""
    from transformers import Qwen2_5_VLConfig

    text: dict[str, Any]
    vision: dict[str, Any]
    to_id = tokenizer.convert_tokens_to_ids
    ids = {"bos_token_id": to_id("<|endoftext|>"), "eos_token_id": to_id("<|im_end|>"), "pad_token_id": to_id("<|endoftext|>")}
    if size == "full":
        text = {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        }
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
        vision |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
        tied, spread = True, 0.02
    else:
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        }
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"window_size": 112, "fullatt_block_indexes": [1]}
        tied, spread = False, 0.25  # wide enough that the pictures reach the answer
    text |= ids | {"rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "initializer_range": spread}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": spread}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=to_id("<|image_pad|>"),
        video_token_id=to_id("<|video_pad|>"),
        vision_start_token_id=to_id("<|vision_start|>"),
        vision_end_token_id=to_id("<|vision_end|>"),
        tie_word_embeddings=tied,
        initializer_range=spread,
    )


def random_processor(*, size: Size) -> Qwen2_5_VLProcessor:
    """The processor of a random model; the tiny one looks at pictures in 84 x 84 px at most, which is 9 tokens."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    longest = 84 * 84 if size == "tiny" else 12_845_056  # the latter is Qwen2.5-VL's own
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": longest}),
        tokenizer=random_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_CHAT_TEMPLATE,
    )


def random_tokenizer() -> Qwen2TokenizerFast:
    """A byte-level BPE with Qwen's splitting rules and special tokens over a few English words."""
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for spelled in ("Ġ" + word for word in _WORDS):  # Ġ is how the byte alphabet writes a space
        for end in range(1, len(spelled)):
            if spelled[: end + 1] not in vocab:
                vocab[spelled[: end + 1]] = len(vocab)
                merges.append((spelled[:end], spelled[end]))
    tokenizer = Qwen2TokenizerFast(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer

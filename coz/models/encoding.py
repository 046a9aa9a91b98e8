"""From chat messages and pictures to a model's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from coz.models.chat import ChatRequest


class ChatProcessor(Protocol):
    """What is needed of a processor: transformers' have it, a hand-made one must."""

    tokenizer: Any

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **settings: object) -> str:
        """Messages → text with image tokens; called with `tokenize=False, add_generation_prompt=True`."""
        ...

    def __call__(self, *, images: list[list[Image.Image]], text: list[str], **settings: object) -> Mapping[str, Tensor]:
        """Texts and their pictures → the model's tensors; called with `padding=True, return_tensors="pt"`."""
        ...


def render(processor: ChatProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that the model's chat template makes of the messages, up to where the answer begins.

    Some templates (InternVL's) break the line after every picture. Where the message breaks it there too, one break is
    left, so that the model reads the question as it was written.
    """
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    place = getattr(processor, "image_token", None)
    for message in messages:
        for part in message["content"] if place else ():
            if part["type"] == "text" and part["text"].startswith("\n"):
                text = text.replace(f"{place}\n{part['text']}", f"{place}{part['text']}")
    return text


def encode(processor: ChatProcessor, requests: Sequence[ChatRequest]) -> dict[str, Tensor]:
    """The model's tensors for a batch, left-padded."""
    processor.tokenizer.padding_side = "left"
    texts = [render(processor, request.messages) for request in requests]
    images = [list(request.images) for request in requests]
    begin = getattr(processor.tokenizer, "bos_token", None)
    begun = begin is not None and texts[0].startswith(begin)  # the template wrote it: not once more
    settings = {"add_special_tokens": False} if begun else {}
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt", **settings))


def number_tokens(
    processor: ChatProcessor, messages: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> list[tuple[int, ...]]:
    """Token ids of numbers where an answer begins: behind the words that open it, since some tokenizers mark a word's start."""
    tokenizer = processor.tokenizer
    whole = render(processor, messages)
    closed = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    opening = whole[len(closed) :] if whole.startswith(closed) else ""
    before = tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else []
    tokens = []
    for number in numbers:
        ids = tokenizer(opening + str(number), add_special_tokens=False)["input_ids"]
        clean = ids[: len(before)] == before
        tokens.append(tuple(ids[len(before) :] if clean else tokenizer(str(number), add_special_tokens=False)["input_ids"]))
    return tokens


def without_special_tokens(processor: ChatProcessor, text: str) -> str:
    """A text without anything that the tokenizer would take for a special token, such as the place of a picture."""
    tokenizer = processor.tokenizer
    known = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
    special = sorted((token for token in known if token.strip()), key=len, reverse=True)
    before = None
    while before != text:  # what is left when one is taken out may be another
        before = text
        for token in special:
            text = text.replace(token, "")
    return text

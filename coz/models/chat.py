"""What is asked of a vision-language model: the questions, and how they become chat messages.

Inference and GRPO both take their messages from `chat_messages`, so that a model is never asked in another form than the
one it was trained with. Messages hold no pictures, only their places (`{"type": "image"}`); a `ChatRequest` carries the
pictures beside them, in the order of the places. Every content is a list of parts, never a bare string: chat templates
render both alike, and a column of a dataset can hold only one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor

from coz.errors import UserError
from coz.image import to_pil

Context = Literal["pair", "single"]
Layout = Literal["system", "user"]
Part = dict[str, str]
Message = dict[str, object]

PAIR_QUESTION = (  # appendix B.2
    "The second image is a zoom-in of the first image. Based on this knowledge, what is in the second image? "
    "Give me a set of words."
)
SINGLE_QUESTION = "What is in this image? Give me a set of words."  # the released code's, for one image
CRITIC_QUESTION = (  # appendix B.2; {description} is what the prompt extractor said
    "First Image: <image>\n"
    "Second Image: <image>\n"
    "The second image is a zoom-in of the first image. Please rate the quality of the following description on how well "
    "it describes the second image. Output only a single score between 0 and 100.\n"
    "Description: {description}\n"
    "Rating (0-100):"
)
IMAGE_PLACE = "<image>"


@dataclass(frozen=True)
class ChatRequest:
    """One question with its pictures, in the order in which the messages have their places."""

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image.Image]


def question_for(context: Context) -> str:
    """The paper's question for a pair of scales, or the released code's for one image."""
    return PAIR_QUESTION if context == "pair" else SINGLE_QUESTION


def chat_messages(*, context: Context = "pair", layout: Layout = "system", question: str | None = None) -> list[Message]:
    """The messages that ask a model for a prompt.

    Args:
        context: `pair` shows the previous state and the view inside it, in this order; `single` the view alone.
        layout: `system` as the released code has it (the question is the system message, the images alone are the user's);
            `user` as the paper's text has it (images, then the question, all the user's).
        question: None for the paper's own.

    Raises:
        UserError: an unknown context or layout.
    """
    check_choice("context", context, Context)
    check_choice("layout", layout, Layout)
    text: Part = {"type": "text", "text": question_for(context) if question is None else question}
    places: list[Part] = [{"type": "image"} for _ in range(2 if context == "pair" else 1)]
    if layout == "system":
        return [{"role": "system", "content": [text]}, {"role": "user", "content": places}]
    return [{"role": "user", "content": [*places, text]}]


def critic_messages(description: str, *, question: str = CRITIC_QUESTION) -> list[Message]:
    """The message that asks a critic to rate a description of the second of two images (appendix B.2).

    `<image>` in the question marks a picture's place; one inside the description stays plain text.
    """
    parts: list[Part] = []
    for i, piece in enumerate(question.split(IMAGE_PLACE)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece.replace("{description}", description)})
    return [{"role": "user", "content": parts}]


def chat_requests(
    current: Tensor, context: Tensor | None, *, pair: bool, messages: Sequence[Mapping[str, object]]
) -> list[ChatRequest]:
    """One request per image: (B, 3, S, S) views, and the states that hold them, as 8-bit images.

    Raises:
        UserError: a pair is asked for and there is no context.
    """
    views = to_pil(current)
    if not pair:
        return [ChatRequest(messages, [view]) for view in views]
    if context is None:
        raise UserError("context=pair needs the previous state and there is none here; use prompter.context=single")
    if context.shape[0] != current.shape[0]:
        raise ValueError(f"{current.shape[0]} views but {context.shape[0]} contexts; give one each")
    return [ChatRequest(messages, [state, view]) for state, view in zip(to_pil(context), views, strict=True)]


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise a `UserError` if `value` is none of a `Literal`'s values."""
    allowed = get_args(choices)
    if value not in allowed:
        raise UserError(f"{name}={value} is unknown; use {' or '.join(map(str, allowed))}")

"""What is asked of a model, word for word."""

from __future__ import annotations

import importlib.resources
import json

import pytest
import torch

from coz.errors import UserError
from coz.models.chat import chat_messages, chat_requests, critic_messages
from coz.models.encoding import render, without_special_tokens
from coz.models.random_vlm import random_processor

PAIR = (
    "The second image is a zoom-in of the first image. Based on this knowledge, what is in the second image? "
    "Give me a set of words."
)
SINGLE = "What is in this image? Give me a set of words."
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def qwen():
    """The small processor with Qwen2.5-VL's own template, which TRL ships."""
    folder = importlib.resources.files(pytest.importorskip("trl")) / "chat_templates"
    processor = random_processor(size="tiny")
    processor.chat_template = (folder / "qwen2_5_vl.jinja").read_text()
    return processor


def _system(question, pictures):
    return (
        f"<|im_start|>system\n{question}<|im_end|>\n<|im_start|>user\n{PICTURE * pictures}<|im_end|>\n<|im_start|>assistant\n"
    )


def _user(question, pictures):
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{PICTURE * pictures}{question}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("layout", "context", "expected"),
    [
        ("system", "pair", _system(PAIR, 2)),
        ("system", "single", _system(SINGLE, 1)),
        ("user", "pair", _user(PAIR, 2)),
        ("user", "single", _user(SINGLE, 1)),
    ],
)
def test_rendered_text_is_what_the_release_and_the_paper_send(qwen, layout, context, expected):
    messages = chat_messages(context=context, layout=layout)
    assert render(qwen, messages) == expected
    assert render(random_processor(size="tiny"), messages) == expected  # our own template, which needs no TRL


def test_messages_equal_those_recorded_from_the_released_code(qwen, parity):
    runs = json.loads((parity("osediff_sd3") / "chain" / "chain.json").read_text())["runs"]
    recorded = [message for run in runs.values() for message in run["vlm_messages"]]
    assert recorded
    for record in recorded:
        pictures = sum(part["type"] == "image" for part in record["messages"][1]["content"])
        released = qwen.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
        assert render(qwen, chat_messages(context="pair" if pictures == 2 else "single")) == released


def test_critic_text_is_the_papers(qwen):
    text = render(qwen, critic_messages("fur, <image> and {description}"))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"First Image: {PICTURE}\nSecond Image: {PICTURE}\n"
        "The second image is a zoom-in of the first image. Please rate the quality of the following description on how well "
        "it describes the second image. Output only a single score between 0 and 100.\n"
        "Description: fur, <image> and {description}\nRating (0-100):<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_breaks_lines_after_pictures_leaves_the_critics_question_as_written():
    class Internvl:
        image_token = "<IMG_CONTEXT>"

        def apply_chat_template(self, messages, **_):
            parts = (p for message in messages for p in message["content"])
            return "".join("<IMG_CONTEXT>\n" if part["type"] == "image" else part["text"] for part in parts)

    text = render(Internvl(), critic_messages("fur"))
    assert text.startswith("First Image: <IMG_CONTEXT>\nSecond Image: <IMG_CONTEXT>\nThe second image is")


def test_messages_serialize_into_one_column_type():
    for layout in ("system", "user"):
        for message in chat_messages(layout=layout):
            assert isinstance(message["content"], list)
            assert "image" not in message["content"][0]
    json.dumps(chat_messages())


def test_pictures_go_with_their_places_in_order():
    current, context = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    (request, _) = chat_requests(current, context, pair=True, messages=chat_messages())
    assert [image.getpixel((0, 0)) for image in request.images] == [(255, 255, 255), (0, 0, 0)]
    (request, _) = chat_requests(current, context, pair=False, messages=chat_messages(context="single"))
    assert [image.getpixel((0, 0)) for image in request.images] == [(0, 0, 0)]
    with pytest.raises(UserError, match="context=single"):
        chat_requests(current, None, pair=True, messages=chat_messages())


@pytest.mark.parametrize("settings", [{"layout": "sytem"}, {"context": "double"}])
def test_unknown_choices_are_named(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings.values()))} is unknown"):
        chat_messages(**settings)


def test_special_tokens_leave_a_text_even_when_nested():
    processor = random_processor(size="tiny")
    assert without_special_tokens(processor, "fur<|image_pad|>, <|im_<|im_end|>end|>bark") == "fur, bark"


def test_tokenizer_of_the_random_model_reads_and_writes_any_text():
    tokenizer = random_processor(size="tiny").tokenizer
    for text in (PAIR, "naïve café, 毛皮 🦊 85/100\n- fur", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("100") == ["1", "0", "0"]  # as Qwen's
    assert len(tokenizer.tokenize("<|image_pad|>")) == 1

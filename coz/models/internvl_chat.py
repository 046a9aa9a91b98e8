"""What InternVL2.5 is shown and asked: tiles of the pictures, the chat text around them, and the tensors made of both.

Equal to the official `load_image` and `chat`: tiles to the last bit (with the same Pillow), text to the last character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLACE = "<image>"  # in a question; becomes IMAGE_START, CONTEXT per token, IMAGE_END
IMAGE_START, CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SYSTEM_MESSAGE = (  # of the template `internvl2_5`
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)

# ---------------------------------------------------------------------------------------------------------------------
# tiles


def best_grid(width: int, height: int, *, tile_px: int, min_tiles: int = 1, max_tiles: int = 12) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is closest to the picture's.

    Of equally close ones a larger grid wins if the picture has more than half its pixels.
    """
    # A set, since the official code's is one: grids of one size keep the order in which a set yields them.
    grids = {
        (columns, rows)
        for most in range(min_tiles, max_tiles + 1)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    best, closest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_px * tile_px * columns * rows
        if distance < closest or (distance == closest and large_enough):
            best, closest = (columns, rows), distance
    return best


def tile_boxes(grid: tuple[int, int], tile_px: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each tile in the stretched picture, row by row."""
    columns, rows = grid
    corners = [(column * tile_px, row * tile_px) for row in range(rows) for column in range(columns)]
    return [(left, top, left + tile_px, top + tile_px) for left, top in corners]


def cut_tiles(
    image: Image.Image, *, tile_px: int = 448, min_tiles: int = 1, max_tiles: int = 12, thumbnail: bool = True
) -> list[Image.Image]:
    """Stretch a picture to its best grid and cut it; the whole picture follows as a thumbnail unless there is one tile."""
    image = image.convert("RGB")
    grid = best_grid(*image.size, tile_px=tile_px, min_tiles=min_tiles, max_tiles=max_tiles)
    stretched = image.resize((grid[0] * tile_px, grid[1] * tile_px), Image.Resampling.BICUBIC)
    tiles = [stretched.crop(box) for box in tile_boxes(grid, tile_px)]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC))
    return tiles


def normalize(tiles: Sequence[Image.Image]) -> Tensor:
    """Tiles → (N, 3, tile_px, tile_px), float32."""
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# text


def chat_text(turns: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> str:
    """(role, text) turns → the text that the tokenizer gets (which puts `<s>` in front).

    The template's own system message leads unless the first turn is a system's.
    """
    turns = list(turns)
    if not turns or turns[0][0] != "system":
        turns.insert(0, ("system", SYSTEM_MESSAGE))
    text = "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns)
    return text + (f"{TURN_START}assistant\n" if add_generation_prompt else "")


def with_place(question: str) -> str:
    """A first question about pictures that says nowhere where they belong: in front."""
    return question if PLACE in question else f"{PLACE}\n{question}"


def expand_places(text: str, tile_counts: Sequence[int], *, tokens_per_tile: int) -> str:
    """Give the next `<image>` its tokens, one picture after the other; a further `<image>` stays text."""
    for tiles in tile_counts:
        text = text.replace(PLACE, f"{IMAGE_START}{CONTEXT * (tokens_per_tile * tiles)}{IMAGE_END}", 1)
    return text


class OriginalProcessor:
    """Chat messages or questions, with their pictures → the model's tensors, as the official code makes them.

    It has the two calls that `coz.models` needs of a processor. transformers' own InternVLProcessor, which a converted
    folder carries, cuts the same tiles but resizes with torch, up to a few grey levels off.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        tile_px: int = 448,
        tokens_per_tile: int = 256,
        min_tiles: int = 1,
        max_tiles: int = 12,
        thumbnail: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.tile_px, self.tokens_per_tile = tile_px, tokens_per_tile
        self._tiling: dict[str, Any] = {
            "tile_px": tile_px,
            "min_tiles": min_tiles,
            "max_tiles": max_tiles,
            "thumbnail": thumbnail,
        }

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        """Messages, with `{"type": "image"}` parts where pictures go → text with `<image>` in those places."""
        if tokenize:
            raise ValueError("tokenize=True is not offered; call the processor with the text and its pictures")
        turns = [(str(message["role"]), _as_text(message["content"])) for message in messages]
        return chat_text(turns, add_generation_prompt=add_generation_prompt)

    def __call__(
        self,
        *,
        images: Sequence[Sequence[Image.Image]] | None,
        text: Sequence[str],
        padding: bool = True,
        return_tensors: str = "pt",
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """Texts with `<image>` places, and the pictures of each, in order.

        Returns:
            `input_ids` and `attention_mask` (B, T), padded on the left; `pixel_values` (tiles, 3, tile_px, tile_px),
            row by row, where there are pictures.
        """
        images = [[] for _ in text] if images is None else images
        cut = [[cut_tiles(image, **self._tiling) for image in row] for row in images]
        texts = []
        for row, pictures in zip(text, cut, strict=True):
            if row.count(PLACE) < len(pictures):
                raise ValueError(f"{len(pictures)} pictures but {row.count(PLACE)} places for them; write {PLACE} for each")
            texts.append(expand_places(row, [len(tiles) for tiles in pictures], tokens_per_tile=self.tokens_per_tile))
        encoded = self.tokenizer(
            texts,
            padding=padding,
            padding_side="left",
            return_tensors=return_tensors,
            add_special_tokens=add_special_tokens,
        )
        tensors = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        tiles = [tile for row in cut for picture in row for tile in picture]
        return tensors | ({"pixel_values": normalize(tiles)} if tiles else {})

    def ask(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> dict[str, Tensor]:
        """A first question per item about its pictures, `<image>` where each belongs (in front, if it says nowhere)."""
        texts = [
            chat_text([("user", with_place(question) if row else question)])
            for row, question in zip(images, questions, strict=True)
        ]
        return self(images=images, text=texts)


def _as_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(PLACE if part["type"] == "image" else part["text"] for part in content)


NATIVE_TEMPLATE = (  # the same text, for the processor of a converted folder, which expands CONTEXT by itself
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\n" + SYSTEM_MESSAGE + "<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<IMG_CONTEXT>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

"""InternVL2.5, the paper's critic, out of its original checkpoint: `load_original`, and a command that converts it.

    python -m coz.models.internvl OpenGVLab/InternVL2_5-8B outputs/internvl25-8b-native

writes a folder that `from_pretrained` of transformers reads, tokenizer and processor included. The 8B model needs about
17 GB of main memory for it and as much disk.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from coz.checkpoint import WrongWeights, hub_folder
from coz.errors import UserError, exit_code
from coz.models.internvl_chat import CONTEXT, MEAN, NATIVE_TEMPLATE, STD, TURN_END, OriginalProcessor
from coz.models.internvl_tokenizer import random_tokenizer, read_tokenizer
from coz.models.internvl_weights import FULL_CONFIG, load_native, native_config, read_config, tokens_per_tile

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, InternVLProcessor, PreTrainedTokenizerFast

FILES = ("config.json", "*.safetensors", "tokenizer.model", "tokenizer_config.json")


def load_original(
    *, folder: Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[InternVLForConditionalGeneration, OriginalProcessor]:
    """The native model, and a processor that makes tiles and text as the official code does.

    Args:
        folder: a checkpoint in the original layout, with its `tokenizer.model`.

    Raises:
        UserError: files that are missing, of another layout, or that do not fit each other.
    """
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    _check_vocabulary(tokenizer, config)
    model = load_native(folder, image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT), dtype=dtype, device=device)
    _set_generation(model, tokenizer)
    return model, original_processor(tokenizer, config)


def original_processor(tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> OriginalProcessor:
    """The processor for an original `config.json`."""
    return OriginalProcessor(
        tokenizer=tokenizer,
        tile_px=config.get("force_image_size") or config["vision_config"]["image_size"],
        tokens_per_tile=tokens_per_tile(config),
        min_tiles=config.get("min_dynamic_patch", 1),
        max_tiles=config.get("max_dynamic_patch", 12),
        thumbnail=config.get("use_thumbnail", True),
    )


def native_processor(tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> InternVLProcessor:
    """transformers' own processor with the original settings, for a converted folder."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = config.get("force_image_size") or config["vision_config"]["image_size"]
    size = {"height": side, "width": side}
    images = GotOcr2ImageProcessor(
        size=size,
        image_mean=list(MEAN),
        image_std=list(STD),
        crop_to_patches=True,
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=config.get("max_dynamic_patch", 12),
    )
    return InternVLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=tokens_per_tile(config),
        chat_template=NATIVE_TEMPLATE,
    )


def convert(source: Path, target: Path) -> None:
    """Write the native folder of a checkpoint in the original layout.

    Raises:
        UserError: the target holds something already, or the source does not fit.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; give a new folder")
    config, tokenizer = read_config(source), read_tokenizer(source)
    _check_vocabulary(tokenizer, config)
    model = load_native(source, image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT))
    _set_generation(model, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as partial:  # never half a folder
        native_processor(tokenizer, config).save_pretrained(partial)
        model.save_pretrained(partial)
        Path(partial).chmod(0o755)
        Path(partial).rename(target)
        Path(partial).mkdir()  # for the clean-up


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> None:
    embeddings = config["llm_config"]["vocab_size"]
    if len(tokenizer) > embeddings:
        raise WrongWeights(f"the tokenizer has {len(tokenizer)} tokens, the model {embeddings}; use files of one checkpoint")


def _set_generation(model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop where the official `chat` stops, at the end of the turn alone."""
    settings = model.generation_config
    settings.eos_token_id = tokenizer.convert_tokens_to_ids(TURN_END)
    settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id


def random_internvl(
    *, size: Literal["full", "tiny"], seed: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[InternVLForConditionalGeneration, OriginalProcessor]:
    """A model with seeded random weights on `device`, and a processor made in code. Leaves the global generators alone."""
    from transformers import InternVLForConditionalGeneration

    config, tokenizer, device = copy.deepcopy(FULL_CONFIG), random_tokenizer(), torch.device(device)
    if size == "tiny":
        config["force_image_size"] = 56
        config["llm_config"] |= {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config["vision_config"] |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    native = native_config(config, image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:  # the full size takes minutes to draw on a CPU and seconds on a GPU
            model = InternVLForConditionalGeneration._from_config(native, dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # wider than the usual 0.02, under which an answer hardly depends on the pictures
                torch.nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5)
            elif ".lambda_" in name:
                torch.nn.init.ones_(parameter)
    _set_generation(model, tokenizer)
    return model.eval().requires_grad_(False), original_processor(tokenizer, config)


def main(arguments: list[str] | None = None) -> int:
    """The conversion as a command; 2 and one sentence where the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m coz.models.internvl", description=convert.__doc__)
    parser.add_argument("source", help="a folder in the original layout, or a hub id that was fetched before")
    parser.add_argument("target", type=Path, help="a new folder")
    given = parser.parse_args(arguments)
    return exit_code(lambda: convert(hub_folder(given.source, patterns=FILES, what="InternVL2.5", size_gb=16.2), given.target))


if __name__ == "__main__":
    sys.exit(main())

"""InternVL2.5's original checkpoint layout → transformers' own `InternVLForConditionalGeneration`.

The hub's file was written by code that runs on no transformers of today. Its vision tower and projector are the native
ones under other names; its language model, InternLM2, is a Llama whose queries, keys and values are stored interleaved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coz.checkpoint import WeightsNotFound, WrongWeights, compare_keys, load_tensors

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

IMAGE_TOKEN_ID = 92546  # <IMG_CONTEXT> of InternVL2.5-8B, said by the tokenizer alone
FULL_CONFIG: dict[str, Any] = {  # InternVL2.5-8B's config.json, as far as it shapes the model
    "model_type": "internvl_chat",
    "force_image_size": 448,
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "ps_version": "v2",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "vocab_size": 92553,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    },
}

_VISION, _LANGUAGE = r"vision_model\.encoder\.layers\.(\d+)\.", r"language_model\.model\.layers\.(\d+)\."
_TOWER, _LAYER = r"model.vision_tower.encoder.layer.\1.", r"model.language_model.layers.\1."
_RENAMES = (
    (r"vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (_VISION + r"attn\.proj\.", _TOWER + "attention.projection_layer."),
    (_VISION + r"mlp\.(fc[12])\.", _TOWER + r"mlp.\2."),
    (_VISION + r"norm1\.", _TOWER + "layernorm_before."),
    (_VISION + r"norm2\.", _TOWER + "layernorm_after."),
    (_VISION + r"ls([12])$", _TOWER + r"lambda_\2"),
    (r"mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"language_model\.model\.tok_embeddings\.", "model.language_model.embed_tokens."),
    (r"language_model\.model\.norm\.", "model.language_model.norm."),
    (r"language_model\.output\.", "lm_head."),
    (_LANGUAGE + r"attention\.wo\.", _LAYER + "self_attn.o_proj."),
    (_LANGUAGE + r"attention_norm\.", _LAYER + "input_layernorm."),
    (_LANGUAGE + r"ffn_norm\.", _LAYER + "post_attention_layernorm."),
    (_LANGUAGE + r"feed_forward\.w1\.", _LAYER + "mlp.gate_proj."),
    (_LANGUAGE + r"feed_forward\.w2\.", _LAYER + "mlp.down_proj."),
    (_LANGUAGE + r"feed_forward\.w3\.", _LAYER + "mlp.up_proj."),
)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder in the original layout.

    Raises:
        WeightsNotFound: there is none.
        WrongWeights: it is of another layout, or of a variant that this mapping does not know.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsNotFound(f"{file} does not exist; give the folder of an InternVL2.5 checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WrongWeights(f"{file} is no JSON ({error}); fetch it again") from error
    if config.get("model_type") != "internvl_chat":
        raise WrongWeights(
            f"{file} has model_type={config.get('model_type')}, which is not InternVL's original layout; load it as it is"
        )
    language, vision = config["llm_config"]["architectures"][0], config["vision_config"]
    if language != "InternLM2ForCausalLM":
        raise WrongWeights(f"{file}: language model {language} is not converted here; use InternVL2_5-8B or an -hf checkpoint")
    if vision.get("qk_normalization") or vision.get("norm_type", "layer_norm") != "layer_norm":
        raise WrongWeights(f"{file}: the vision tower is the 6B one, not converted here; use InternVL2_5-8B or -hf")
    if config.get("ps_version", "v1") != "v2":
        raise WrongWeights(f"{file}: ps_version={config.get('ps_version')} differs from the native pixel shuffle (v2)")
    return config


def tokens_per_tile(config: Mapping[str, Any]) -> int:
    """Image tokens that one tile becomes."""
    side = _image_px(config) // config["vision_config"]["patch_size"]
    return int(side**2 * config["downsample_ratio"] ** 2)


def _image_px(config: Mapping[str, Any]) -> int:
    return config.get("force_image_size") or config["vision_config"]["image_size"]


def native_config(config: Mapping[str, Any], *, image_token_id: int) -> InternVLConfig:
    """The native configuration of an original `config.json`."""
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig

    language, vision = config["llm_config"], config["vision_config"]
    scaling = language.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(language["rope_theta"])}
    if scaling:
        rope |= {"rope_type": scaling["type"], "factor": float(scaling["factor"])}
    text = LlamaConfig(
        **{
            name: language[name]
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
                "rms_norm_eps",
            )
        },
        rope_parameters=rope,
        attention_bias=language.get("bias", False),
        tie_word_embeddings=False,
        bos_token_id=language.get("bos_token_id", 1),
        eos_token_id=language.get("eos_token_id", 2),
        pad_token_id=language.get("pad_token_id", 2),
    )
    tower = InternVLVisionConfig(
        **{name: vision[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        image_size=_image_px(config),
        patch_size=vision["patch_size"],
        attention_bias=vision["qkv_bias"],
        layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        hidden_act=vision.get("hidden_act", "gelu"),
    )
    return InternVLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=image_token_id,
        image_seq_length=tokens_per_tile(config),
        downsample_ratio=config["downsample_ratio"],
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=False,  # transformers' default would give the head the embeddings' weights
    )


def native_tensors(name: str, tensor: Tensor, config: InternVLConfig) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the original layout → its native name, or its three native parts. Unknown names stay as they are."""
    text = config.text_config
    if match := re.fullmatch(_VISION + r"attn\.qkv\.(weight|bias)", name):
        parts = tensor.chunk(3)
        target = f"model.vision_tower.encoder.layer.{match[1]}.attention.{{}}_proj.{match[2]}"
    elif match := re.fullmatch(_LANGUAGE + r"attention\.wqkv\.(weight|bias)", name):
        # Rows go by key/value head: the queries that share it, then its key, then its value.
        groups = text.num_attention_heads // text.num_key_value_heads
        heads = tensor.unflatten(0, (text.num_key_value_heads, groups + 2, -1))
        parts = [part.flatten(0, 2) for part in (heads[:, :groups], heads[:, groups:-1], heads[:, -1:])]
        target = f"model.language_model.layers.{match[1]}.self_attn.{{}}_proj.{match[2]}"
    else:
        yield _native_name(name), tensor
        return
    yield from ((target.format(letter), part.contiguous()) for letter, part in zip("qkv", parts, strict=True))


def _native_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        renamed, matched = re.subn("^" + pattern, replacement, name)
        if matched:
            return renamed
    return name


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: InternVLConfig, *, what: str) -> None:
    """Compare the names and shapes of an original checkpoint with the native model's, without reading a weight.

    Raises:
        WrongWeights: names the first that differ.
    """
    found = {
        native: tuple(part.shape)
        for name, shape in shapes.items()
        for native, part in native_tensors(name, torch.empty(shape, device="meta"), config)
    }
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    compare_keys(expected, found, what=what)


def empty_model(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """The native model with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights
    from transformers import InternVLForConditionalGeneration

    with init_empty_weights(include_buffers=False):
        return InternVLForConditionalGeneration(config)


def load_native(
    folder: Path, *, image_token_id: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> InternVLForConditionalGeneration:
    """Read a folder in the original layout into the native model, one file after the other, on `device`.

    Args:
        dtype: None keeps the checkpoint's.

    Raises:
        WrongWeights: another layout, or tensors that do not fit.
    """
    config = native_config(read_config(folder), image_token_id=image_token_id)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsNotFound(f"{folder} holds no *.safetensors; fetch the checkpoint again")
    check_shapes(_stored_shapes(files), config, what=str(folder))
    model = empty_model(config)
    for file in files:
        state = load_tensors(file)
        parts = dict(part for name, tensor in state.items() for part in native_tensors(name, tensor, config))
        moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in parts.items()}
        model.load_state_dict(moved, strict=False, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise WrongWeights(f"{path} cannot be read ({error}); it may be cut off, fetch it again") from error
    return shapes

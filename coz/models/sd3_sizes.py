"""Sizes of Stable Diffusion 3 medium for randomly initialised models, as configurations of the library's classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SD3Size:
    """One configuration per component, in the words of diffusers and transformers."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: tuple[dict[str, Any], dict[str, Any]]
    t5: dict[str, Any]


def _transformer(*, n_layers: int, n_heads: int, head_dim: int, context: int, pooled: int) -> dict[str, Any]:
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": n_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": n_heads,
        "joint_attention_dim": context,
        "caption_projection_dim": n_heads * head_dim,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": 192,
    }


def _vae(channels: tuple[int, int, int, int], *, n_groups: int) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": list(channels),
        "layers_per_block": 2,
        "norm_num_groups": n_groups,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _clip(*, width: int, n_layers: int, n_heads: int, act: str, vocabulary: int = 1024) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "hidden_act": act,
        "max_position_embeddings": 77,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,  # as in CLIP's own configs: the pooled token is the one with the highest id
    }


def _t5(*, width: int, hidden: int, n_layers: int, n_heads: int, head_dim: int, vocabulary: int = 512) -> dict[str, Any]:
    return {
        "d_model": width,
        "d_ff": hidden,
        "d_kv": head_dim,
        "num_heads": n_heads,
        "num_layers": n_layers,
        "vocab_size": vocabulary,
        "feed_forward_proj": "gated-gelu",
    }


SIZES = {
    # stabilityai/stable-diffusion-3-medium: 2.028 B + 84 M + 124 M + 695 M + 4.76 B parameters
    "full": SD3Size(
        transformer=_transformer(n_layers=24, n_heads=24, head_dim=64, context=4096, pooled=2048),
        vae=_vae((128, 256, 512, 512), n_groups=32),
        clip=(
            _clip(width=768, n_layers=12, n_heads=12, act="quick_gelu", vocabulary=49408),
            _clip(width=1280, n_layers=32, n_heads=20, act="gelu", vocabulary=49408),
        ),
        t5=_t5(width=4096, hidden=10240, n_layers=24, n_heads=64, head_dim=64, vocabulary=32128),
    ),
    # for benchmarks: at 128 px, the work in transformer, T5, encoder and decoder has the shares of the full size at 512 px
    "mid": SD3Size(
        transformer=_transformer(n_layers=7, n_heads=4, head_dim=64, context=512, pooled=160),
        vae=_vae((32, 64, 128, 128), n_groups=32),
        clip=(
            _clip(width=64, n_layers=4, n_heads=2, act="quick_gelu"),
            _clip(width=96, n_layers=6, n_heads=3, act="gelu"),
        ),
        t5=_t5(width=512, hidden=1280, n_layers=5, n_heads=8, head_dim=64),
    ),
    "tiny": SD3Size(
        transformer=_transformer(n_layers=2, n_heads=2, head_dim=16, context=64, pooled=40),
        vae=_vae((8, 8, 16, 16), n_groups=4),
        clip=(
            _clip(width=16, n_layers=2, n_heads=2, act="quick_gelu"),
            _clip(width=24, n_layers=2, n_heads=2, act="gelu"),
        ),
        t5=_t5(width=64, hidden=96, n_layers=2, n_heads=4, head_dim=16),
    ),
}

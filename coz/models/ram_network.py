"""RAM (Recognize Anything) and its degradation-aware variant DAPE: which of some thousand tags a picture shows.

timm's Swin gives image tokens, a projection of them is what the tagging head looks at, and the head asks one question per
tag by cross-attention. DAPE (SeeSR) is RAM with a LoRA, which is folded into the weights when they are read.
Network and checkpoint format here; the object that tags pictures is `ram.Tagger`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, load_strict

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LORA_ALPHA = 1  # DAPE's: the update is B A · alpha / rank
RANDOM_LOGIT_STD = 2.0  # spread of a random model's logits over its tags, around 0 for a picture of noise


@dataclass(frozen=True)
class RamSizes:
    """All that the architecture depends on; the defaults are the released model's."""

    image_px: int = 384
    patch_px: int = 4
    window: int = 12
    width: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    mlp_ratio: float = 4.0
    shared_width: int = 512
    head_width: int = 768
    head_heads: int = 4
    head_layers: int = 2
    head_mlp_width: int = 3072
    tags: int = 4585


FULL = RamSizes()
TINY = RamSizes(
    image_px=64, window=4, width=8, depths=(1, 2), heads=(2, 4), head_width=16, head_mlp_width=32, head_layers=2, tags=60
)


# ---------------------------------------------------------------------------------------------------------------------
# network


class _HeadLayer(nn.Module):
    """Cross-attention to the image, then an MLP, each followed by its norm (BERT's order, without self-attention)."""

    def __init__(self, sizes: RamSizes) -> None:
        super().__init__()
        width, source = sizes.head_width, sizes.shared_width
        self.attention = nn.MultiheadAttention(width, sizes.head_heads, kdim=source, vdim=source, batch_first=True)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp_in = nn.Linear(width, sizes.head_mlp_width)
        self.mlp_out = nn.Linear(sizes.head_mlp_width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        queries = self.attention_norm(queries + self.attention(queries, image, image, need_weights=False)[0])
        return self.mlp_norm(queries + self.mlp_out(F.gelu(self.mlp_in(queries))))


class Ram(nn.Module):
    """Image → tokens → one logit per tag. N is the number of tokens, the mean token in front included."""

    def __init__(self, sizes: RamSizes) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer

        self.sizes = sizes
        self.visual = SwinTransformer(
            img_size=sizes.image_px,
            patch_size=sizes.patch_px,
            window_size=sizes.window,
            embed_dim=sizes.width,
            depths=sizes.depths,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
            num_classes=0,
            weight_init="skip",
        )
        self.image_proj = nn.Linear(self.visual.num_features, sizes.shared_width)
        self.label_embed = nn.Parameter(torch.zeros(sizes.tags, sizes.shared_width))
        self.wordvec_proj = nn.Linear(sizes.shared_width, sizes.head_width)
        self.head = nn.ModuleList(_HeadLayer(sizes) for _ in range(sizes.head_layers))
        self.fc = nn.Linear(sizes.head_width, 1)

    def image_tokens(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) → (B, N, C), the mean token first."""
        tokens = self.visual.forward_features(x).flatten(1, 2)
        return torch.cat((tokens.mean(dim=1, keepdim=True), tokens), dim=1)

    def image_embeds(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) → (B, N, 512): what the head looks at, and what SeeSR's U-Net is given."""
        return self.image_proj(self.image_tokens(x))

    def label_queries(self) -> Tensor:
        """One query per tag: → (tags, head width)."""
        return F.relu(self.wordvec_proj(self.label_embed))

    def logits(self, embeds: Tensor) -> Tensor:
        """(B, N, 512) → (B, tags)."""
        queries = self.label_queries().expand(len(embeds), -1, -1)
        for layer in self.head:
            queries = layer(queries, embeds)
        return self.fc(queries)[..., 0]


def preprocess(images: Tensor, image_px: int, *, antialias: bool = True) -> Tensor:
    """(B, 3, h, w) in [0, 1] → normalised (B, 3, image_px, image_px), whatever the aspect ratio.

    The tensor is resized, bilinearly. Chain-of-Zoom's torchvision antialiases, the one of SeeSR's time did not.
    """
    square = F.interpolate(images, size=(image_px, image_px), mode="bilinear", align_corners=False, antialias=antialias)
    mean, std = (square.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (square - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# the official checkpoints

_HEAD_LAYER = r"tagging_head\.encoder\.layer\.(\d+)\."
_RENAMES = (
    (r"visual_encoder\.layers\.(\d+)\.downsample\.", lambda m: f"visual.layers.{int(m[1]) + 1}.downsample."),
    (r"visual_encoder\.", r"visual."),
    (_HEAD_LAYER + r"crossattention\.self\.query\.weight", r"head.\1.attention.q_proj_weight"),
    (_HEAD_LAYER + r"crossattention\.self\.key\.weight", r"head.\1.attention.k_proj_weight"),
    (_HEAD_LAYER + r"crossattention\.self\.value\.weight", r"head.\1.attention.v_proj_weight"),
    (_HEAD_LAYER + r"crossattention\.output\.dense\.", r"head.\1.attention.out_proj."),
    (_HEAD_LAYER + r"crossattention\.output\.LayerNorm\.", r"head.\1.attention_norm."),
    (_HEAD_LAYER + r"intermediate\.dense\.", r"head.\1.mlp_in."),
    (_HEAD_LAYER + r"output\.dense\.", r"head.\1.mlp_out."),
    (_HEAD_LAYER + r"output\.LayerNorm\.", r"head.\1.mlp_norm."),
)
_UNUSED = ("tag_encoder.", "text_decoder.")  # captioning, and the text side of the training


def read_official(checkpoint: object, *, what: str) -> dict[str, Tensor]:
    """The tensors of an official RAM file that tagging needs, under their official names.

    Raises:
        WrongWeights: not a RAM checkpoint.
    """
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or "label_embed" not in state:
        raise WrongWeights(f"{what} is no RAM checkpoint (it has no label_embed); use ram_swin_large_14m.pth")
    renamed = {name.replace("vision_multi", "tagging_head"): tensor for name, tensor in state.items()}
    recomputed = ("relative_position_index", "attn_mask")
    return {n: t for n, t in renamed.items() if not n.startswith(_UNUSED) and n.rpartition(".")[2] not in recomputed}


def fold_lora(state: Mapping[str, Tensor], lora: object, *, what: str) -> dict[str, Tensor]:
    """Add DAPE's LoRA to RAM's weights, in float32: `state` under official names → the same names.

    In Swin the adapter is on the queries and values of the fused qkv, in the head on query and key. The head shares its
    weights with the first layers of `tag_encoder`, so that one's adapter belongs to the same tensors.

    Raises:
        WrongWeights: `lora` is no DAPE file, or one for another model.
    """
    pairs = list(_lora_pairs(lora, what))
    folded = dict(state)
    for module, down, up in pairs:
        target = f"{module}.weight"
        if module.startswith("tag_encoder."):
            target = target.replace("tag_encoder.", "tagging_head.", 1)
            if target not in state:
                continue  # self-attention, and layers beyond the head's
        elif module.startswith(_UNUSED):
            continue
        if target not in state:
            raise WrongWeights(f"{what} adapts {module}, which the RAM checkpoint lacks; use the DAPE.pth made for it")
        rank = up.shape[1]
        weight, update = folded[target].float(), up.new_zeros(folded[target].shape)
        if down.shape[0] == 2 * rank and module.endswith(".qkv"):
            third = weight.shape[0] // 3
            update[:third] = up[: len(up) // 2] @ down[:rank]
            update[2 * third :] = up[len(up) // 2 :] @ down[rank:]
        elif (up.shape[0], down.shape[1]) == tuple(weight.shape) and down.shape[0] == rank:
            update = up @ down
        else:
            shapes = f"{tuple(up.shape)} x {tuple(down.shape)}"
            raise WrongWeights(f"{what}: the LoRA of {module} ({shapes}) does not fit its weight {tuple(weight.shape)}")
        folded[target] = weight + update * (LORA_ALPHA / rank)
    return folded


def _lora_pairs(lora: object, what: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module name, A and B (float32) of each adapter."""
    tensors = lora if isinstance(lora, Mapping) else {}
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    if not names or len(tensors) != 2 * len(names) or any(f"{name}.lora_B" not in tensors for name in names):
        raise WrongWeights(f"{what} is no DAPE checkpoint (a flat dict of lora_A and lora_B); use SeeSR's DAPE.pth")
    for name in names:
        down, up = tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()
        yield name.replace("vision_multi", "tagging_head"), down, up


def to_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names → this module's. Unknown names stay as they are, for the strict loading to name them."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bias = re.fullmatch(_HEAD_LAYER + r"crossattention\.self\.(query|key|value)\.bias", name)
        if bias is None:
            ours[_our_name(name)] = tensor
        elif bias[2] == "query":
            parts = [state.get(name.replace("query", part)) for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                ours[f"head.{bias[1]}.attention.in_proj_bias"] = torch.cat(parts)
    return ours


def _our_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        renamed, matched = re.subn("^" + pattern, replacement, name)
        if matched:
            return renamed
    return name


def sizes_from(
    shapes: Mapping[str, tuple[int, ...]], *, image_px: int, head_heads: int, window: int | None = None, what: str
) -> RamSizes:
    """Read the architecture off the tensors' shapes (official names).

    Args:
        image_px: input size, which no tensor states.
        head_heads: attention heads of the tagging head, which no tensor states.
        window: of the Swin, if it is not the checkpoint's own.

    Raises:
        WrongWeights: tensors that tell the sizes are missing.
    """

    def count(pattern: str) -> int:
        return len({m[0] for name in shapes if (m := re.match(pattern, name))})

    swin = "visual_encoder.layers"
    try:
        stages = count(rf"{re.escape(swin)}\.\d+\.")
        tables = [shapes[f"{swin}.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(stages)]
        width, _, patch_px, _ = shapes["visual_encoder.patch_embed.proj.weight"]
        head_mlp_width, head_width = shapes["tagging_head.encoder.layer.0.intermediate.dense.weight"]
        return RamSizes(
            image_px=image_px,
            patch_px=patch_px,
            window=window or (round(tables[0][0] ** 0.5) + 1) // 2,
            width=width,
            depths=tuple(count(rf"{re.escape(swin)}\.{i}\.blocks\.\d+\.") for i in range(stages)),
            heads=tuple(table[1] for table in tables),
            mlp_ratio=shapes[f"{swin}.0.blocks.0.mlp.fc1.weight"][0] / width,
            shared_width=shapes["label_embed"][1],
            head_width=head_width,
            head_heads=head_heads,
            head_layers=count(_HEAD_LAYER),
            head_mlp_width=head_mlp_width,
            tags=shapes["label_embed"][0],
        )
    except (KeyError, IndexError) as error:
        raise WrongWeights(f"{what} is no RAM checkpoint ({error} is missing); use ram_swin_large_14m.pth") from error


def resize_bias_table(table: Tensor, window: int) -> Tensor:
    """A relative-position bias table for another window: (n, heads) → ((2 · window - 1)², heads).

    As BEiT and RAM do it: old offsets lie on a geometric progression that spans the new range, a cubic spline runs
    through them. timm's function of this purpose interpolates linearly, hence differs.
    """
    old, new = round(table.shape[0] ** 0.5), 2 * window - 1
    if old == new:
        return table
    from scipy.interpolate import RectBivariateSpline

    reach = new // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # the progression's ratio, by bisection
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (old // 2)) / (1 - ratio) > reach else (ratio, high)
    steps = np.cumsum(ratio ** np.arange(old // 2, dtype=np.float64))
    at, wanted = np.concatenate((-steps[::-1], [0.0], steps)), np.arange(-reach, reach + 1, dtype=np.float64)
    grids = table.float().t().reshape(-1, old, old).numpy().astype(np.float64)
    resized = np.stack([RectBivariateSpline(at, at, grid)(wanted, wanted) for grid in grids])
    return torch.from_numpy(resized).flatten(1).t().contiguous().to(table.dtype)


def load_official(state: Mapping[str, Tensor], sizes: RamSizes, *, what: str) -> Ram:
    """A model out of `read_official`'s (and `fold_lora`'s) tensors; the global random generator is left alone.

    Raises:
        WrongWeights: names or shapes that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        model = Ram(sizes)
    ours = to_our_names(state)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table") and name in ours and ours[name].shape != parameter.shape:
            ours[name] = resize_bias_table(ours[name], (round(parameter.shape[0] ** 0.5) + 1) // 2)
    load_strict(model, ours, what=what)
    return model.eval().requires_grad_(False)


def random_model(sizes: RamSizes, seed: int) -> Ram:
    """Seeded random weights under which a few tags are on, others for other pictures. For tests and dry runs only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the constructor draws biases, which are not drawn again below
        model = Ram(sizes).eval().requires_grad_(False)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("relative_position_bias_table"):
                # Label embeddings stand out, else what all tags see of the image would drown what tells them apart.
                nn.init.normal_(parameter, std=(60 if name == "label_embed" else 1) * parameter[0].numel() ** -0.5)
        probe = torch.rand(1, 3, sizes.image_px, sizes.image_px)
    logits = model.logits(model.image_embeds(preprocess(probe, sizes.image_px)))
    model.fc.weight *= RANDOM_LOGIT_STD / logits.std()
    model.fc.bias.copy_((model.fc.bias - logits.mean()) * (RANDOM_LOGIT_STD / logits.std()))
    return model

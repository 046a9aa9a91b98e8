"""SeeSR's two networks: diffusers' own UNet and ControlNet, whose text transformers are each followed by a second one
that attends to the embeddings of a picture.

Wu et al., "SeeSR: Towards Semantics-Aware Real-World Image Super-Resolution", CVPR 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coz.models.sd2 import Config, build_unet

EMBEDDING_WIDTH = 512
"""Of RAM's picture embeddings."""


class ImageContext:
    """The picture embeddings that all second transformers read, (n, N, 512), in step with a network's batch."""

    def __init__(self) -> None:
        self.embeds: Tensor | None = None


def build_unet_with_images(config: Config) -> nn.Module:
    """The UNet of a configuration, with `image_attentions` beside `attentions` as the authors' file names them."""
    return _add_image_attentions(build_unet(_stock(config)))


def build_controlnet_with_images(config: Config) -> nn.Module:
    """The ControlNet of a configuration, likewise."""
    from diffusers import ControlNetModel

    return _add_image_attentions(ControlNetModel.from_config(_stock(config)))


def wake_up(controlnet: nn.Module) -> nn.Module:
    """Give a random ControlNet's output layers, which begin as zeros, random weights, so that its work shows."""
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        layer.reset_parameters()
    controlnet.controlnet_cond_embedding.conv_out.reset_parameters()
    return controlnet


def connect(net: nn.Module, context: ImageContext) -> None:
    """Make every second transformer run after its first, on what `context` holds at that time."""
    for block in _blocks_with_attention(net):
        for text, image in zip(block.attentions, block.image_attentions, strict=True):
            text.register_forward_hook(_follow_up(image, context))


def _follow_up(image: nn.Module, context: ImageContext) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return image(output[0], encoder_hidden_states=context.embeds, return_dict=False)

    return hook


def _stock(config: Config) -> Config:
    if not config.get("use_image_cross_attention", True):
        return config
    return {key: value for key, value in config.items() if key != "use_image_cross_attention"}


def _blocks_with_attention(net: nn.Module) -> list[nn.Module]:
    blocks = [*net.down_blocks, net.mid_block, *getattr(net, "up_blocks", ())]
    return [block for block in blocks if getattr(block, "attentions", None) is not None]


def _add_image_attentions(net: nn.Module) -> nn.Module:
    from diffusers.models import Transformer2DModel

    for block in _blocks_with_attention(net):
        layers = []
        for text in block.attentions:
            kept = (
                *("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "norm_num_groups"),
                *("use_linear_projection", "upcast_attention"),
            )
            layers.append(Transformer2DModel(cross_attention_dim=EMBEDDING_WIDTH, **{name: text.config[name] for name in kept}))
        block.image_attentions = nn.ModuleList(layers)
    return net


class ConditionEmbedder:
    """Embeds the picture for a ControlNet once per tile, instead of at every step and for both halves of the guidance."""

    def __init__(self, controlnet: nn.Module) -> None:
        self.net: nn.Module = controlnet.controlnet_cond_embedding
        controlnet.controlnet_cond_embedding = nn.Identity()
        self._picture: Tensor | None = None
        self._known: dict[object, Tensor] = {}

    def start(self, picture: Tensor) -> None:
        """Take up new pictures (B, 3, H, W) in [0, 1], in the network's number format."""
        self._picture = picture
        self._known = {}

    @torch.no_grad()
    def crops(self, owners: Tensor, boxes: list[Any]) -> Tensor:
        """(n, C, t, t) for tiles that lie at `boxes` (latent pixels) of the pictures `owners`."""
        jobs = list(zip(owners.tolist(), boxes, strict=True))
        new = [job for job in dict.fromkeys(jobs) if job not in self._known]
        if new:
            picture = self._picture
            assert picture is not None, "start() was not called"
            pictures = torch.cat([box.crop(picture[owner : owner + 1], scale=8) for owner, box in new])
            self._known.update(zip(new, self.net(pictures), strict=True))
        return torch.stack([self._known[job] for job in jobs])

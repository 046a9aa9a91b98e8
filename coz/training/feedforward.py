"""A feed-forward net (SPAN, ESRGAN, …) under training: all its weights, squared error and LPIPS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from coz.backbones.spandrel import describe, find
from coz.errors import UserError
from coz.models.placement import pick_device
from coz.models.trained import write_note
from coz.store import write_atomic
from coz.training.one_step import GENERATOR
from coz.training.pixel_losses import PixelLosses
from coz.training.trainee import Batch, Outcome


class FeedForwardTrainee(nn.Module):
    """A net of fixed scale 4 that spandrel knows, fine-tuned whole.

    Args:
        weights: as the backbone's.
        l2, lpips: weights of the losses.
        device: where it trains.
        lpips_weights: a torchvision VGG16 checkpoint for LPIPS; None takes the packaged one.
    """

    enlarged = False

    def __init__(
        self, *, weights: str, l2: float = 1.0, lpips: float = 0.0, device: str = "auto", lpips_weights: str | None = None
    ) -> None:
        super().__init__()
        if l2 < 0 or lpips < 0 or l2 == lpips == 0:
            raise UserError(f"l2={l2}, lpips={lpips}: neither may be negative, and one must be above 0")
        self._path = find(weights)
        self._device = pick_device(device)
        self._pixels = PixelLosses(l2=l2, lpips=lpips, lpips_weights=lpips_weights)

    def load(self) -> None:
        """Read the weights.

        Raises:
            UserError: a net that does not enlarge by 4.
        """
        descriptor = describe(self._path)
        if descriptor.scale != 4:
            raise UserError(f"{self._path} enlarges by {descriptor.scale}; training is made for nets that enlarge by 4")
        self.net = descriptor.model.to(self._device)
        # a net may hold weights that it derives from others (SPAN's merged convolutions) and does not train
        self._trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        self._pixels.load()

    def trained(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {GENERATOR: self._trained}

    def forward(self, batch: Batch) -> Outcome:
        image = self.net(batch.lq)
        parts = self._pixels(image * 2 - 1, batch.hr * 2 - 1)
        return Outcome(self._pixels.total(parts), {name: value.detach() for name, value in parts.items()})

    @torch.no_grad()
    def restore(self, lq: Tensor, *, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        was_training = self.net.training
        image = self.net.eval()(lq)
        self.net.train(was_training)
        return image.float().clamp(0, 1)

    def write(self, folder: Path) -> Mapping[str, str]:
        """A safetensors file that spandrel reads."""
        from safetensors.torch import save

        was_training = self.net.training
        self.net.eval()  # derived weights follow the trained ones here
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.net.state_dict().items()}
        self.net.train(was_training)
        write_atomic(folder / "net.safetensors", save(state))
        write_note(folder, backbone="spandrel", files={"weights": "net.safetensors"}, base={})
        return {"backbone": "spandrel", "backbone.weights": str(folder)}

    def write_released(self, folder: Path) -> None:
        """Nothing more: `net.safetensors` has the names of the net's released weights."""

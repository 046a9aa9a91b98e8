"""The image contract and its geometry.

Inside the package an image is a tensor: RGB, float32, [0, 1], (B, 3, H, W). States of a chain lie on the 8-bit grid
(value = k / 255), because the released code hands 8-bit images from step to step; Pillow's 8-bit resizing is therefore
exact on them, and is used wherever a figure of the paper depends on it.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from coz.errors import UserError

Rounding = Literal["truncate", "round"]
Resampling = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]
ColorFix = Literal["wavelet", "adain", "none"]
Size = int | tuple[int, int]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
MAX_PIXELS = 1_000_000_000  # a gigapixel photograph is read; a larger one needs the tiled path

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


class UnreadableImage(UserError):
    """A file that is no image, is cut off, or is too small or too large to be used."""


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_photo(path: str | Path, *, min_side_px: int = 1) -> Image.Image:
    """Read a photograph as 8-bit RGB, upright.

    PNG, JPEG, WebP, TIFF and BMP; 16-bit and float samples are scaled to 8 bits, grey is repeated, transparency is laid
    over white, CMYK converted, the EXIF orientation applied.

    Raises:
        UnreadableImage: missing, not an image, truncated, or its short side is below `min_side_px`.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise UnreadableImage(
                        f"{path} has {file.width} x {file.height} px, more than {MAX_PIXELS:,}; cut it or reduce it first"
                    )
                file.load()
                image = _to_rgb8(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise UnreadableImage(f"{path} is a folder; give one photograph") from error
    except PermissionError as error:
        raise UnreadableImage(f"{path} may not be read; give yourself the right to") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path} has too many pixels ({error}); cut it or reduce it first") from error
    except UnidentifiedImageError as error:
        image = _read_tiff(path, error)
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise UnreadableImage(f"{path} cannot be read ({error}); it may be cut off, replace it") from error
    if min(image.size) < min_side_px:
        raise UnreadableImage(f"{path} is {image.width} x {image.height} px; the short side must be at least {min_side_px} px")
    return image


def _to_rgb8(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        samples = np.asarray(image).astype(np.float64)
        top = 65535.0 if samples.max(initial=0) > 255 or image.mode != "I" else 255.0
        image = Image.fromarray(np.rint(samples.clip(0, top) * (255.0 / top)).astype(np.uint8), "L")
    elif image.mode == "F":
        image = Image.fromarray(_samples_to_uint8(np.asarray(image)), "L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")


def _read_tiff(path: Path, cause: Exception) -> Image.Image:
    """Sixteen-bit and float colour TIFFs, which Pillow does not know."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise UnreadableImage(f"{path} is not an image that can be read; remove it or convert it to PNG") from cause
    import tifffile

    try:
        samples = tifffile.imread(path, key=0)
    except (tifffile.TiffFileError, ValueError, OSError, IndexError) as error:
        raise UnreadableImage(f"{path} is not a TIFF that can be read ({error}); convert it to PNG") from error
    if samples.ndim == 3 and samples.shape[0] in (1, 3, 4) and samples.shape[2] not in (1, 3, 4):
        samples = samples.transpose(1, 2, 0)  # planar layout
    if samples.ndim == 2:
        samples = samples[..., None]
    if samples.ndim != 3 or samples.shape[2] not in (1, 2, 3, 4):
        raise UnreadableImage(f"{path} is a TIFF of shape {samples.shape}, which is no picture; convert it to PNG")
    pixels = _samples_to_uint8(samples)
    if pixels.shape[2] in (1, 2):
        pixels = np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=2)
    return _to_rgb8(Image.fromarray(pixels, "RGBA" if pixels.shape[2] == 4 else "RGB"))


def _samples_to_uint8(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:
        return samples
    if np.issubdtype(samples.dtype, np.integer):
        top = float(np.iinfo(samples.dtype).max)
    else:
        samples = np.nan_to_num(samples)
        top = 1.0 if samples.max(initial=0) <= 1.0 else 255.0
    return np.rint(samples.astype(np.float64).clip(0, top) * (255.0 / top)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# writing


def encode_png(image: Image.Image, *, note: Mapping[str, str], compress_level: int = 4) -> bytes:
    """The bytes of a PNG file that carries a note, see `provenance.note_on`. Equal arguments give equal bytes.

    Args:
        image: 8-bit RGB.
        note: texts by keyword; a keyword is Latin-1 and at most 79 characters, a text may be anything.
        compress_level: 0 to 9, Pillow's.
    """
    texts = PngInfo()
    for keyword, text in note.items():
        texts.add_text(keyword, text)  # what is not Latin-1 becomes an iTXt chunk by itself
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level, pnginfo=texts)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# tensors and 8-bit images


def from_pil(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """8-bit images of one size → (B, 3, H, W) in [0, 1]."""
    images = [images] if isinstance(images, Image.Image) else images
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().float().div(255)


def to_uint8(x: Tensor, *, rounding: Rounding = "round") -> np.ndarray:
    """(B, 3, H, W) → (B, H, W, 3) uint8. `truncate` is what the released code does, a downward bias at every step."""
    levels = x.detach().float().clamp(0, 1) * 255
    levels = levels.round() if rounding == "round" else levels.floor()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def to_pil(x: Tensor, *, rounding: Rounding = "round") -> list[Image.Image]:
    """(B, 3, H, W) → B 8-bit images."""
    return [Image.fromarray(array) for array in to_uint8(x, rounding=rounding)]


def quantize(x: Tensor, *, rounding: Rounding = "round") -> Tensor:
    """Put an image on the 8-bit grid, as saving it as a PNG and reading it back would. (B, 3, H, W) → same."""
    return torch.from_numpy(to_uint8(x, rounding=rounding)).permute(0, 3, 1, 2).contiguous().float().div(255)


def as_size(size: Size) -> tuple[int, int]:
    """A side or (height, width) → (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size={size} must be at least 1 px on each side")
    return int(height), int(width)


def resize(x: Tensor, size: Size, method: Resampling = "bicubic") -> Tensor:
    """Resize as Pillow does on 8-bit images: (B, 3, h, w) → (B, 3, *size), on the 8-bit grid.

    The input is rounded to the grid first, which changes nothing for a state of a chain. A tensor on another device
    comes back to that device.
    """
    height, width = as_size(size)
    if x.shape[-2:] == (height, width):
        return x
    images = [image.resize((width, height), _RESAMPLING[method]) for image in to_pil(x)]
    return from_pil(images).to(x.device)


def reduce_area(x: Tensor, size: Size) -> Tensor:
    """Average pixels down to `size` in floating point: (B, 3, H, W) → (B, 3, *size), sides need not divide."""
    return F.interpolate(x, size=as_size(size), mode="area")


# ---------------------------------------------------------------------------------------------------------------------
# start state and views


def start_state(photo: Image.Image, size_px: int = 512, *, rounding: Rounding = "truncate") -> Tensor:
    """The chain's x0: Lanczos-resize the short side to `size_px`, crop the centre. → (1, 3, size_px, size_px).

    `truncate` computes the resized sides as the released code does, `int(side * scale)`; for many photographs that
    gives a side of `size_px - 1`, and the crop then carries a black line. `round` never does.
    """
    width, height = photo.size
    scale = size_px / min(width, height)
    if rounding == "truncate":
        new_width, new_height = int(width * scale), int(height * scale)
    else:
        new_width, new_height = max(size_px, round(width * scale)), max(size_px, round(height * scale))
    resized = photo.resize((new_width, new_height), Image.Resampling.LANCZOS)
    left, top = (new_width - size_px) // 2, (new_height - size_px) // 2
    return from_pil(resized.crop((left, top, left + size_px, top + size_px)))


@dataclass(frozen=True)
class View:
    """A square region of a state, in that state's pixels."""

    left_px: int
    top_px: int
    size_px: int

    def crop(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 3, size_px, size_px)."""
        return x[..., self.top_px : self.top_px + self.size_px, self.left_px : self.left_px + self.size_px]


@dataclass(frozen=True)
class Region:
    """The square of the start state that a state shows, as fractions of it."""

    left: float = 0.0
    top: float = 0.0
    side: float = 1.0

    def inside(self, view: View, state_px: int) -> Region:
        """The part of this region that `view` cuts out of a state of `state_px` squared."""
        unit = self.side / state_px
        return Region(self.left + view.left_px * unit, self.top + view.top_px * unit, view.size_px * unit)

    def locate(self, point: tuple[float, float]) -> tuple[float, float]:
        """A point of the start state → where it lies in this region, as fractions of it (kept inside)."""
        x, y = ((p - origin) / self.side for p, origin in zip(point, (self.left, self.top), strict=True))
        return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)


CENTER = (0.5, 0.5)


def view_at(state_px: int, factor: float, at: tuple[float, float] = CENTER, *, grid_px: int = 1) -> View:
    """The view that a zoom by `factor` around `at` looks at, kept inside a state of `state_px` squared.

    Args:
        state_px: side of the state.
        factor: zoom factor; the view's side is `int(state_px / factor)`, as in the released code.
        at: where to look, (x, y) as fractions of the state.
        grid_px: snap the corner to multiples of this many pixels (of one pixel of the photograph, so that the regions
            of a chain and of a direct enlargement coincide).

    Raises:
        UserError: the view would hold no pixel, or `at` lies outside the state.
    """
    size_px = int(state_px / factor + 1e-9)
    if size_px < 1:
        raise UserError(f"scale {factor:g} leaves no pixel of a {state_px} px state; the largest is {state_px}")
    if not all(0 <= a <= 1 for a in at):
        raise UserError(f"at={at[0]:g},{at[1]:g} lies outside the picture; give fractions between 0 and 1")
    if at == CENTER:
        corner = [(state_px - size_px) // 2] * 2
    else:
        grid_px = grid_px if grid_px <= size_px else 1
        corner = [math.floor((a * state_px - size_px / 2) / grid_px + 0.5) * grid_px for a in at]
    left, top = (min(max(c, 0), state_px - size_px) for c in corner)
    return View(left_px=left, top_px=top, size_px=size_px)


# ---------------------------------------------------------------------------------------------------------------------
# colour


def fix_color(target: Tensor, source: Tensor, method: ColorFix) -> Tensor:
    """Give `target` the colours of `source`: (B, 3, H, W) each → same, not clamped."""
    if method == "wavelet":
        return wavelet_color_fix(target, source)
    if method == "adain":
        return adain_color_fix(target, source)
    return target


def adain_color_fix(target: Tensor, source: Tensor) -> Tensor:
    """Match each channel's mean and standard deviation, as OSEDiff and StableSR do. Not clamped.

    The deviation is sqrt(unbiased variance + 1e-5) for both pictures.
    """
    target_mean, target_std = _channel_statistics(target)
    source_mean, source_std = _channel_statistics(source)
    return (target - target_mean) / target_std * source_std + source_mean


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((-2, -1), keepdim=True), (x.var((-2, -1), keepdim=True) + 1e-5).sqrt()


def wavelet_color_fix(target: Tensor, source: Tensor, levels: int = 5) -> Tensor:
    """Detail of `target` over the colours of `source`: high(target) + low(source). Not clamped.

    The low part is an à-trous pyramid: `levels` passes of the 3 x 3 binomial kernel with dilation 1, 2, 4, …
    """
    return target - wavelet_low(target, levels) + wavelet_low(source, levels)


def wavelet_low(x: Tensor, levels: int = 5) -> Tensor:
    """The low-frequency part of `wavelet_color_fix`: (B, 3, H, W) → same."""
    for level in range(levels):
        radius = 2**level
        # The kernel is separable: two passes of three shifted views cost a fifth of a dilated convolution on a CPU.
        x = F.pad(x, (radius,) * 4, mode="replicate")
        x = (x[..., : -2 * radius] + x[..., 2 * radius :]) * 0.25 + x[..., radius:-radius] * 0.5
        x = (x[..., : -2 * radius, :] + x[..., 2 * radius :, :]) * 0.25 + x[..., radius:-radius, :] * 0.5
    return x

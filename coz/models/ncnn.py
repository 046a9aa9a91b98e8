"""Read networks published for ncnn (a `.param` text and a `.bin` of weights) as PyTorch state dicts.

Two super-resolution nets are distributed inside Python packages in that form only: Real-ESRGAN's x4plus (RRDBNet) and
SPAN. Both are plain convolutions, so their weights map one to one onto the original layouts, which spandrel loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coz.checkpoint import StateDict, WrongWeights

_MAGIC = "7767517"
_HALF_TAG = 0x01306B47


@dataclass(frozen=True)
class Convolution:
    """One convolution in file order: weight (out, in, k, k), bias (out,)."""

    name: str
    weight: Tensor
    bias: Tensor


def read_convolutions(param_path: str | Path) -> list[Convolution]:
    """All convolutions of an ncnn net, in file order, as float32.

    Args:
        param_path: the `.param` file; the `.bin` lies beside it.

    Raises:
        WrongWeights: not an ncnn file, a layer with weights that is no convolution, or a `.bin` of another length.
    """
    param_path = Path(param_path)
    lines = param_path.read_text().splitlines()
    if not lines or lines[0].strip() != _MAGIC:
        raise WrongWeights(f"{param_path} is not an ncnn .param file; give the file that lies beside the .bin")
    blob = _Blob(param_path.with_suffix(".bin"))
    convolutions = []
    for line in lines[2:]:
        fields = line.split()
        if not fields:
            continue
        kind, name, inputs, outputs = fields[0], fields[1], int(fields[2]), int(fields[3])
        options = dict(field.split("=", 1) for field in fields[4 + inputs + outputs :])
        if kind == "Convolution":
            channels, kernel = int(options["0"]), int(options["1"])
            weight = blob.tagged(int(options["6"])).reshape(channels, -1, kernel, kernel)
            bias = blob.plain(channels) if options.get("5") == "1" else np.zeros(channels, np.float32)
            convolutions.append(Convolution(name, torch.from_numpy(weight), torch.from_numpy(bias)))
        elif kind == "MemoryData":
            blob.plain(int(np.prod([int(options[key]) for key in ("0", "1", "2") if int(options.get(key, 0))])))
        elif kind in ("PReLU", "InnerProduct", "BatchNorm", "Deconvolution", "ConvolutionDepthWise"):
            raise WrongWeights(f"{param_path} has a {kind} layer, which this reader does not know; use a PyTorch checkpoint")
    blob.finish()
    return convolutions


class _Blob:
    """The `.bin` file: arrays one after another, weights behind a tag that tells their format."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WrongWeights(f"{path} is missing; an ncnn net needs its .bin beside the .param")
        self._path, self._bytes, self._offset = path, path.read_bytes(), 0

    def plain(self, count: int) -> np.ndarray:
        return self._take("<f4", count, 4 * count)

    def tagged(self, count: int) -> np.ndarray:
        tag = int(self._take("<u4", 1, 4)[0])
        if tag == 0:
            return self.plain(count)
        if tag == _HALF_TAG:  # halves, padded to four bytes
            return self._take("<f2", count, (2 * count + 3) // 4 * 4).astype(np.float32)
        raise WrongWeights(f"{self._path} holds weights in a format that this reader does not know (tag {tag:#x})")

    def _take(self, dtype: str, count: int, length: int) -> np.ndarray:
        if self._offset + length > len(self._bytes):
            raise WrongWeights(f"{self._path} ends after {len(self._bytes)} bytes; it is cut off, install the package again")
        array = np.frombuffer(self._bytes, dtype, count, self._offset).copy()
        self._offset += length
        return array

    def finish(self) -> None:
        if self._offset != len(self._bytes):
            raise WrongWeights(f"{self._path} has {len(self._bytes) - self._offset} bytes too many; it belongs to another net")


def ncnn_state(param_path: str | Path) -> StateDict:
    """The state dict, in its original layout, of an RRDBNet or a SPAN stored for ncnn."""
    convolutions = read_convolutions(param_path)
    if any("eval_conv" in convolution.name for convolution in convolutions):
        return span_state(convolutions)
    return rrdbnet_state(convolutions, what=str(param_path))


def rrdbnet_state(convolutions: Sequence[Convolution], *, what: str) -> StateDict:
    """Convolutions of a 4x RRDBNet in forward order → BasicSR's names."""
    blocks, rest = divmod(len(convolutions) - 6, 15)
    if rest or blocks < 1:
        raise WrongWeights(f"{what} has {len(convolutions)} convolutions, which is no 4x RRDBNet (15 per block and 6 more)")
    names = ["conv_first"]
    names += [f"body.{b}.rdb{r}.conv{c}" for b in range(blocks) for r in (1, 2, 3) for c in (1, 2, 3, 4, 5)]
    names += ["conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    state: StateDict = {}
    for name, convolution in zip(names, convolutions, strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = convolution.weight, convolution.bias
    return state


def span_state(convolutions: Sequence[Convolution]) -> StateDict:
    """Convolutions of a SPAN → its training layout.

    Published for inference, SPAN's re-parameterised 3x3 convolutions come merged into one (`eval_conv`). The training
    layout wants a skip and a chain 1x1 → 3x3 → 1x1 of twice the width: the skip gets zeros and the chain identities
    around the merged kernel, which is the same function and can be trained on.
    """
    state: StateDict = {}
    for convolution in convolutions:
        name = convolution.name.strip("/").removesuffix("/Conv").replace("/", ".")
        if name.endswith("eval_conv"):
            _expand_reparameterised(state, name.removesuffix(".eval_conv"), convolution)
        else:
            name = name.replace("upsampler.upsampler.", "upsampler.")
            state[f"{name}.weight"], state[f"{name}.bias"] = convolution.weight, convolution.bias
    return state


def _expand_reparameterised(state: StateDict, name: str, merged: Convolution, gain: int = 2) -> None:
    c_out, c_in = merged.weight.shape[:2]
    widen, core, narrow = torch.zeros(gain * c_in, c_in, 1, 1), torch.zeros(gain * c_out, gain * c_in, 3, 3), None
    widen[:c_in, :, 0, 0] = torch.eye(c_in)
    core[:c_out, :c_in] = merged.weight
    narrow = torch.zeros(c_out, gain * c_out, 1, 1)
    narrow[:, :c_out, 0, 0] = torch.eye(c_out)
    state |= {
        f"{name}.sk.weight": torch.zeros(c_out, c_in, 1, 1),
        f"{name}.sk.bias": torch.zeros(c_out),
        f"{name}.conv.0.weight": widen,
        f"{name}.conv.0.bias": torch.zeros(gain * c_in),
        f"{name}.conv.1.weight": core,
        f"{name}.conv.1.bias": torch.zeros(gain * c_out),
        f"{name}.conv.2.weight": narrow,
        f"{name}.conv.2.bias": merged.bias,
        f"{name}.eval_conv.weight": merged.weight,
        f"{name}.eval_conv.bias": merged.bias,
    }

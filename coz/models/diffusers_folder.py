"""Models in the diffusers folder layout, read strictly: a folder per component, each with a config and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from coz.checkpoint import WeightsNotFound, WrongWeights, compare_keys

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a component: those without a variant (`fp16`), or the variant's where there are no others."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsNotFound(f"{folder} holds no *.safetensors; fetch the component again")
    return [file for file in files if "." not in file.stem] or files


def header_shapes(folder: Path) -> Shapes:
    """Names and shapes of a component's tensors, out of the files' headers: no weight is read.

    Raises:
        WrongWeights: a file is cut off or is no safetensors.
    """
    shapes: Shapes = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def meta_model(model_class: type[ModelMixin], config: Path | Mapping[str, Any]) -> ModelMixin:
    """An architecture without memory, from a component's folder or from its configuration."""
    values = model_class.load_config(config, local_files_only=True) if isinstance(config, Path) else dict(config)
    with torch.device("meta"):
        return model_class.from_config(values)


def check_component(folder: Path, skeleton: nn.Module) -> Shapes:
    """Compare a component's files with the architecture that its config describes; return their shapes.

    Raises:
        WrongWeights: names the first keys that differ.
    """
    found = header_shapes(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    compare_keys(expected, found, what=str(folder))
    return found


def load_component(
    folder: Path,
    model_class: type[ModelMixin],
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_fp32: frozenset[str] = frozenset(),
) -> ModelMixin:
    """Read a diffusers model tensor by tensor, so that no second copy of the weights is held.

    Args:
        keep_fp32: names of tensors (tables) that stay float32 whatever `dtype` is.
    """
    model = meta_model(model_class, folder)
    state = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                state[name] = file.get_tensor(name).to(device, torch.float32 if name in keep_fp32 else dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_keys(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what=str(folder))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def load_text_encoder(folder: Path, model_class: type[PreTrainedModel], *, dtype: torch.dtype) -> PreTrainedModel:
    """Read a transformers model onto the CPU; its own rules on what stays float32 (T5's `wo` in half) apply.

    Raises:
        WrongWeights: damaged files, or keys that are missing, left over or of another shape.
    """
    from transformers.utils import logging

    variant = "fp16" if all("." in path.stem for path in weight_files(folder)) else None
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # bars belong to entry points
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise WrongWeights(f"{folder} does not hold a {model_class.__name__} ({str(error).splitlines()[0]})") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = [str(key) for part in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report.get(part, ())]
    if wrong:
        raise WrongWeights(f"{folder} does not fit its config: keys {', '.join(wrong[:3])} differ; fetch it again")
    return model.eval().requires_grad_(False)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WrongWeights(f"{path} cannot be read as safetensors ({error}); it may be cut off, fetch it again") from error

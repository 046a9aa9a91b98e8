"""LoRA adapters of vision-language models: peft's format, whoever trained them and with whichever transformers.

Since transformers 4.52 Qwen2.5-VL's text model lies at `model.language_model` and its vision tower at `model.visual`; before,
at `model` and `visual`. ms-swift's adapters of that time use the old names, and a `target_modules` pattern that today would
also match the vision tower. So the adapted modules are read off the tensors' names, brought to today's names, and the
adapter is loaded strictly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from coz.checkpoint import StateDict, WeightsNotFound, WrongWeights, compare_keys, hub_folder, load_tensors
from coz.errors import UserError

log = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
_FORMER_NAMES = (  # how a module was called → how it is called today; the first that exists in the model is taken
    (r"^model\.(?=layers\.)", "model.language_model."),
    (r"^visual\.", "model.visual."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?=vision_tower\.|multi_modal_projector\.|vision_model\.|connector\.)", "model."),
    (r"^text_model\.|^model\.text_model\.", "model.text_model."),
)


def adapter_folder(adapter: str) -> Path:
    """The folder that holds `adapter_config.json`: a local one, or a hub id's in the local cache.

    A folder of a training run is searched in the places where peft, TRL and ms-swift put adapters: itself, `adapter`,
    `default`, and the newest `checkpoint-N`, also inside ms-swift's `vN-DATE` folder.

    Raises:
        WeightsNotFound: no adapter there.
    """
    root = Path(adapter).expanduser()
    if not root.is_dir():
        return hub_folder(adapter, patterns=ADAPTER_FILES, what="the LoRA adapter", size_gb=0.1)
    checkpoints = sorted((*root.glob("checkpoint-*"), *root.glob("v*/checkpoint-*")), key=_step, reverse=True)
    for folder in (root, root / "adapter", root / "default", *checkpoints, *(c / "default" for c in checkpoints)):
        if (folder / "adapter_config.json").is_file():
            if folder != root:
                log.info("adapter=%s: taking %s", adapter, folder)
            return hub_folder(str(folder), patterns=ADAPTER_FILES, what="the LoRA adapter", size_gb=0.1)
    raise WeightsNotFound(f"adapter={adapter} and its checkpoint-N hold no adapter_config.json; give an adapter's folder")


def _step(folder: Path) -> tuple[str, int]:
    digits = folder.name.rpartition("-")[2]
    return folder.parent.name, int(digits) if digits.isdigit() else -1


def attach_adapter(model: nn.Module, folder: Path, *, merge: bool) -> nn.Module:
    """Put the adapter's LoRA into `model`.

    Args:
        merge: add it to the weights, which makes inference as fast as without; not for quantized weights.

    Returns:
        The model itself, of the class it had.

    Raises:
        WrongWeights: not a LoRA, or one for another model.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise WrongWeights(f"{folder} holds a {config.peft_type} adapter; only LoRA adapters can be used")
    state = _read(folder)
    state = {_today(name, model): tensor for name, tensor in state.items()}
    config.target_modules = sorted({_module_of(name) for name in state})
    config.inference_mode = True
    config.modules_to_save = None
    config.base_model_name_or_path = None
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise WrongWeights(f"{folder} does not fit the model ({error}); use the adapter made for it") from error
    state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
    compare_keys(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what=str(folder))
    set_peft_model_state_dict(adapted, state)
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _read(folder: Path) -> StateDict:
    files = sorted(folder.glob("adapter_model.*"), key=lambda path: path.suffix != ".safetensors")
    state = load_tensors(files[0])
    if not isinstance(state, dict) or not state:
        raise WrongWeights(f"{files[0]} holds no tensors; use an adapter that peft wrote")
    other = [name for name in state if ".lora_" not in name]
    if other:
        raise WrongWeights(f"{files[0]} trains more than LoRA ({', '.join(other[:3])}); only LoRA tensors can be used")
    return {re.sub(r"(\.lora_[A-Za-z]+)\.default\b", r"\1", name): tensor for name, tensor in state.items()}


def _module_of(name: str) -> str:
    return re.split(r"\.lora_", name, maxsplit=1)[0]


def _today(name: str, model: nn.Module) -> str:
    """A tensor's name as today's model has it, without peft's prefix."""
    name = name.removeprefix("base_model.model.")
    module, rest = _module_of(name), name[len(_module_of(name)) :]
    for candidate in _candidates(module):
        if _has_module(model, candidate):
            return candidate + rest
    raise WrongWeights(f"the adapter's module {module} is not in {type(model).__name__}; use the adapter made for this model")


def _candidates(module: str) -> Iterable[str]:
    yield module
    for pattern, today in _FORMER_NAMES:
        if re.search(pattern, module):
            yield re.sub(pattern, today, module)


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def check_merge(*, merge: bool, quantization: str) -> None:
    """Raise a `UserError` where merging into quantized weights is asked for."""
    if merge and quantization != "none":
        raise UserError(f"merge_adapter=true cannot add to {quantization} weights; set merge_adapter=false")

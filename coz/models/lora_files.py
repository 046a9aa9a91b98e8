"""Files that hold adapters of SD3: the released ones of Chain-of-Zoom, and our own.

Released (bryanswkim/Chain-of-Zoom): `SR_LoRA/*.pkl`, a flat list of tensors without names, up and down in turn for every
adapted linear layer in the order of the model; and `SR_VAE/*.pt`, the state dict of a VAE encoder into which peft has put
an adapter. Neither states a factor: the first uses 1, the second keeps peft's default alpha of 8 and so 8 / rank.

Ours: one safetensors file with names `PART.LAYER.lora_up.weight`, PART being `transformer` or `vae_encoder`, and with
metadata that says how it was trained, so that nothing has to be guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coz.checkpoint import StateDict, WrongWeights, compare_keys, load_tensors, local_file
from coz.models.lora import Adapter, LoraPair, pair_shapes

FORMAT = "coz-lora-1"
RELEASED_VAE_ALPHA = 8.0  # peft's default, which the released trainer left in place
LayerShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LoraInfo:
    """What a file of ours says about itself."""

    rank: int
    encode_shift: bool
    """Whether the VAE's shift is subtracted at encoding, as in training; the released files leave it out."""
    base: str
    """The model that the adapter belongs to: a hub id, a digest, or `random`."""
    factors: dict[str, float] = field(default_factory=lambda: {"transformer": 1.0, "vae_encoder": 1.0})


@dataclass(frozen=True)
class SD3Adapters:
    """Everything that turns SD3 into a super-resolution model."""

    info: LoraInfo
    parts: dict[str, Adapter]
    vae_base: StateDict | None = None
    """Base weights of the VAE encoder, where the file carries them (the released one does)."""


# ---------------------------------------------------------------------------------------------------------------------
# the released files


def read_released_list(path: str | Path, layers: LayerShapes, *, rank: int | None) -> Adapter:
    """The flat list of `SR_LoRA/*.pkl`, or the same tensors in a safetensors file (named, or numbered "0", "1", …).

    Args:
        layers: shapes of the adapted layers' weights, in the order of the model.
        rank: the rank to expect; None takes the file's.

    Raises:
        WrongWeights: another number of tensors, another rank or other widths: names the first that differ.
    """
    content = load_tensors(path)
    names = [f"{name}.{part}.weight" for name in layers for part in ("lora_up", "lora_down")]
    if isinstance(content, Mapping):
        if content and all(str(key).isdigit() for key in content):
            content = [content[key] for key in sorted(content, key=int)]
        elif not any(str(key) in set(names) for key in content):
            raise WrongWeights(
                f"{path} is not the flat list of an SD3 LoRA but holds {', '.join(map(str, list(content)[:3]))}; "
                f"give a file with {', '.join(names[:2])}, …"
            )
    if isinstance(content, Mapping):
        state = dict(content)
    else:
        if not isinstance(content, list | tuple) or not all(isinstance(item, Tensor) for item in content):
            raise WrongWeights(f"{path} holds a {type(content).__name__}, not a flat list of tensors; give the LoRA file")
        # names run out where the list is too long: the surplus keeps numbers, and the comparison below reports it
        state = dict(zip([*names, *map(str, range(len(names), len(content)))], content, strict=False))
    first = state.get(names[1])
    rank = rank or (first.shape[0] if first is not None else 1)
    return _adapter(state, layers, rank=rank, what=str(path))


def read_released_vae_encoder(
    path: str | Path, encoder: Mapping[str, tuple[int, ...]], *, rank: int | None
) -> tuple[StateDict, Adapter]:
    """The state dict of a peft-wrapped VAE encoder, `SR_VAE/*.pt` → its base weights, and the adapter.

    Args:
        encoder: names and shapes of the plain encoder's state dict.

    Raises:
        WrongWeights: names the first keys that differ.
    """
    content = load_tensors(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:3])) if isinstance(content, Mapping) else type(content).__name__
        raise WrongWeights(f"{path} is not the state dict of a VAE encoder but holds {keys}; give SR_VAE/*.pt")
    base: StateDict = {}
    matrices: StateDict = {}
    for key, value in content.items():
        key = str(key).removeprefix("encoder.")
        for peft_name, name in ((".lora_A.", ".lora_down."), (".lora_B.", ".lora_up.")):
            if peft_name in key:
                matrices[f"{key.partition(peft_name)[0]}{name}weight"] = value.float()
                break
        else:
            base[key.replace(".base_layer.", ".")] = value
    compare_keys(encoder, {name: tuple(value.shape) for name, value in base.items()}, what=str(path))
    layers = {name: encoder[f"{name}.weight"] for name in dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in matrices)}
    if not layers:
        raise WrongWeights(f"{path} holds a VAE encoder without an adapter (no lora_A, lora_B); give SR_VAE/*.pt")
    rank = rank or next(value.shape[0] for key, value in matrices.items() if ".lora_down." in key)
    return base, _adapter(matrices, layers, rank=rank, what=str(path))


# ---------------------------------------------------------------------------------------------------------------------
# our own


def write_adapters(path: str | Path, parts: Mapping[str, Adapter], info: LoraInfo) -> None:
    """Write our own format. The file appears whole or not at all.

    Args:
        parts: adapters by part, `transformer` and `vae_encoder`.
    """
    from safetensors.torch import save_file

    state = {}
    for part, adapter in parts.items():
        for name, pair in adapter.items():
            state[f"{part}.{name}.lora_up.weight"] = pair.up.detach().cpu().contiguous()
            state[f"{part}.{name}.lora_down.weight"] = pair.down.detach().cpu().contiguous()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(state, partial, metadata={"format": FORMAT, "info": json.dumps(asdict(info))})
    partial.replace(path)


def read_info(path: str | Path) -> LoraInfo | None:
    """The metadata of a file in our format; None for any other file. Reads the header only."""
    from safetensors import SafetensorError, safe_open

    path = local_file(path, what="lora")
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WrongWeights(f"{path} cannot be read as safetensors ({error}); it may be cut off, fetch it again") from error
    if metadata.get("format") != FORMAT:
        return None
    try:
        return LoraInfo(**json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WrongWeights(f"{path} says it is a {FORMAT} file, but its metadata does not fit ({error})") from error


def read_adapters(path: str | Path, layers: Mapping[str, LayerShapes]) -> SD3Adapters:
    """Read our own format, strictly.

    Args:
        layers: for each part, the shapes of every layer that may be adapted.

    Raises:
        WrongWeights: not our format, or tensors that do not fit the model or the stated rank.
    """
    info = read_info(path)
    if info is None:
        raise WrongWeights(f"{path} is not a {FORMAT} file; give a file that train_sr.py wrote, or a released pair")
    state = load_tensors(path)
    parts = {}
    for part, allowed in layers.items():
        prefix = f"{part}."
        own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        named = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in own)
        unknown = [name for name in named if name not in allowed]
        if unknown:
            raise WrongWeights(f"{path}: {part} has no layers {', '.join(unknown[:3])}; use the base model {info.base}")
        parts[part] = _adapter(own, {name: allowed[name] for name in named}, rank=info.rank, what=f"{path} ({part})")
    if state:
        raise WrongWeights(f"{path} holds unknown tensors {', '.join(list(state)[:3])}; it belongs to another model")
    return SD3Adapters(info=info, parts=parts)


def _adapter(state: Mapping[str, Tensor], layers: LayerShapes, *, rank: int, what: str) -> Adapter:
    expected = {}
    for name, shape in layers.items():
        expected[f"{name}.lora_up.weight"], expected[f"{name}.lora_down.weight"] = pair_shapes(shape, rank)
    compare_keys(expected, {key: tuple(value.shape) for key, value in state.items()}, what=f"{what} (rank {rank} expected)")
    with torch.no_grad():
        return {
            name: LoraPair(
                up=state[f"{name}.lora_up.weight"].detach().float(), down=state[f"{name}.lora_down.weight"].detach().float()
            )
            for name in layers
        }


def write_released(
    folder: str | Path, *, transformer: Adapter, vae_encoder: Adapter, vae_base: StateDict, factors: Mapping[str, float]
) -> None:
    """Write the pair that the released code reads, `sr_lora.pkl` and `vae_encoder.pt`.

    Their factors are fixed, 1 and 8 / rank, so ours are folded into the `up` matrices.

    Args:
        vae_base: the plain encoder's state dict, without adapters.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = [x for pair in transformer.values() for x in (pair.up * factors["transformer"], pair.down)]
    _save(flat, folder / "sr_lora.pkl")
    state: StateDict = {}
    for name, value in vae_base.items():
        layer, _, leaf = name.rpartition(".")
        key = f"{layer}.base_layer.{leaf}" if layer in vae_encoder else name
        state[key] = value.detach().cpu().half()
    for layer, pair in vae_encoder.items():
        fold = factors["vae_encoder"] / (RELEASED_VAE_ALPHA / pair.rank)
        state[f"{layer}.lora_A.default_encoder.weight"] = pair.down.half()
        state[f"{layer}.lora_B.default_encoder.weight"] = (pair.up * fold).half()
    _save(state, folder / "vae_encoder.pt")


def _save(value: object, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    torch.save(value, partial)
    partial.replace(path)

"""Where the components of Stable Diffusion 3 come from: a folder in the diffusers layout, or a random generator."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from coz.checkpoint import WrongWeights, folder_digest, hub_folder, split_revision
from coz.models.diffusers_folder import (
    Shapes,
    check_component,
    header_shapes,
    load_component,
    load_text_encoder,
    meta_model,
)
from coz.models.random_tokenizers import CLIP_PAD_SD2, CLIP_PAD_SD3, clip_tokenizer, t5_tokenizer
from coz.models.sd3_sizes import SIZES, SD3Size

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
POSITION_TABLE = frozenset({"pos_embed.pos_embed"})  # the position table keeps float32: bf16 has 8 bits for its sines


class SD3Source(Protocol):
    """Hands out components. `shapes` and `fingerprint` need no weights."""

    @property
    def shapes(self) -> dict[str, Shapes]:
        """Names and shapes of every component's tensors; `text_encoder_3` may be missing."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the base weights."""
        ...

    @property
    def skeletons(self) -> tuple[SD3Transformer2DModel, AutoencoderKL]:
        """Transformer and VAE without memory, on the meta device."""
        ...

    def transformer(self, *, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel: ...
    def vae(self, *, dtype: torch.dtype, device: torch.device) -> AutoencoderKL: ...
    def text_encoder(self, name: str, *, dtype: torch.dtype) -> PreTrainedModel:
        """One of `TEXT_ENCODERS`, on the CPU."""
        ...

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer of one of `TEXT_ENCODERS`."""
        ...

    def first_timestep(self) -> float:
        """Where the scheduler starts a schedule of one step."""
        ...


def text_classes() -> dict[str, type[PreTrainedModel]]:
    """The class of each text encoder."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    return dict(zip(TEXT_ENCODERS, (*[CLIPTextModelWithProjection] * 2, T5EncoderModel), strict=True))


class FolderSource:
    """SD3 medium as a local folder or a hub id, checked on construction by the headers of its files.

    Raises:
        WeightsNotFound: the folder or its parts are not on this machine.
        WrongWeights: another model's or damaged files: names the first keys that differ.
    """

    def __init__(self, weights: str, *, text_encoder_3: bool = True) -> None:
        self._weights = weights
        self._patterns = [f"{part}/*.safetensors" for part in ("transformer", "vae", *TEXT_ENCODERS[: 2 + text_encoder_3])]
        if (Path(weights).expanduser() / "unet").is_dir():
            raise WrongWeights(
                f"weights={weights} holds a UNet, not SD3's transformer; give a Stable Diffusion 3 medium folder"
            )
        self.folder = hub_folder(
            weights,
            patterns=[*self._patterns, "scheduler/*.json"],
            what="Stable Diffusion 3 medium",
            size_gb=16,
            licence="its licence must be accepted on the hub first",
        )
        self._shapes = self._checked_shapes(text_encoder_3)

    def _checked_shapes(self, text_encoder_3: bool) -> dict[str, Shapes]:
        parts = zip(("transformer", "vae"), self.skeletons, strict=True)
        return {
            **{name: check_component(self.folder / name, skeleton) for name, skeleton in parts},
            **{name: header_shapes(self.folder / name) for name in TEXT_ENCODERS[: 2 + text_encoder_3]},
        }

    @property
    def shapes(self) -> dict[str, Shapes]:
        return self._shapes

    @property
    def fingerprint(self) -> str:
        if self.folder.parent.name == "snapshots":  # a hub's snapshot is named by its commit
            return f"{split_revision(self._weights)[0]}@{self.folder.name}"
        return folder_digest(self.folder, [*self._patterns, "*/*.json", "*/*.txt", "*/*.model"])

    @functools.cached_property
    def skeletons(self) -> tuple[SD3Transformer2DModel, AutoencoderKL]:
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        return (
            meta_model(SD3Transformer2DModel, self.folder / "transformer"),
            meta_model(AutoencoderKL, self.folder / "vae"),
        )

    def transformer(self, *, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
        from diffusers import SD3Transformer2DModel

        folder = self.folder / "transformer"
        return load_component(folder, SD3Transformer2DModel, dtype=dtype, device=device, keep_fp32=POSITION_TABLE)

    def vae(self, *, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        return load_component(self.folder / "vae", AutoencoderKL, dtype=dtype, device=device)

    def text_encoder(self, name: str, *, dtype: torch.dtype) -> PreTrainedModel:
        return load_text_encoder(self.folder / name, text_classes()[name], dtype=dtype)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        from transformers import CLIPTokenizer, T5TokenizerFast

        cls = T5TokenizerFast if name == TEXT_ENCODERS[2] else CLIPTokenizer
        folder = self.folder / name.replace("text_encoder", "tokenizer")
        try:
            return cls.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise WrongWeights(f"{folder} holds no tokenizer ({str(error).splitlines()[0]}); fetch it again") from error

    def first_timestep(self) -> float:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = FlowMatchEulerDiscreteScheduler.load_config(self.folder / "scheduler", local_files_only=True)
        return _first_timestep(config)


@dataclass(frozen=True)
class RandomSource:
    """The architecture with seeded random weights, for measuring and for dry runs; the global generators stay as they are.

    The small sizes give the same weights everywhere; those of `full` depend on the device that draws them.
    """

    size: str
    seed: int = 0
    text_encoder_3: bool = True

    @property
    def config(self) -> SD3Size:
        return SIZES[self.size]

    @property
    def shapes(self) -> dict[str, Shapes]:
        models: dict[str, torch.nn.Module] = dict(zip(("transformer", "vae"), self.skeletons, strict=True))
        with torch.device("meta"):
            models |= {name: self._text_model(name, torch.float32) for name in TEXT_ENCODERS[: 2 + self.text_encoder_3]}
        return {
            # tied tensors count once
            name: {key: tuple(value.shape) for key, value in [*model.named_parameters(), *_persistent_buffers(model)]}
            for name, model in models.items()
        }

    @property
    def fingerprint(self) -> str:
        return f"random(size={self.size}, seed={self.seed})"

    @functools.cached_property
    def skeletons(self) -> tuple[SD3Transformer2DModel, AutoencoderKL]:
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        return meta_model(SD3Transformer2DModel, self.config.transformer), meta_model(AutoencoderKL, self.config.vae)

    def transformer(self, *, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
        from diffusers import SD3Transformer2DModel

        with self._seeded(device, stream=0):
            model = SD3Transformer2DModel.from_config(self.config.transformer)
        table = model.pos_embed.pos_embed.to(device)
        model = torch.nn.Module.to(model, device, dtype)  # diffusers' own warns of a cast that is meant
        model.pos_embed.pos_embed = table
        return model.eval().requires_grad_(False)

    def vae(self, *, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        with self._seeded(device, stream=1):
            model = AutoencoderKL.from_config(self.config.vae)
        return torch.nn.Module.to(model, device, dtype).eval().requires_grad_(False)

    def text_encoder(self, name: str, *, dtype: torch.dtype) -> PreTrainedModel:
        device = torch.device("cuda" if self.size == "full" and torch.cuda.is_available() else "cpu")
        with self._seeded(device, stream=2 + TEXT_ENCODERS.index(name)):
            model = self._text_model(name, dtype)
        return model.to("cpu").eval().requires_grad_(False)

    def _text_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        from transformers import CLIPTextConfig, T5Config

        index = TEXT_ENCODERS.index(name)
        config = T5Config(**self.config.t5) if index == 2 else CLIPTextConfig(**self.config.clip[index])
        return text_classes()[name]._from_config(config, dtype=dtype)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        if name == TEXT_ENCODERS[2]:
            return t5_tokenizer()
        return clip_tokenizer(pad_token=CLIP_PAD_SD3 if name == TEXT_ENCODERS[0] else CLIP_PAD_SD2)

    def first_timestep(self) -> float:
        return _first_timestep({"num_train_timesteps": 1000, "shift": 3.0})

    @contextmanager
    def _seeded(self, device: torch.device, *, stream: int) -> Iterator[None]:
        """Draw on `device` (the small sizes on the CPU, so that they agree everywhere) from a generator of our own."""
        device = device if self.size == "full" else torch.device("cpu")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(1000 * self.seed + stream)
            yield


def _first_timestep(config: dict[str, Any]) -> float:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(1)
    return float(scheduler.timesteps[0])


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]

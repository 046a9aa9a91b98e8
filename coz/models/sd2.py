"""The parts of Stable Diffusion 2.x that several backbones share: networks, prompt embeddings, noise schedule, noise.

A model folder has diffusers' layout: `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`. Weights are read
strictly; a random model of the same architecture needs no file at all.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, compare_keys, folder_digest, hub_folder, load_tensors
from coz.errors import UserError
from coz.models.placement import Precision, pick_device, pick_dtype

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

Size = Literal["tiny", "full"]
Posterior = Literal["sample", "mode"]
PromptMerge = Literal["append", "replace"]
Config = dict[str, Any]

RANDOM = "random"
LATENT_PX = 8
"""Pixels per latent pixel."""
LAST_TIMESTEP = 999
"""Where one-step models work and where SeeSR's start noise belongs."""

FILES = {  # configuration first, then the weights
    "unet": ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
    "controlnet": ["controlnet/config.json", "controlnet/diffusion_pytorch_model.safetensors"],
    "vae": ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
    "text_encoder": ["text_encoder/config.json", "text_encoder/model.safetensors"],
    "tokenizer": ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"],
    "scheduler": ["scheduler/scheduler_config.json"],
}
BASE_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

# ---------------------------------------------------------------------------------------------------------------------
# architectures of random models

_SD2_UNET: Config = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": True,
    "sample_size": 64,
}
_SD2_VAE: Config = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
_SD2_TEXT: Config = {"max_position_embeddings": 77, "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2}
_SD2_SCHEDULER: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def architecture(size: Size) -> dict[str, Config]:
    """Configurations by part: `full` is SD2.x-base, `tiny` has the same structure with a few dozen channels.

    Raises:
        UserError: another size.
    """
    unet: Config
    vae: Config
    text: Config
    if size == "full":
        unet = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20]}
        unet |= {"cross_attention_dim": 1024, "norm_num_groups": 32}
        vae = {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
        text = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 23, "intermediate_size": 4096}
        text |= {"vocab_size": 49408, "projection_dim": 512}
    elif size == "tiny":
        unet = {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": [2, 4, 4, 4]}
        unet |= {"cross_attention_dim": 32, "norm_num_groups": 8}
        vae = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8}
        text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
        text |= {"vocab_size": 2048, "projection_dim": 32}
    else:
        raise UserError(f"size={size} is unknown; use tiny or full")
    control = {key: value for key, value in (_SD2_UNET | unet).items() if key not in ("up_block_types", "sample_size")}
    control["conditioning_embedding_out_channels"] = [16, 32, 96, 256] if size == "full" else [8, 8, 12, 16]
    return {
        "unet": _SD2_UNET | unet,
        "controlnet": control,
        "vae": _SD2_VAE | vae,
        "text_encoder": _SD2_TEXT | text,
        "scheduler": dict(_SD2_SCHEDULER),
    }


def build_random(build: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """Build a module with seeded initial weights; PyTorch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# folders


@dataclass(frozen=True)
class Weights:
    """Where a model's parts lie: a diffusers folder, or None for random weights of one size and seed."""

    name: str
    folder: Path | None
    parts: tuple[str, ...]
    size: Size = "full"
    seed: int = 0

    @classmethod
    def find(
        cls, weights: str, *, parts: Sequence[str], what: str, size_gb: float, size: Size = "full", seed: int = 0
    ) -> Weights:
        """Resolve a folder, a hub id or "random" without reading any weight.

        Raises:
            UserError: nothing of that name on this machine, files missing, or an unknown size.
        """
        if weights == RANDOM:
            architecture(size)
            return cls(weights, None, tuple(parts), size, seed)
        patterns = [pattern for part in parts for pattern in FILES[part]]
        folder = hub_folder(weights, patterns=patterns, what=what, size_gb=size_gb)
        return cls(weights, folder, tuple(parts))

    @property
    def identity(self) -> object:
        """JSON-able: `random` with size and seed, the hub's revision, or a digest of a local folder's files."""
        if self.folder is None:
            return {"weights": RANDOM, "size": self.size, "seed": self.seed}
        if not Path(self.name).expanduser().is_dir():
            return f"{self.name.partition('@')[0]}@{self.folder.name}"  # a snapshot's folder is named by its commit
        return folder_digest(self.folder, [pattern for part in self.parts for pattern in FILES[part]])

    def config(self, part: str) -> Config:
        """The configuration of one part."""
        if self.folder is None:
            return architecture(self.size)[part]
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return json.loads((self.folder / part / name).read_text())

    def state(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part of a folder."""
        assert self.folder is not None, "random weights have no files"
        path = self.folder / FILES[part][1]
        state = load_tensors(path)
        if not isinstance(state, dict):
            raise WrongWeights(f"{path} holds no tensors by name; use the checkpoint made for it")
        return state

    def load(self, part: str, build: Callable[[Config], nn.Module]) -> nn.Module:
        """Build one part and fill it: strictly from its file, or with seeded random weights."""
        config = self.config(part)
        if self.folder is None:
            return build_random(lambda: build(config), seed=self.seed + list(FILES).index(part))
        state = _modern_names(self.state(part)) if part != "text_encoder" else _plain_clip_names(self.state(part))
        return fill(lambda: build(config), state, what=f"{self.folder / part}")

    def unet(self) -> nn.Module:
        """The UNet, frozen, on the CPU."""
        return self.load("unet", build_unet)

    def vae(self) -> AutoencoderKL:
        """The autoencoder, frozen, on the CPU."""
        return self.load("vae", build_vae)

    def prompt_encoder(self, device: torch.device, dtype: torch.dtype) -> PromptEncoder:
        """Tokenizer and text encoder, on `device`."""
        from transformers import CLIPTokenizer

        from coz.models.random_tokenizers import CLIP_PAD_SD2, clip_tokenizer

        if self.folder is None:
            tokenizer = clip_tokenizer(pad_token=CLIP_PAD_SD2)
        else:
            tokenizer = CLIPTokenizer.from_pretrained(str(self.folder / "tokenizer"), local_files_only=True)
        return PromptEncoder(tokenizer, self.load("text_encoder", build_text_encoder).to(device, dtype))

    def alphas_cumprod(self) -> Tensor:
        """Cumulative alpha by timestep, (1000,) float32."""
        return alphas_cumprod(self.config("scheduler"))


@dataclass(frozen=True)
class Base:
    """A base model of the family: how people call it, the size of its download, and the parts that are needed of it."""

    what: str
    size_gb: float
    parts: tuple[str, ...] = BASE_PARTS

    def find(self, weights: str, *, size: Size, seed: int) -> Weights:
        """See `Weights.find`."""
        return Weights.find(weights, parts=self.parts, what=self.what, size_gb=self.size_gb, size=size, seed=seed)


def fill(build: Callable[[], nn.Module], state: Mapping[str, Tensor], *, what: str) -> nn.Module:
    """Build a module without allocating weights and give it `state`, strictly; frozen, in evaluation mode.

    Raises:
        WrongWeights: names the first keys that differ.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        net = build()
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    compare_keys(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what=what)
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def build_unet(config: Config) -> nn.Module:
    """diffusers' UNet of a configuration."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def build_vae(config: Config) -> AutoencoderKL:
    """diffusers' autoencoder of a configuration."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def build_text_encoder(config: Config) -> CLIPTextModel:
    """transformers' CLIP text model of a configuration."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}))


def _modern_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints written before 2023 name the autoencoder's attention by other words."""
    words = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for name, tensor in state.items():
        head, _, leaf = name.rpartition(".")
        stem, _, word = head.rpartition(".")
        renamed[f"{stem}.{words[word]}.{leaf}" if ".attentions." in name and word in words else name] = tensor
    return renamed


def _plain_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 dropped the prefix `text_model.`; the position numbers are no weights."""
    names = {name: name.removeprefix("text_model.") for name in state if not name.endswith("position_ids")}
    return {new: state[old] for old, new in names.items()}


# ---------------------------------------------------------------------------------------------------------------------
# placement, prompts, schedule, noise


@dataclass(frozen=True)
class Placement:
    """Device and number formats. The autoencoder overflows in fp16, so it runs in fp32 there."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def pick(cls, device: str, precision: Precision) -> Placement:
        """Resolve `auto` settings. Raises `UserError` for devices or formats that are not there."""
        picked = pick_device(device)
        return cls(picked, pick_dtype(precision, picked))

    @property
    def vae_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def place_vae(self, vae: AutoencoderKL) -> AutoencoderKL:
        """On a GPU in channels-last order, which its convolutions prefer; a CPU's group norm loses 1e-3 by that."""
        self.place(vae, dtype=self.vae_dtype)
        return vae.to(memory_format=torch.channels_last) if self.device.type == "cuda" else vae

    def place(self, net: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Move a network to the device and its number format, in place."""
        return nn.Module.to(net, self.device, dtype or self.dtype)  # diffusers' own `to` warns of every change of format

    def fingerprint(self) -> str:
        """The number format, as it shapes the output."""
        return str(self.dtype).removeprefix("torch.")


class PromptEncoder:
    """Texts → embeddings (B, 77, C): last hidden state after the final norm, padded and cut to 77 tokens, no mask.

    Embeddings are remembered by text (least recently used first out), so a prompt that recurs is encoded once.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, *, capacity: int = 512) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.capacity = capacity
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """(B, 77) token numbers."""
        texts = [str(prompt) for prompt in prompts]
        return self.tokenizer(texts, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, 77, C) on the text encoder's device, in its number format."""
        texts = [str(prompt) for prompt in prompts]
        found = {text: self._remembered[text] for text in texts if text in self._remembered}
        new = list(dict.fromkeys(text for text in texts if text not in found))
        if new:
            embeds = self.text_encoder(self.ids(new).to(self.text_encoder.device))[0]
            found.update(zip(new, embeds, strict=True))
        for text in texts:
            self._remembered[text] = found[text]
            self._remembered.move_to_end(text)
        while len(self._remembered) > self.capacity:
            self._remembered.popitem(last=False)
        return torch.stack([found[text] for text in texts])


def alphas_cumprod(scheduler: Config) -> Tensor:
    """Cumulative alpha of SD2's noise schedule, (T,) float32, from a scheduler's configuration.

    Raises:
        UserError: a schedule that these backbones do not use.
    """
    kind, prediction = scheduler["beta_schedule"], scheduler.get("prediction_type", "epsilon")
    if kind != "scaled_linear" or prediction != "epsilon":
        raise UserError(
            f"the scheduler has beta_schedule={kind}, prediction_type={prediction}, not scaled_linear and epsilon; "
            "use the -base variant of Stable Diffusion 2"
        )
    steps = scheduler["num_train_timesteps"]
    betas = torch.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5, steps, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)


def estimate_clean(latent: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x0 = (x - sqrt(1 - a) e) / sqrt(a): (B, 4, h, w) each → same, `alpha` the cumulative alpha a."""
    return (latent - (1 - alpha).sqrt() * noise) / alpha.sqrt()


def generators(seeds: Sequence[int] | None, count: int) -> list[torch.Generator]:
    """One generator on the CPU per image, so that equal seeds give equal noise on any device and in any batch."""
    seeds = [0] * count if seeds is None else list(seeds)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_noise(sources: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal (B, *shape), each image from its own generator."""
    return torch.stack([torch.randn(*shape, generator=source) for source in sources]).to(device)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a setting that is not one of its choices. Raises `UserError`."""
    if value not in choices:
        raise UserError(f"{name}={value} is unknown; use {' or '.join(choices)}")


def check_positive(**settings: int) -> None:
    """Refuse counts below one. Raises `UserError`."""
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")


def texts_of(prompts: Sequence[str] | None, count: int) -> list[str]:
    """One text per image; None stands for empty ones."""
    texts = [""] * count if prompts is None else [str(prompt) for prompt in prompts]
    if len(texts) != count:
        raise ValueError(f"{len(texts)} prompts for {count} images")
    return texts

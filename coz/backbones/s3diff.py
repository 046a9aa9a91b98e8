"""S3Diff, a baseline of Table 2: one step of sd-turbo whose adapters are modulated by the picture's degradation.

Zhang et al., "Degradation-Guided One-Step Image Super-Resolution with Diffusion Priors", 2024, from the authors'
`s3diff.pkl` and `de_net.pth`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, file_digest, load_tensors, local_file
from coz.errors import UserError
from coz.image import ColorFix, Size, as_size, fix_color, quantize, resize
from coz.models import latent_tiles, sd2, sd2_lora
from coz.models.degradation_modulation import DegradationNet, Modulator
from coz.models.sd2_backbone import SD2Backbone

UPSCALE = 4
PAD_MULTIPLE_PX = 64
POSITIVE = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
NEGATIVE = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"

_UNET_ROWS, _VAE_ROWS = 10, 6
_ADAPTERS = {"unet": "default", "vae": "vae_skip"}
_NEEDED = [
    *("unet_lora_target_modules", "vae_lora_target_modules", "rank_unet", "rank_vae", "w", "state_embeddings"),
    *(f"state_dict_{net}{part}" for net in _ADAPTERS for part in ("", "_de_mlp", "_block_mlp", "_fuse_mlp")),
]


@dataclass(kw_only=True, eq=False, repr=False)
class S3Diff(SD2Backbone):
    """One-step 4x super-resolution.

    A view is first brought to a quarter of the target, as the authors' code expects pictures to be enlarged four times.

    Args: those of `SD2Backbone` (its `weights` are sd-turbo), and
        checkpoint, degradation_checkpoint: the authors' `s3diff.pkl` and `de_net.pth`; None only with random weights.
        positive_prompt, negative_prompt, guidance_scale: the authors'; a scale of 1 leaves the negative prompt out.
        prompt_merge: `append` a given prompt to the positive one, or let it `replace` it. An empty one changes nothing.
        color_fix: the authors' default is wavelet.
        fold_lora: work picture by picture and fold its modulated adapters into the weights at every call (1.3x faster per
            picture on a CPU; not measured on a GPU); False keeps them beside and lets calls mix pictures.
    """

    weights: str = "stabilityai/sd-turbo"
    checkpoint: str | Path | None = None
    degradation_checkpoint: str | Path | None = None
    positive_prompt: str = POSITIVE
    negative_prompt: str = NEGATIVE
    guidance_scale: float = 1.07
    prompt_merge: sd2.PromptMerge = "append"
    color_fix: ColorFix = "wavelet"
    fold_lora: bool = True

    name = "s3diff"
    base = sd2.Base("sd-turbo", 5.2)
    shaping = ("positive_prompt", "negative_prompt", "guidance_scale", "prompt_merge", "fold_lora")

    def __post_init__(self) -> None:
        super().__post_init__()
        sd2.check_choice("prompt_merge", self.prompt_merge, ["append", "replace"])
        self.guidance_scale = float(self.guidance_scale)
        self.files: dict[str, Path] = {}
        given = {"checkpoint": self.checkpoint, "degradation_checkpoint": self.degradation_checkpoint}
        for name, path in given.items():
            if path is not None:
                self.files[name] = local_file(path, what=name)
            elif self.weights != sd2.RANDOM:
                raise UserError(f"{name} is not set; give the path of the authors' s3diff.pkl (checkpoint), de_net.pth (other)")

    def checkpoint_identities(self) -> Mapping[str, object]:
        return {name: file_digest(path) for name, path in self.files.items()}

    def load(self) -> None:
        """Read the weights and put them on the device."""
        if self._unet is not None:
            return
        unet, vae = self.source.unet(), self.source.vae()
        what = str(self.files.get("checkpoint", "the random checkpoint"))
        if "checkpoint" in self.files:
            state = load_tensors(self.files["checkpoint"])
        else:
            ranks = {"unet": 32, "vae": 16} if self.source.size == "full" else {"unet": 4, "vae": 4}
            state = random_checkpoint(unet, vae, ranks=ranks, seed=self.source.seed)
        adapted = adapt(unet, vae, state, fold=self.fold_lora, what=what)
        if "degradation_checkpoint" in self.files:
            path = self.files["degradation_checkpoint"]
            degradation = DegradationNet.from_state(load_tensors(path), what=str(path))
        else:
            widths = (64, 128) if self.source.size == "full" else (8, 12)
            degradation = sd2.build_random(lambda: DegradationNet.of_width(*widths), seed=self.source.seed + 102)
        device = self.placement.device
        self._degradation = degradation.to(device)  # both in float32: they are small, and scores steer everything
        self._modulators = {net: modulator.to(device) for net, (_, modulator) in adapted.items()}
        self._modulations = {net: modulation for net, (modulation, _) in adapted.items()}
        self.place(unet=unet, vae=vae)

    @torch.no_grad()
    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """See `coz.backbones.base`."""
        self.load()
        height, width = as_size(size)
        quarter = resize(lr, (-(-height // UPSCALE), -(-width // UPSCALE)))
        image = self.enlarge(quarter, texts=self.positive_texts(sd2.texts_of(prompts, len(lr))), seeds=seeds)
        return resize(image, (height, width))  # changes nothing where the target is a multiple of 4

    def enlarge(self, lr: Tensor, *, texts: Sequence[str], seeds: Sequence[int] | None, noise: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) in [0, 1] → (B, 3, 4h, 4w) in [0, 1], on the CPU.

        Args:
            texts: whole positive prompts.
            noise: (B, 4, h', w') for the posterior's sample, in place of the seeds'.
        """
        upsampled = upsample(lr.to(self.placement.device))
        x = pad_reflect((upsampled * 2 - 1).clamp(-1, 1), multiple=PAD_MULTIPLE_PX)
        if noise is None and self.posterior == "sample":
            shape = (4, x.shape[-2] // sd2.LATENT_PX, x.shape[-1] // sd2.LATENT_PX)
            noise = sd2.draw_noise(sd2.generators(seeds, len(lr)), shape, self.placement.device)
        matrices = self.modulate(self.score(lr))
        latent = self.codec.latent(self.moments(x, matrices["vae"]), noise)
        positive, negative = self.encode_prompts(texts), self.encode_prompts([self.negative_prompt])
        prediction = self.predict(latent, positive, negative, matrices["unet"])
        decoded = self.codec.decode(self.denoise(latent, prediction))
        return self.finish(decoded, upsampled)

    def finish(self, decoded: Tensor, upsampled: Tensor) -> Tensor:
        """Crop the padding and fix the colors on 8-bit pictures, as the authors do: → (B, 3, 4h, 4w), on the CPU."""
        height, width = upsampled.shape[-2:]
        image = decoded[..., :height, :width].clamp(-1, 1).cpu() * 0.5 + 0.5
        target, source = (quantize(picture, rounding="truncate") for picture in (image, upsampled))
        return fix_color(target, source, self.color_fix).clamp(0, 1)

    def positive_texts(self, prompts: Sequence[str]) -> list[str]:
        """How given prompts join the model's own positive one."""
        if self.prompt_merge == "replace":
            return [text or self.positive_prompt for text in prompts]
        return [f"{self.positive_prompt} {text}".strip() for text in prompts]

    @torch.no_grad()
    def score(self, lr: Tensor) -> Tensor:
        """Degradation scores: (B, 3, h, w) in [0, 1] → (B, 2)."""
        return self._degradation(lr.to(self.placement.device))

    @torch.no_grad()
    def modulate(self, scores: Tensor) -> dict[str, Tensor]:
        """(B, 2) → for `unet` and `vae` (B, rows, r, r)."""
        return {net: modulator(scores) for net, modulator in self._modulators.items()}

    def moments(self, x: Tensor, matrices: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], modulated by (B, 6, r, r) → (B, 8, H/8, W/8)."""
        parts = []
        for owners in torch.arange(len(x)).split(1 if self.fold_lora else self.vae_batch_size):
            self._modulations["vae"].use(matrices, owners)
            parts.append(self.codec.moments(x[owners.to(x.device)]))
        return torch.cat(parts)

    @torch.no_grad()
    def predict(self, latent: Tensor, positive: Tensor, negative: Tensor, matrices: Tensor) -> Tensor:
        """Guided noise prediction at timestep 999, in tiles if need be: (B, 4, h, w) → same, float32.

        Args:
            positive, negative: embeddings (B, 77, C), or (1, 77, C) for all images.
            matrices: (B, 10, r, r).
        """
        device, dtype = self.placement.device, self.placement.dtype
        unet = self._unet
        assert unet is not None, "load() was not called"
        embeds = [e.to(device, dtype).expand(len(latent), -1, -1) for e in (positive, negative)]
        if self.guidance_scale == 1:
            embeds = embeds[:1]

        def call(crops: Tensor, owners: Tensor, _: list[latent_tiles.Box], first: int = 0) -> Tensor:
            owners = owners + first
            self._modulations["unet"].use(matrices, owners.repeat(len(embeds)))
            text = torch.cat([e[owners.to(device)] for e in embeds])
            crops = crops.to(dtype).repeat(len(embeds), 1, 1, 1)
            halves = unet(crops, sd2.LAST_TIMESTEP, text, return_dict=False)[0].float().chunk(len(embeds))
            return halves[0] if len(embeds) == 1 else torch.lerp(halves[1], halves[0], self.guidance_scale)

        step = 1 if self.fold_lora else len(latent)
        parts = latent.split(step)
        return torch.cat([self.in_tiles(part, functools.partial(call, first=i * step)) for i, part in enumerate(parts)])


def upsample(lr: Tensor) -> Tensor:
    """Bilinear, without antialiasing: (B, 3, h, w) → (B, 3, 4h, 4w)."""
    return F.interpolate(lr, scale_factor=UPSCALE, mode="bilinear")


def pad_reflect(x: Tensor, *, multiple: int) -> Tensor:
    """Mirror the right and bottom to multiples of `multiple`; pictures smaller than the padding are mirrored repeatedly."""

    def mirrored(length: int) -> Tensor:
        position = torch.arange(length + -length % multiple, device=x.device)
        period = max(2 * (length - 1), 1)
        return (length - 1) - ((position % period) - (length - 1)).abs() if length > 1 else torch.zeros_like(position)

    return x[..., mirrored(x.shape[-2]), :][..., mirrored(x.shape[-1])]


# ---------------------------------------------------------------------------------------------------------------------
# s3diff.pkl


def _unet_row(name: str) -> int:
    part, *rest = name.split(".")
    first = {"down_blocks": 0, "mid_block": 4, "up_blocks": 5}
    if part not in first:
        return 9
    return first[part] if part == "mid_block" else first[part] + int(rest[0])


def _vae_row(name: str) -> int:
    _, part, *rest = name.split(".")  # all of them begin with "encoder."
    return int(rest[0]) if part == "down_blocks" else 4 if part == "mid_block" else 5


def checkpoint_layers(unet: nn.Module, vae: nn.Module, targets: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The adapter of every adapted layer, for `unet` and `vae`, by the targets that the file names."""
    nets = {"unet": unet, "vae": vae}
    return {
        net: dict.fromkeys(sd2_lora.matching_layers(nets[net], targets[f"{net}_lora_target_modules"]), adapter)
        for net, adapter in _ADAPTERS.items()
    }


def random_checkpoint(unet: nn.Module, vae: nn.Module, *, ranks: Mapping[str, int], seed: int) -> dict[str, Any]:
    """What `s3diff.pkl` holds, seeded and random; the released ranks are 32 (`unet`) and 16 (`vae`)."""
    state: dict[str, Any] = {f"rank_{net}": rank for net, rank in ranks.items()}
    state |= {"unet_lora_target_modules": list(sd2_lora.UNET_TARGETS), "vae_lora_target_modules": sd2_lora.VAE_TARGETS}
    embeddings: dict[str, Any] = {}
    for index, (net, layers) in enumerate(checkpoint_layers(unet, vae, state).items()):
        shapes = sd2_lora.adapter_shapes(unet if net == "unet" else vae, layers, rank=ranks[net])
        state[f"state_dict_{net}"] = sd2_lora.random_adapters(shapes, seed=seed + 100 + index)
        rows = _UNET_ROWS if net == "unet" else _VAE_ROWS
        build = functools.partial(Modulator, rows=rows, rank=ranks[net], frequencies=64)
        modulator = sd2.build_random(build, seed=seed + 103 + index)
        modulator.frequencies.copy_(torch.randn(64, generator=torch.Generator().manual_seed(seed)))
        entries = modulator.to_checkpoint(net)
        embeddings |= entries.pop("state_embeddings")
        state |= entries
    state["state_dict_unet"] |= {f"conv_in.{name}": tensor for name, tensor in unet.conv_in.state_dict().items()}
    return state | {"state_embeddings": embeddings}


@torch.no_grad()
def adapt(
    unet: nn.Module, vae: nn.Module, state: Any, *, fold: bool, what: str
) -> dict[str, tuple[sd2_lora.Modulation, Modulator]]:
    """Put modulated adapters into both networks, and the file's input layer into the UNet.

    Returns:
        for `unet` and `vae`: where to set the matrices, and what computes them.

    Raises:
        WrongWeights: names the first keys that the networks or the format do not know.
    """
    missing = [key for key in _NEEDED if not isinstance(state, dict) or key not in state]
    if missing:
        raise WrongWeights(f"{what} lacks {', '.join(missing[:3])}; give the authors' s3diff.pkl")
    layers = checkpoint_layers(unet, vae, state)
    conv_in = {f"conv_in.{name}": tuple(tensor.shape) for name, tensor in unet.conv_in.state_dict().items()}
    adapted = {}
    for net, module, rows, row_of in (("unet", unet, _UNET_ROWS, _unet_row), ("vae", vae, _VAE_ROWS, _vae_row)):
        rank, tensors = state[f"rank_{net}"], state[f"state_dict_{net}"]
        also = conv_in if net == "unet" else None
        adapters = sd2_lora.read_adapters(module, tensors, layers[net], rank=rank, what=f"{what}: state_dict_{net}", also=also)
        modulator = Modulator.from_checkpoint(state, net, rows=rows, rank=rank, what=what)
        modulation = sd2_lora.Modulation()
        adapted[net] = (modulation, modulator)
        sd2_lora.attach_modulated(module, adapters, modulation=modulation, row_of=row_of, fold=fold)
    unet.conv_in.load_state_dict({name: state["state_dict_unet"][f"conv_in.{name}"] for name in ("weight", "bias")})
    return adapted

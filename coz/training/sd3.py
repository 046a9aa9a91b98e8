"""Stable Diffusion 3 under training: adapters over the AdaLN layers and the VAE's encoder, as Chain-of-Zoom trains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from coz.errors import UserError
from coz.models.lora import Adapter
from coz.models.lora_files import LoraInfo, SD3Adapters, write_adapters, write_released
from coz.models.placement import Precision, pick_device, pick_dtype
from coz.models.sd3 import SD3OneStep, adaln_layers, encoder_layers
from coz.models.sd3_adapters import read_sd3_adapters
from coz.models.sd3_sizes import SIZES
from coz.models.sd3_source import FolderSource, RandomSource, SD3Source
from coz.models.sd3_text import PromptEncoder
from coz.models.switched_lora import AdapterSwitch, adapter_parameters, attach, detach, fresh_adapter
from coz.models.trained import base_of, write_note
from coz.training.diffusion import FlowProcess, Process, ReleasedFlowProcess
from coz.training.one_step import GENERATOR, REGULARISER, Embeds

_VAE_PX = 8


class SD3Nets(nn.Module):
    """Generator, regulariser and teacher over one SD3.

    Args:
        weights: a folder in SD3 medium's layout, its hub id, `random`, or a folder that train_sr.py wrote, to go on from.
        size, seed: of random weights.
        lora, vae_encoder: adapters to start from (see `OSEDiffSD3`); None starts at the base model.
        rank: of new adapters.
        device, precision: of the frozen base; adapters are float32 always.
        released: losses as the released code has them, for parity: schedule bent twice, one time for a whole batch, AdaLN
            outputs rounded to half where `half_modulations`.
        text_encoder_3: whether to use T5.
        gradient_checkpointing: keep less for the backward pass and compute it again: less memory, a third more time.
        remember_prompts: embeddings that are kept, about 5 MB each in bf16.
    """

    clamps_image = False

    def __init__(
        self,
        *,
        weights: str,
        size: str = "full",
        seed: int = 0,
        lora: str | None = None,
        vae_encoder: str | None = None,
        rank: int = 4,
        device: str = "auto",
        precision: Precision = "auto",
        released: bool = False,
        half_modulations: bool = False,
        text_encoder_3: bool = True,
        gradient_checkpointing: bool = False,
        remember_prompts: int = 256,
    ) -> None:
        super().__init__()
        found = base_of(weights, backbone="osediff_sd3", size=size, seed=seed, file="lora", given=lora)
        weights, size, seed, lora = found
        if weights == "random" and size not in SIZES:
            raise UserError(f"size={size} is unknown; use {' or '.join(SIZES)}")
        if rank < 1:
            raise UserError(f"rank={rank} must be at least 1")
        self._base = {"weights": weights} | ({"size": size, "seed": seed} if weights == "random" else {})
        self._weights, self._seed, self._rank = weights, seed, rank
        self._device = pick_device(device)
        self._dtype = pick_dtype(precision, self._device)
        if self._dtype == torch.float16:
            raise UserError("precision=fp16 is too coarse for training; use bf16 or fp32")
        self._source: SD3Source
        if weights == "random":
            self._source = RandomSource(size=size, seed=seed, text_encoder_3=text_encoder_3)
        else:
            self._source = FolderSource(weights, text_encoder_3=text_encoder_3)
        self._half_modulations, self._text_encoder_3 = half_modulations, text_encoder_3
        self._gradient_checkpointing, self._remember = gradient_checkpointing, remember_prompts
        self.process: Process = ReleasedFlowProcess() if released else FlowProcess()
        transformer, vae = self._source.skeletons
        self._context_width = transformer.config.joint_attention_dim
        self._channels = vae.config.latent_channels
        self._start: SD3Adapters | None = None
        if lora is not None:
            self._start = read_sd3_adapters(lora, vae_encoder, transformer, vae, rank=None)
            self._rank = self._start.info.rank
        self._switch = AdapterSwitch()

    def load(self) -> None:
        """Read the weights and put fresh or given adapters beside them."""
        device, dtype = self._device, self._dtype
        self.transformer = self._source.transformer(dtype=dtype, device=device)
        self.vae = self._source.vae(dtype=dtype, device=device)
        start = self._start or self._fresh()
        if start.vae_base is not None:
            self.vae.encoder.load_state_dict(start.vae_base)
        self._factors = start.info.factors
        regulariser = fresh_adapter(adaln_layers(self.transformer), rank=self._rank, seed=self._seed + 1)
        self.attach(start.parts["transformer"], start.parts["vae_encoder"], regulariser)
        if self._gradient_checkpointing:
            for net in (self.transformer, self.vae):
                net.enable_gradient_checkpointing(self._switch.checkpointing())
        # in lists, so as not to be submodules: the text encoders are no part of what is trained, and the other is a view
        self._text: list[PromptEncoder] = []
        self._model = [
            SD3OneStep(self.transformer, self.vae, timestep=self._source.first_timestep(), encode_shift=True),
        ]

    def attach(self, transformer: Adapter, vae_encoder: Adapter, regulariser: Adapter) -> None:
        """Put the three adapters beside the networks."""
        adapters = {GENERATOR: (transformer, self._factors["transformer"]), REGULARISER: (regulariser, 1.0)}
        attach(self.transformer, self._switch, adapters, half_output=self._half_modulations)
        attach(self.vae.encoder, self._switch, {GENERATOR: (vae_encoder, self._factors["vae_encoder"])})

    def _fresh(self) -> SD3Adapters:
        parts = {"transformer": adaln_layers(self.transformer), "vae_encoder": encoder_layers(self.vae)}
        adapters = {
            part: fresh_adapter(layers, rank=self._rank, seed=self._seed + 2 + i)
            for i, (part, layers) in enumerate(parts.items())
        }
        info = LoraInfo(rank=self._rank, encode_shift=True, base=self._weights)
        return SD3Adapters(info=info, parts=adapters)

    def _prompt_encoder(self) -> PromptEncoder:
        encoder = PromptEncoder(
            self._source,
            context_width=self._context_width,
            dtype=self._dtype,
            device=self._device,
            use_t5=self._text_encoder_3,
            placement="visit",
            remember=self._remember,
        )
        encoder.load()
        return encoder

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        return self._switch.use(adapter)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._channels, height // _VAE_PX, width // _VAE_PX

    def embed(self, prompts: Sequence[str]) -> Embeds:
        if not self._text:
            self._text = [self._prompt_encoder()]
        return self._text[0](list(prompts))

    def encode(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return self._model[0].encode_image(x, noise)

    def restore_latent(self, latent: Tensor, embeds: Embeds) -> Tensor:
        return latent - self._model[0].velocity(latent, *embeds)

    def decode(self, latent: Tensor) -> Tensor:
        return self._model[0].decode(latent)

    def predict(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor:
        prompt_embeds, pooled_embeds = embeds
        return self._model[0].velocity(noisy, prompt_embeds, pooled_embeds, timestep=times)

    def trained(self, adapter: str) -> Mapping[str, nn.Parameter]:
        parts = {"transformer": self.transformer, "vae.encoder": self.vae.encoder}
        return {
            f"{part}.{name}": parameter
            for part, net in parts.items()
            for name, parameter in adapter_parameters(net, adapter).items()
        }

    def write(self, folder: Path) -> Mapping[str, str]:
        """Our own format: one file with both adapters and what they belong to."""
        info = LoraInfo(rank=self._rank, encode_shift=True, base=self._weights, factors=self._factors)
        parts = {"transformer": detach(self.transformer, GENERATOR), "vae_encoder": detach(self.vae.encoder, GENERATOR)}
        write_adapters(folder / "lora.safetensors", parts, info)
        write_note(folder, backbone="osediff_sd3", files={"lora": "lora.safetensors"}, base=self._base)
        return {"backbone": "osediff_sd3", "backbone.weights": str(folder)}

    def write_released(self, folder: Path) -> None:
        """The pair that Chain-of-Zoom's code reads. It leaves the shift out at encoding, with which we train."""
        vae = {
            name.replace(".base.", "."): value
            for name, value in self.vae.encoder.state_dict().items()
            if ".up." not in name and ".down." not in name
        }
        write_released(
            folder,
            transformer=detach(self.transformer, GENERATOR),
            vae_encoder=detach(self.vae.encoder, GENERATOR),
            vae_base=vae,
            factors=self._factors,
        )

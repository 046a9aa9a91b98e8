"""Stable Diffusion 2.1 under training, as OSEDiff trains it: adapters over the UNet and the autoencoder's encoder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from coz.backbones.osediff_sd21 import OSEDiffSD21, adapter_layers
from coz.checkpoint import WrongWeights, load_tensors, local_file
from coz.errors import UserError
from coz.models import sd2, sd2_lora
from coz.models.lora import Adapter, LoraPair, layer_shapes, set_submodule
from coz.models.placement import Precision
from coz.models.switched_lora import AdapterSwitch, SwitchedBase, adapter_parameters, attach, detach, fresh_adapter
from coz.models.trained import base_of, write_note
from coz.store import write_atomic
from coz.training.diffusion import EpsilonProcess
from coz.training.one_step import GENERATOR, REGULARISER, Embeds

# how osediff.pkl names the lists of the UNet's layers, and their adapters
UNET_GROUPS = {
    "unet_lora_encoder_modules": "default_encoder",
    "unet_lora_decoder_modules": "default_decoder",
    "unet_lora_others_modules": "default_others",
}
VAE_GROUP, VAE_ADAPTER = "vae_lora_encoder_modules", "default_encoder"


class SD21Nets(nn.Module):
    """Generator, regulariser and teacher over one SD2.1-base.

    Args:
        weights: a folder, a hub id, `random`, or a folder that train_sr.py wrote, to go on from.
        size, seed: of random weights.
        checkpoint: an `osediff.pkl` to start from; None starts at the base model.
        rank: of new adapters.
        device, precision: of the frozen base; adapters are float32 always.
        regulariser_layers: `all`, or `others`, the middle block alone, as the released trainer does without meaning to.
        clamp_image: clamp the image before the pixel losses, as the released trainer does; gradients vanish where it clips.
        gradient_checkpointing: keep less for the backward pass and compute it again: less memory, a third more time.
    """

    def __init__(
        self,
        *,
        weights: str,
        size: sd2.Size = "full",
        seed: int = 0,
        checkpoint: str | None = None,
        rank: int = 4,
        device: str = "auto",
        precision: Precision = "auto",
        regulariser_layers: Literal["all", "others"] = "all",
        clamp_image: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        found = base_of(weights, backbone="osediff_sd21", size=size, seed=seed, file="checkpoint", given=checkpoint)
        weights, size, seed, checkpoint = found
        self._base = {"weights": weights} | ({"size": size, "seed": seed} if weights == sd2.RANDOM else {})
        sd2.check_choice("regulariser_layers", regulariser_layers, ["all", "others"])
        sd2.check_positive(rank=rank)
        self._placement = sd2.Placement.pick(device, precision)
        if self._placement.dtype == torch.float16:
            raise UserError("precision=fp16 is too coarse for training; use bf16 or fp32")
        self._source = OSEDiffSD21.base.find(weights, size=size, seed=seed)
        self._checkpoint = None if checkpoint is None else local_file(checkpoint, what="checkpoint")
        self._seed, self._rank = seed, rank
        self._regulariser_layers, self._gradient_checkpointing = regulariser_layers, gradient_checkpointing
        self.clamps_image = clamp_image
        self.process = EpsilonProcess(self._source.alphas_cumprod())
        self._alpha = self._source.alphas_cumprod()[sd2.LAST_TIMESTEP]
        self._switch = AdapterSwitch()
        self._text: list[sd2.PromptEncoder] = []  # in a list: the text encoder is no part of what is trained

    def load(self) -> None:
        """Read the weights and put fresh or given adapters beside them."""
        self.unet = self._placement.place(self._source.unet())
        self.vae = self._placement.place_vae(self._source.vae())
        start = self._read() if self._checkpoint else self._fresh()
        self._layers = {group: list(start[group]) for group in (*UNET_GROUPS, VAE_GROUP)}
        regulariser = self._regulariser()
        ranks = {"unet": int(start["rank_unet"]), "vae": int(start["rank_vae"])}
        self._ranks = ranks
        unet = self._pairs(start["state_dict_unet"], self._unet_layers())
        vae = self._pairs(start["state_dict_vae"], dict.fromkeys(self._layers[VAE_GROUP], VAE_ADAPTER))
        conv_in = self.unet.conv_in
        own = {leaf: start["state_dict_unet"][f"conv_in.base_layer.{leaf}"] for leaf in ("weight", "bias")}
        attach(
            self.unet,
            self._switch,
            {
                GENERATOR: (unet, sd2_lora.ALPHA / ranks["unet"]),
                REGULARISER: (regulariser, sd2_lora.ALPHA / self._rank),
            },
        )
        set_submodule(self.unet, "conv_in.base", SwitchedBase(conv_in, self._switch, GENERATOR, **own))
        attach(self.vae, self._switch, {GENERATOR: (vae, sd2_lora.ALPHA / ranks["vae"])})
        if self._gradient_checkpointing:
            for net in (self.unet, self.vae):
                net.enable_gradient_checkpointing(self._switch.checkpointing())

    def _unet_layers(self) -> dict[str, str]:
        return sd2_lora.by_adapter((adapter, self._layers[group]) for group, adapter in UNET_GROUPS.items())

    def _read(self) -> dict:
        assert self._checkpoint is not None
        state = load_tensors(self._checkpoint)
        needed = [*UNET_GROUPS, VAE_GROUP, "rank_unet", "rank_vae", "state_dict_unet", "state_dict_vae"]
        missing = [key for key in needed if not isinstance(state, dict) or key not in state]
        if missing:
            raise WrongWeights(f"{self._checkpoint} lacks {', '.join(missing[:3])}; give the authors' osediff.pkl")
        return state

    def _fresh(self) -> dict:
        """What `osediff.pkl` holds, with adapters that change nothing yet."""
        layers = adapter_layers(self.unet, self.vae)
        unet_layers = sd2_lora.by_adapter((adapter, layers[group]) for group, adapter in UNET_GROUPS.items())
        unet_state: dict[str, Tensor] = {}
        vae_state: dict[str, Tensor] = {}
        for net, adapters, state, seed in (
            (self.unet, unet_layers, unet_state, self._seed + 2),
            (self.vae, dict.fromkeys(layers[VAE_GROUP], VAE_ADAPTER), vae_state, self._seed + 3),
        ):
            fresh = fresh_adapter(layer_shapes(net, adapters), rank=self._rank, seed=seed)
            for name, pair in fresh.items():
                state[f"{name}.lora_A.{adapters[name]}.weight"] = pair.down
                state[f"{name}.lora_B.{adapters[name]}.weight"] = pair.up
        unet_state |= {f"conv_in.base_layer.{leaf}": getattr(self.unet.conv_in, leaf) for leaf in ("weight", "bias")}
        return {
            **layers,
            "rank_unet": self._rank,
            "rank_vae": self._rank,
            "state_dict_unet": unet_state,
            "state_dict_vae": vae_state,
        }

    def _regulariser(self) -> Adapter:
        names = self._unet_layers()
        if self._regulariser_layers == "others":
            names = {name: adapter for name, adapter in names.items() if adapter == "default_others"}
        return fresh_adapter(layer_shapes(self.unet, names), rank=self._rank, seed=self._seed + 1)

    @staticmethod
    def _pairs(state: Mapping[str, Tensor], adapters: Mapping[str, str]) -> Adapter:
        try:
            return {
                name: LoraPair(
                    up=state[f"{name}.lora_B.{adapter}.weight"].float(), down=state[f"{name}.lora_A.{adapter}.weight"].float()
                )
                for name, adapter in adapters.items()
            }
        except KeyError as error:
            raise WrongWeights(f"the checkpoint lists a layer but lacks {error}; give the authors' osediff.pkl") from error

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        return self._switch.use(adapter)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 4, height // sd2.LATENT_PX, width // sd2.LATENT_PX

    def embed(self, prompts: Sequence[str]) -> Embeds:
        if not self._text:
            self._text = [self._source.prompt_encoder(self._placement.device, self._placement.dtype)]
        return (self._text[0](list(prompts)),)

    def encode(self, x: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.vae.encode(x.to(self._placement.device, self._placement.vae_dtype).contiguous()).latent_dist
        latent = posterior.mean.float()
        if noise is not None:
            latent = latent + (0.5 * posterior.logvar.float()).exp() * noise
        return latent * self.vae.config.scaling_factor

    def restore_latent(self, latent: Tensor, embeds: Embeds) -> Tensor:
        times = torch.full((len(latent),), sd2.LAST_TIMESTEP, device=latent.device)
        return sd2.estimate_clean(latent, self.predict(latent, times, embeds), self._alpha.to(latent.device))

    def decode(self, latent: Tensor) -> Tensor:
        z = (latent / self.vae.config.scaling_factor).to(self._placement.vae_dtype).contiguous()
        return self.vae.decode(z, return_dict=False)[0].float()

    def predict(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor:
        dtype = self._placement.dtype
        return self.unet(noisy.to(dtype), times, embeds[0].to(noisy.device, dtype), return_dict=False)[0].float()

    def trained(self, adapter: str) -> Mapping[str, nn.Parameter]:
        parts = {"unet": self.unet, "vae": self.vae}
        return {
            f"{part}.{name}": parameter
            for part, net in parts.items()
            for name, parameter in adapter_parameters(net, adapter).items()
        }

    def write(self, folder: Path) -> Mapping[str, str]:
        """`osediff.pkl`, which the authors' code reads too, and a note on its base."""
        self._write_pkl(folder)
        write_note(folder, backbone="osediff_sd21", files={"checkpoint": "osediff.pkl"}, base=self._base)
        return {"backbone": "osediff_sd21", "backbone.weights": str(folder)}

    def _write_pkl(self, folder: Path) -> None:
        unet = detach(self.unet, GENERATOR)
        unet_state = self._peft_names(unet, self._unet_layers())
        own = adapter_parameters(self.unet, GENERATOR)
        unet_state |= {f"conv_in.base_layer.{leaf}": own[f"conv_in.{leaf}"].detach().cpu() for leaf in ("weight", "bias")}
        vae = detach(self.vae, GENERATOR)
        content = {
            **self._layers,
            "rank_unet": self._ranks["unet"],
            "rank_vae": self._ranks["vae"],
            "state_dict_unet": unet_state,
            "state_dict_vae": self._peft_names(vae, dict.fromkeys(vae, VAE_ADAPTER)),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "osediff.pkl", buffer.getvalue())

    def write_released(self, folder: Path) -> None:
        self._write_pkl(folder)

    @staticmethod
    def _peft_names(adapter: Adapter, groups: Mapping[str, str]) -> dict[str, Tensor]:
        state = {}
        for name, pair in adapter.items():
            state[f"{name}.lora_A.{groups[name]}.weight"] = pair.down
            state[f"{name}.lora_B.{groups[name]}.weight"] = pair.up
        return state

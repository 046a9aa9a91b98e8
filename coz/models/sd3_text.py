"""Prompt embeddings of SD3: two CLIPs and T5, as the paper's code makes them, each text once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coz.errors import UserError
from coz.models.sd3_memory import TextPlacement
from coz.models.sd3_source import TEXT_ENCODERS, SD3Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLIP_LENGTH = 77
T5_LENGTH = 512
Embeddings = tuple[Tensor, Tensor]


class NotFinite(UserError):
    """A text encoder gave NaN or infinity, as T5 does in half precision on some machines."""


class PromptEncoder:
    """Texts → embeddings, remembered by text.

    Both CLIPs (their last layer but one) lie side by side, padded with zeros to T5's width; 512 rows of T5 follow, whose
    padding is not masked, since the model was trained that way. The pooled embedding is that of both CLIPs.

    Args:
        use_t5: without T5, its rows are zeros, as Stable Diffusion 3 allows.
        placement: where the encoders live (see `MemoryPlan.text`).
        drop: read each encoder only when there is a new text and free it afterwards, one at a time.
        remember: texts to keep, the least recently used goes first; the empty text is always kept.
        at_once: texts that pass the encoders together.
    """

    def __init__(
        self,
        source: SD3Source,
        *,
        context_width: int,
        dtype: torch.dtype,
        device: torch.device,
        use_t5: bool = True,
        placement: TextPlacement = "resident",
        drop: bool = False,
        remember: int = 64,
        at_once: int = 4,
    ) -> None:
        self._source = source
        self._width = context_width
        self._dtype = dtype
        self._device = device
        self._names = TEXT_ENCODERS[: 2 + use_t5]
        self._placement: TextPlacement = placement if device.type == "cuda" else "resident"
        self._drop = drop
        self._remember = remember
        self._at_once = at_once
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._encoders: dict[str, PreTrainedModel] = {}
        self._known: OrderedDict[str, Embeddings] = OrderedDict()

    def load(self) -> None:
        """Read the tokenizers and, unless they are dropped after use, the encoders; called again, does nothing."""
        for name in self._names:
            if name not in self._tokenizers:
                self._tokenizers[name] = self._source.tokenizer(name)
            if name not in self._encoders and not self._drop:
                self._encoders[name] = self._read(name)

    def _read(self, name: str) -> PreTrainedModel:
        encoder = self._source.text_encoder(name, dtype=self._dtype)
        if self._placement == "stream" and name == TEXT_ENCODERS[2]:
            from accelerate import cpu_offload

            cpu_offload(encoder, execution_device=self._device)
        return encoder.to(self._device) if self._placement == "resident" else encoder

    def forget(self) -> None:
        """Free all remembered embeddings."""
        self._known.clear()

    def token_ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids by encoder: (B, 77), (B, 77) and, with T5, (B, 512)."""
        lengths = dict(zip(TEXT_ENCODERS, (CLIP_LENGTH, CLIP_LENGTH, T5_LENGTH), strict=True))
        return {
            name: self._tokenizers[name](
                list(prompts), padding="max_length", max_length=lengths[name], truncation=True, return_tensors="pt"
            ).input_ids
            for name in self._names
        }

    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        """(B, 589, context width) and (B, pooled width) in the encoders' format; texts known already cost nothing."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._known]
        found = {text: self._known[text] for text in prompts if text in self._known}
        if new:
            embeds, pooled = self.encode(new)
            found |= {text: (embeds[i : i + 1], pooled[i : i + 1]) for i, text in enumerate(new)}
        for text, value in found.items():
            self._known[text] = value
            self._known.move_to_end(text)
        for text in list(self._known)[: max(0, len(self._known) - self._remember)]:
            if text:
                del self._known[text]
        return torch.cat([found[text][0] for text in prompts]), torch.cat([found[text][1] for text in prompts])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Run the encoders on every text (see the call, which remembers).

        Raises:
            NotFinite: NaN or infinity.
        """
        self.load()
        ids = {name: rows.to(self._device) for name, rows in self.token_ids(prompts).items()}
        states: list[Tensor] = []
        pooled: list[Tensor] = []
        for name in TEXT_ENCODERS[:2]:
            with self._present(name) as encoder:
                outputs = [encoder(rows, output_hidden_states=True) for rows in ids[name].split(self._at_once)]
                states.append(torch.cat([output.hidden_states[-2] for output in outputs]))
                pooled.append(torch.cat([output.text_embeds for output in outputs]))
        clip = torch.cat(states, dim=-1).to(self._dtype)
        embeds = torch.cat([F.pad(clip, (0, self._width - clip.shape[-1])), self._t5(ids, like=clip)], dim=1)
        pooled_embeds = torch.cat(pooled, dim=-1).to(self._dtype)
        if not (torch.isfinite(embeds).all() and torch.isfinite(pooled_embeds).all()):
            raise NotFinite(f"a text encoder gave NaN or infinity in {self._dtype}; use precision=fp32")
        return embeds, pooled_embeds

    def _t5(self, ids: dict[str, Tensor], *, like: Tensor) -> Tensor:
        name = TEXT_ENCODERS[2]
        if name not in self._names:
            return like.new_zeros(like.shape[0], T5_LENGTH, self._width)
        with self._present(name) as encoder:
            return torch.cat([encoder(rows).last_hidden_state for rows in ids[name].split(self._at_once)]).to(self._dtype)

    @contextmanager
    def _present(self, name: str) -> Iterator[nn.Module]:
        """An encoder on the device for as long as it is needed."""
        encoder = self._read(name) if self._drop else self._encoders[name]
        visits = self._placement != "resident" and not hasattr(encoder, "_hf_hook")
        try:
            yield encoder.to(self._device) if visits else encoder
        finally:
            if visits and not self._drop:
                encoder.to("cpu")

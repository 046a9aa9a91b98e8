"""Prompts from a vision-language model that sees a view and the state around it (the paper's multi-scale-aware prompts)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from coz.models.chat import ChatRequest, Context, Layout
from coz.models.decoding import Sampling
from coz.models.device_memory import Demand
from coz.models.placement import Precision
from coz.models.random_vlm import Size
from coz.models.vlm import Offload, Quantization, VisionLanguageModel
from coz.prompters.asking import Asking
from coz.prompters.base import Prompt
from coz.prompters.cleaning import Cleaning


class VlmPrompter:
    """Asks a model on this machine; see `VisionLanguageModel` for the settings of the model itself."""

    def __init__(
        self,
        *,
        weights: str = "Qwen/Qwen2.5-VL-3B-Instruct",
        adapter: str | None = None,
        context: Context = "pair",
        layout: Layout = "system",
        question: str | None = None,
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        cleaning: Cleaning = "none",
        cache_dir: str | None = None,
        size: Size = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
        quantization: Quantization = "none",
        merge_adapter: bool | None = None,
        offload: Offload = "none",
        batch_size: int = 16,
        max_image_px: int | None = None,
        download_gb: float = 8.0,
        model: VisionLanguageModel | None = None,
    ) -> None:
        """Args:
        context, layout, question, cleaning, cache_dir: see `Asking`.
        max_new_tokens, …, repetition_penalty: see `Sampling`.
        model: one that exists already, in place of all settings of a model.

        Raises:
            UserError: a setting that cannot be, or weights that are missing.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
        )
        self._asking = Asking(context, layout, question, sampling, cleaning, cache_dir)
        self._model = model or VisionLanguageModel(
            weights=weights,
            adapter=adapter,
            size=size,
            seed=seed,
            device=device,
            precision=precision,
            quantization=quantization,
            merge_adapter=merge_adapter,
            offload=offload,
            batch_size=batch_size,
            max_image_px=max_image_px,
            download_gb=download_gb,
        )

    @property
    def model(self) -> VisionLanguageModel:
        """The model that is asked."""
        return self._model

    @property
    def beside_backbone(self) -> bool:
        """Whether a call may run while the backbone works: not one that reads weights or moves them to its GPU."""
        return self._model.loaded and self._model.offload == "none"

    @functools.cached_property
    def fingerprint(self) -> Mapping[str, object]:
        """Model, adapter, question, layout, sampling and cleaning."""
        return self._asking.fingerprint(self._identity)

    @functools.cached_property
    def _identity(self) -> Mapping[str, object]:
        return {"name": "vlm", **self._model.fingerprint}

    def demand(self, *, batch: int) -> Demand:
        """Memory of the model, see `Demand`."""
        return self._model.demand(batch=batch)

    def load(self) -> None:
        """Read the weights now; called again, does nothing. A call whose answers are all cached reads none."""
        self._model.load()

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[Prompt]:
        """One prompt per image, see `Prompter`."""

        def answer(requests: Sequence[ChatRequest], seeds: Sequence[int]) -> list[str]:
            return self._model.answer(requests, sampling=self._asking.sampling, seeds=seeds)

        return self._asking.prompts(current, context, seeds=seeds, model=self._identity, answer=answer)

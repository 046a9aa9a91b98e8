"""Vision-language models: where they come from, and asking them many questions at once.

Any image-text-to-text model of transformers, by hub id or folder, with an optional LoRA adapter; a random one for tests and
dry runs; or a model that is already in memory (`VisionLanguageModel.holding`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from coz.checkpoint import WrongWeights, count_numbers, folder_digest, hub_folder
from coz.errors import UserError
from coz.models.adapters import ADAPTER_FILES, adapter_folder, attach_adapter, check_merge
from coz.models.chat import ChatRequest, check_choice
from coz.models.decoding import RowChooser, Sampling, number_distribution
from coz.models.device_memory import GB, Demand
from coz.models.encoding import ChatProcessor, encode, number_tokens, without_special_tokens
from coz.models.placement import Precision, pick_device, pick_dtype
from coz.models.random_vlm import Size, random_vlm

log = logging.getLogger(__name__)

Quantization = Literal["none", "int8", "nf4"]
Offload = Literal["none", "cpu"]

_FILES = ("config.json", "*.safetensors", "*processor_config.json", "tokenizer*")
_IDENTITY_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_UNQUANTIZED = ["lm_head", r".*\.?(visual|vision_tower|vision_model|multi_modal_projector|connector)"]  # matched from the start
_BYTES = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}


Loader = Callable[..., tuple[nn.Module, ChatProcessor]]


class VisionLanguageModel:
    """A model and its processor behind two calls: `answer` and `rate`.

    Construction finds the files and checks the settings; the first call, or `load()`, reads the weights. It can be
    pickled before and after loading; the weights are not, they are read again.
    """

    def __init__(
        self,
        *,
        weights: str,
        adapter: str | None = None,
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
        loader: Loader | None = None,
        random_loader: Loader | None = None,
    ) -> None:
        """Args:
        weights: a hub id `owner/name[@revision]`, a folder, or `random`.
        adapter: a LoRA adapter's folder, a training run's folder, or a hub id.
        size, seed: of the random model.
        quantization: int8 or nf4 weights of the language model, by bitsandbytes.
        merge_adapter: add the adapter to the weights; None does so unless they are quantized.
        offload: `cpu` keeps the weights in main memory between calls, so that a backbone can have the GPU.
        batch_size: questions at a time.
        max_image_px: make larger pictures smaller, to about this many pixels; None for what the processor's files say.
        download_gb: said in the error where the weights are missing.
        loader: reads InternVL2.5's original layout, where the folder has it: called with `folder`, `dtype`, `device`,
            gives the model and a processor (`ChatProcessor`).
        random_loader: makes the model of `weights=random`: called with `size`, `seed`, `dtype`, `device`; None for
            Qwen2.5-VL's architecture.
        """
        check_choice("size", size, Size)
        check_choice("quantization", quantization, Quantization)
        check_choice("offload", offload, Offload)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.device = pick_device(device)
        self.dtype = pick_dtype(precision, self.device)
        _check_quantization(quantization, weights=weights, offload=offload)
        self._merge = quantization == "none" if merge_adapter is None else merge_adapter
        check_merge(merge=self._merge, quantization=quantization)
        self.weights, self.size, self.seed = weights, size, seed
        self.quantization, self.offload, self.batch_size = quantization, offload, batch_size
        self._max_image_px = max_image_px
        self._folder, self._loader = None, None
        self._random_loader = random_loader or random_vlm
        if weights != "random":
            what = "the vision-language model"
            self._folder = hub_folder(weights, patterns=_FILES[:2], what=what, size_gb=download_gb)
            if _has_original_layout(self._folder):
                self._loader = _check_loader(loader, folder=self._folder, quantization=quantization)
            else:
                hub_folder(weights, patterns=_FILES, what=what, size_gb=download_gb)
        self._adapter_folder = adapter_folder(adapter) if adapter else None
        self._loaded: tuple[nn.Module, ChatProcessor] | None = None
        self._held_identity: Mapping[str, object] | None = None

    @classmethod
    def holding(
        cls,
        model: nn.Module,
        processor: ChatProcessor,
        *,
        identity: Mapping[str, object],
        batch_size: int = 16,
    ) -> VisionLanguageModel:
        """A model that is in memory already, on its device. `identity` becomes the fingerprint; it cannot be pickled."""
        parameter = next(model.parameters())
        self = cls(weights="random", size="tiny", device=str(parameter.device), batch_size=batch_size)
        self.dtype = parameter.dtype
        self._loaded = (model.eval(), processor)
        self._held_identity = dict(identity)
        return self

    def __getstate__(self) -> dict[str, object]:
        if self._held_identity is not None:
            raise TypeError("a VisionLanguageModel that holds another's model cannot be pickled; construct it from weights")
        return self.__dict__ | {"_loaded": None}

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._loaded is not None

    @functools.cached_property
    def fingerprint(self) -> Mapping[str, object]:
        """Identity of everything that shapes the answers, but for the question and the sampling."""
        if self._held_identity is not None:
            return self._held_identity
        maker = getattr(self._random_loader, "func", self._random_loader).__name__
        random = {"weights": "random", "size": self.size, "seed": self.seed, "architecture": maker.removeprefix("random_")}
        return {
            **({"weights": folder_identity(self._folder, _IDENTITY_FILES)} if self._folder else random),
            "adapter": folder_identity(self._adapter_folder, ADAPTER_FILES) if self._adapter_folder else None,
            "merged": self._merge if self._adapter_folder else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "max_image_px": self._max_image_px,
        }

    def demand(self, *, batch: int) -> Demand:
        """Memory for batches of questions about pairs of 512 x 512, see `Demand`; `batch_size` is the most at a time."""
        weights_gb, request_gb = self._memory_gb
        rest_gb = 0.0 if self.offload == "cpu" else weights_gb
        return Demand(self.device, rest_gb, weights_gb + request_gb * min(batch, self.batch_size))

    @property
    def memory_gb(self) -> float:
        """About how much memory the model takes while it answers a full batch: weights, caches, activations.

        An estimate from the checkpoint's size; nothing is loaded. The share for a batch assumes pairs of 512² px pictures.
        """
        return self.demand(batch=self.batch_size).peak_gb

    @functools.cached_property
    def _memory_gb(self) -> tuple[float, float]:
        """GB of the weights, and of one question's caches and activations."""
        if self._folder:
            parameters = sum(count_numbers(path) for path in self._folder.glob("*.safetensors"))
        else:
            parameters = {"full": 3_750_000_000, "tiny": 300_000}[self.size]
        weight_bytes = {"none": _BYTES[self.dtype], "int8": 1.1, "nf4": 0.65}[self.quantization]
        return parameters * weight_bytes / GB, (0.12e9 if self.size == "full" else 1e6) / GB

    def load(self) -> None:
        """Read the weights now; called again, does nothing."""
        if self._loaded is not None:
            return
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0] / 1e9
            log.info("the vision-language model needs about %.1f GB, %s has %.1f free", self.memory_gb, self.device, free)
        model, processor = self._read()
        if self._adapter_folder:
            model = attach_adapter(model, self._adapter_folder, merge=self._merge)
        model.eval().requires_grad_(False)
        if self.quantization == "none":
            model.to("cpu" if self.offload == "cpu" else self.device)
        self._loaded = (model, processor)

    def plain_text(self, text: str) -> str:
        """A text without anything that the tokenizer would take for a special token, such as the place of a picture."""
        self.load()
        assert self._loaded is not None
        return without_special_tokens(self._loaded[1], text)

    def model_and_processor(self) -> tuple[nn.Module, ChatProcessor]:
        """Both themselves, loaded, for who trains the model. Its weights are frozen and it is in evaluation mode."""
        self.load()
        assert self._loaded is not None
        return self._loaded

    def unload(self) -> None:
        """Let the weights go; the next call reads them again. Does nothing for a held model."""
        if self._held_identity is None:
            self._loaded = None

    def _read(self) -> tuple[nn.Module, ChatProcessor]:
        if self._folder is None:
            return self._random_loader(size=self.size, seed=self.seed, dtype=self.dtype, device=self.device)
        if self._loader is not None:
            return self._loader(folder=self._folder, dtype=self.dtype, device=self.device)
        from transformers import AutoModelForImageTextToText, AutoProcessor

        settings = _quantization_settings(self.quantization, dtype=self.dtype, device=self.device)
        try:
            processor = AutoProcessor.from_pretrained(self._folder, local_files_only=True)
            if self._max_image_px is not None:
                _limit_pixels(processor, self._max_image_px)
            model, report = AutoModelForImageTextToText.from_pretrained(
                self._folder, dtype=self.dtype, local_files_only=True, output_loading_info=True, **settings
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise WrongWeights(f"weights={self.weights} cannot be read as an image-text-to-text model: {error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report.get(kind):
                names = ", ".join(map(str, sorted(report[kind])[:3]))
                raise WrongWeights(f"weights={self.weights} does not fit {type(model).__name__}: {kind} {names}, …")
        return model, processor

    @torch.no_grad()  # not inference_mode: weights read inside it could never be trained
    def answer(self, requests: Sequence[ChatRequest], *, sampling: Sampling, seeds: Sequence[int] | None = None) -> list[str]:
        """What the model says to each request.

        Args:
            seeds: one per request, for drawing; None for 0 each. An answer depends on its own request and seed alone.
        """
        seeds = [0] * len(requests) if seeds is None else list(seeds)
        if len(seeds) != len(requests):
            raise ValueError(f"{len(requests)} requests but {len(seeds)} seeds; give one each")
        answers: list[str] = []
        for rows, model, processor, inputs in self._batches(requests):
            length = inputs["input_ids"].shape[1]
            ids = self._generate(model, processor, inputs, sampling, seeds[rows])
            answers += processor.tokenizer.batch_decode(
                ids[:, length:], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return answers

    def _generate(
        self, model: nn.Module, processor: ChatProcessor, inputs: dict[str, Tensor], sampling: Sampling, seeds: Sequence[int]
    ) -> Tensor:
        tokenizer, config = processor.tokenizer, model.generation_config
        penalty = sampling.repetition_penalty
        chooser = RowChooser(
            sampling=sampling,
            penalty=penalty if penalty is not None else (getattr(config, "repetition_penalty", None) or 1.0),
            seeds=seeds,
            attention_mask=inputs["attention_mask"],
            vocabulary=len(tokenizer),
        )
        pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        return model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            logits_processor=[chooser],
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
        )

    @torch.no_grad()  # not inference_mode: weights read inside it could never be trained
    def rate(self, requests: Sequence[ChatRequest], *, low: int = 0, high: int = 100) -> tuple[Tensor, Tensor]:
        """How probable each whole number from `low` to `high` is as the answer's beginning, without generating.

        Returns:
            (B, high - low + 1) probabilities that sum to 1, and (B,) the probability that the answer is such a number.
        """
        shares, masses = [], []
        for _, model, processor, inputs in self._batches(requests):
            numbers = number_tokens(processor, requests[0].messages, range(low, high + 1))
            share, mass = number_distribution(model, inputs, numbers)
            shares.append(share.cpu())
            masses.append(mass.cpu())
        empty = torch.zeros(0, high - low + 1)
        return torch.cat([empty, *shares]), torch.cat([empty[:, 0], *masses])

    def _batches(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[slice, nn.Module, ChatProcessor, dict[str, Tensor]]]:
        """Slices of the requests with the tensors made of them, the model on its device meanwhile."""
        if not requests:
            return
        self.load()
        assert self._loaded is not None
        model, processor = self._loaded
        moves = self.offload == "cpu" and self.device.type != "cpu"
        if moves:
            model.to(self.device)
        try:
            for start in range(0, len(requests), self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield rows, model, processor, self._inputs(processor, requests[rows])
        finally:
            if moves:
                model.to("cpu")
                torch.cuda.empty_cache()

    def _inputs(self, processor: ChatProcessor, requests: Sequence[ChatRequest]) -> dict[str, Tensor]:
        inputs = encode(processor, requests)
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
        }


# ---------------------------------------------------------------------------------------------------------------------
# files


def folder_identity(folder: Path, patterns: Sequence[str]) -> str:
    """The hub's revision for a folder of its cache, else a digest of the files."""
    if folder.parent.name == "snapshots":
        return folder.name
    return folder_digest(folder, patterns)


def _has_original_layout(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise WrongWeights(f"{folder / 'config.json'} is no JSON ({error}); fetch it again") from error
    return config.get("model_type") == "internvl_chat"


def _check_loader(loader: Loader | None, *, folder: Path, quantization: Quantization) -> Loader:
    if loader is None:
        raise WrongWeights(f"{folder} is in InternVL's original layout, which transformers does not read; use critic=internvl")
    if quantization != "none":
        raise UserError(
            f"quantization={quantization} needs a checkpoint in transformers' own layout and {folder} is in InternVL's "
            "original one; convert it first and give the folder that the conversion wrote"
        )
    return loader


def _check_quantization(quantization: Quantization, *, weights: str, offload: Offload) -> None:
    if quantization == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantization={quantization} needs the package bitsandbytes; install it, or set quantization=none")
    if weights == "random":
        raise UserError(f"quantization={quantization} needs a checkpoint; with weights=random set quantization=none")
    if offload == "cpu":
        raise UserError(f"quantization={quantization} cannot be moved between devices; set offload=none")


def _quantization_settings(quantization: Quantization, *, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    settings = {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }[quantization]
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=list(_UNQUANTIZED))
    return {"quantization_config": config, "device_map": {"": device}}


def _limit_pixels(processor: ChatProcessor, max_image_px: int) -> None:
    image_processor = getattr(processor, "image_processor", None)
    size = getattr(image_processor, "size", None)
    if image_processor is None or size is None or "longest_edge" not in size or "shortest_edge" not in size:
        raise UserError(f"max_image_px={max_image_px} is not known to {type(processor).__name__}; set max_image_px=null")
    image_processor.size = {"shortest_edge": min(size["shortest_edge"], max_image_px), "longest_edge": max_image_px}

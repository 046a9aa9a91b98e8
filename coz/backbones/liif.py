"""LIIF as a backbone: the arbitrary-scale baseline of the paper's Table 2. It queries the target, and reads no prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from coz.checkpoint import WrongWeights, file_digest, load_strict, load_tensors, local_file
from coz.errors import UserError
from coz.image import Size, as_size
from coz.models import liif
from coz.models.placement import Precision, pick_device, pick_dtype


class Liif:
    """LIIF from an official checkpoint, or with random weights.

    Args:
        weights: path of `edsr-baseline-liif.pth` or `rdn-liif.pth`, or `random`.
        encoder: which encoder the checkpoint must have (and the random model gets).
        size: of the random model; a checkpoint's is read off its tensors.
        seed: of the random weights.
        batch_queries: pixels answered at once; bounds the memory, changes no value.

    Raises:
        UserError: a setting that is out of range, or a missing file.
    """

    reads_prompts = False

    def __init__(
        self,
        *,
        weights: str,
        encoder: Literal["edsr", "rdn"] = "edsr",
        size: Literal["full", "tiny"] = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
        batch_queries: int = liif.BATCH_QUERIES,
    ) -> None:
        if encoder not in liif.FULL:
            raise UserError(f"encoder={encoder} is unknown; use edsr or rdn")
        if size not in ("full", "tiny"):
            raise UserError(f"size={size} is unknown; use full or tiny")
        if batch_queries < 1:
            raise UserError(f"batch_queries={batch_queries} must be at least 1; the default is {liif.BATCH_QUERIES}")
        self._device = pick_device(device)
        self._dtype = pick_dtype(precision, self._device)
        self._random_sizes = (liif.FULL if size == "full" else liif.TINY)[encoder] if weights == "random" else None
        self._path = None if weights == "random" else local_file(weights, what=f"LIIF with {encoder}: backbone.weights")
        self._encoder, self._size, self._seed, self._batch_queries = encoder, size, seed, batch_queries
        self._model: liif.Liif | None = None

    @property
    def fingerprint(self) -> Mapping[str, object]:
        identity: dict[str, object] = {"name": "liif", "encoder": self._encoder, "dtype": str(self._dtype)}
        if self._path is None:
            return identity | {"weights": "random", "size": self._size, "seed": self._seed}
        return identity | {"weights": file_digest(self._path)}

    def load(self) -> None:
        if self._model is not None:
            return
        model = self._random_model() if self._path is None else self._official_model()
        self._model = model.to(self._device, self._dtype).eval().requires_grad_(False)

    def _random_model(self) -> liif.Liif:
        assert self._random_sizes is not None, "only random weights have sizes of their own"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return liif.Liif(self._random_sizes)

    def _official_model(self) -> liif.Liif:
        assert self._path is not None, "random weights have no file"
        what = str(self._path)
        state = liif.read_official(load_tensors(self._path), what=what)
        sizes = liif.sizes_from({name: tuple(tensor.shape) for name, tensor in state.items()}, what=what)
        if sizes.encoder_name != self._encoder:
            raise WrongWeights(f"{what} has the encoder {sizes.encoder_name}; set backbone.encoder={sizes.encoder_name}")
        with torch.device("meta"):
            model = liif.Liif(sizes)
        model = model.to_empty(device="cpu")
        load_strict(model, state, what=what)
        return model

    @torch.inference_mode()
    def __call__(
        self, lr: Tensor, *, size: Size, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """(B, 3, h, w) in [0, 1] → (B, 3, *size). Each image by itself: a batch changes no bit, and needs no more memory."""
        self.load()
        assert self._model is not None
        pictures = []
        for image in lr:
            features = self._model.encode((image[None] * 2 - 1).to(self._device, self._dtype))
            pictures.append(self._model.render(features, as_size(size), batch_queries=self._batch_queries))
        return (torch.stack(pictures) / 2 + 0.5).clamp(0, 1)

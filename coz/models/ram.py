"""The tagger: RAM or DAPE with its files, its thresholds and its tags. The network is in `ram_network`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from coz.checkpoint import WeightsNotFound, WrongWeights, file_digest, hub_folder, load_tensors, local_file
from coz.errors import UserError
from coz.models import ram_network
from coz.models.device_memory import GB, Demand
from coz.models.placement import Precision, pick_device, pick_dtype

RAM_FILE = "ram_swin_large_14m.pth"
TAG_FILE, THRESHOLD_FILE = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
SEPARATOR = ", "
BATCH_IMAGES = 8  # at full size the head holds 4585 x 3072 numbers per image
RANDOM_TAGS_PER_IMAGE = 8


class Tagger:
    """Says which tags a picture shows, and gives the image embeddings that the tags were read from.

    Args:
        weights: `ram_swin_large_14m.pth`, a folder or hub id that holds it (`spaces/owner/name` for a space), or `random`.
        lora: DAPE's LoRA file, None for plain RAM; unused with random weights.
        tag_list: text file of one tag a line; None looks for `ram_tag_list.txt` in the weights' folder and its `data`.
        thresholds: text file of one number a line, in the order of the tags; None looks for `ram_tag_list_threshold.txt`.
        image_px: side of the network's input.
        window: of the Swin, None for the checkpoint's own; another one resizes its bias tables.
        head_heads: attention heads of the tagging head, which the file does not state.
        antialias: in the resize to `image_px`. Chain-of-Zoom's torchvision does; False is what SeeSR's did.
        size: of a random model, whose tags are called tag0001 and so on.
        seed: of a random model.

    Raises:
        UserError: a setting out of range, a missing file, lists of different lengths.
    """

    def __init__(
        self,
        *,
        weights: str,
        lora: str | None = None,
        tag_list: str | None = None,
        thresholds: str | None = None,
        image_px: int = 384,
        window: int | None = None,
        head_heads: int = 4,
        antialias: bool = True,
        size: Literal["full", "tiny"] = "full",
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        self._device = pick_device(device)
        self._dtype = pick_dtype(precision, self._device)
        self._antialias, self._image_px, self._window, self._head_heads = antialias, image_px, window, head_heads
        self._model: ram_network.Ram | None = None
        self._sizes: ram_network.RamSizes | None = None
        identity: dict[str, object] = {"name": "ram", "antialias": antialias, "dtype": str(self._dtype)}
        if weights == "random":
            if size not in ("full", "tiny"):
                raise UserError(f"size={size} is unknown; use full or tiny")
            sizes = ram_network.FULL if size == "full" else ram_network.TINY
            self._sizes, self._seed = sizes, seed
            self._image_px = sizes.image_px
            self._tags, self._thresholds = _random_tags(sizes.tags)
            self._identity = identity | {"weights": "random", "size": size, "seed": seed}
            return
        self._file, folder, revision = _find_weights(weights, with_lists=None in (tag_list, thresholds))
        self._lora = local_file(lora, what="DAPE's LoRA, lora") if lora else None
        tag_file = _find_list(tag_list, "tag_list", TAG_FILE, folder)
        threshold_file = _find_list(thresholds, "thresholds", THRESHOLD_FILE, folder)
        self._tags = _read_tags(tag_file)
        self._thresholds = _read_thresholds(threshold_file, len(self._tags))
        self._identity = identity | {
            "name": "dape" if lora else "ram",
            "weights": revision or file_digest(self._file),
            "lora": file_digest(self._lora) if self._lora else None,
            "tag_list": file_digest(tag_file),
            "thresholds": file_digest(threshold_file),
            "image_px": image_px,
            "window": window,
            "head_heads": head_heads,
        }

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """JSON-able identity of everything that shapes the tags. Needs no weights in memory."""
        return self._identity

    def demand(self, *, batch: int) -> Demand:
        """Memory for a batch of pictures, see `Demand`. A released file holds float32, and a part that is left out here."""
        if self._sizes is None:
            numbers = self._file.stat().st_size / 4
        else:
            with torch.device("meta"):
                numbers = sum(math.prod(tensor.shape) for tensor in ram_network.Ram(self._sizes).state_dict().values())
        item = torch.empty((), dtype=self._dtype).element_size()
        # the head's widest layer: for each tag a row of queries, its expansion and its attention
        head = min(batch, BATCH_IMAGES) * len(self._tags) * 2 * 3072
        return Demand(self._device, numbers * item / GB, (numbers + head) * item / GB)

    def load(self) -> None:
        """Read the weights now; called again, does nothing."""
        if self._model is not None:
            return
        model = ram_network.random_model(self._sizes, self._seed) if self._sizes else self._official_model()
        self._model = model.to(self._device, self._dtype)

    def _official_model(self) -> ram_network.Ram:
        what = str(self._file)
        state = ram_network.read_official(load_tensors(self._file), what=what)
        if self._lora:
            state = ram_network.fold_lora(state, load_tensors(self._lora), what=str(self._lora))
        sizes = ram_network.sizes_from(
            {name: tuple(tensor.shape) for name, tensor in state.items()},
            image_px=self._image_px,
            head_heads=self._head_heads,
            window=self._window,
            what=what,
        )
        if sizes.tags != len(self._tags):
            raise WrongWeights(f"{what} knows {sizes.tags} tags, tag_list has {len(self._tags)}; use the list made for it")
        return ram_network.load_official(state, sizes, what=what)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> tuple[list[str], Tensor]:
        """Tag a batch.

        Args:
            image: (B, 3, h, w) in [0, 1], any h and w.

        Returns:
            B texts, tags joined with ", " in the list's order (empty where none is on), and the image embeddings
            (B, N, 512), mean token first, float32 on the CPU: what SeeSR's U-Net is given.
        """
        self.load()
        parts = [self._tag(part) for part in image.split(BATCH_IMAGES)]
        return [text for texts, _ in parts for text in texts], torch.cat([embeds for _, embeds in parts])

    def _tag(self, image: Tensor) -> tuple[list[str], Tensor]:
        assert self._model is not None, "load() was not called"
        pixels = ram_network.preprocess(image.float(), self._image_px, antialias=self._antialias)
        embeds = self._model.image_embeds(pixels.to(self._device, self._dtype))
        on = self._model.logits(embeds).float().sigmoid().cpu() > self._thresholds  # strict: a threshold of 1 never fires
        texts = [SEPARATOR.join(self._tags[i] for i in row.nonzero()[:, 0].tolist()) for row in on]
        return texts, embeds.float().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# files


def _find_weights(weights: str, *, with_lists: bool) -> tuple[Path, Path, str | None]:
    """The checkpoint, the folder in which lists may lie, and the hub's revision if it came from there."""
    path = Path(weights).expanduser()
    if path.is_file() or path.suffix == ".pth":
        return local_file(path, what="RAM's checkpoint, weights"), path.parent, None
    lists = [f"**/{TAG_FILE}", f"**/{THRESHOLD_FILE}"] if with_lists else []
    folder = hub_folder(weights, patterns=[RAM_FILE, *lists], what="Recognize Anything (RAM)", size_gb=5.6)
    return folder / RAM_FILE, folder, None if path.is_dir() else f"{weights}@{folder.name}"


def _find_list(given: str | None, setting: str, name: str, folder: Path) -> Path:
    if given is not None:
        return local_file(given, what=f"RAM's list, {setting}")
    found = sorted(folder.glob(f"**/{name}"), key=lambda path: len(path.parts))
    if not found:
        raise WeightsNotFound(
            f"{folder} holds no {name}; take it from the folder data of the hub's space xinyu1205/recognize-anything "
            f"and put it there, or give its path as {setting}=…"
        )
    return found[0]


def _read_tags(file: Path) -> list[str]:
    tags = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not tags:
        raise WrongWeights(f"{file} holds no tags; it must hold one a line")
    return tags


def _read_thresholds(file: Path, tags: int) -> Tensor:
    try:
        values = [float(text) for text in file.read_text(encoding="utf-8").split()]
    except ValueError as error:
        raise WrongWeights(f"{file} must hold one number a line ({error})") from error
    if len(values) != tags:
        raise WrongWeights(f"{file} holds {len(values)} thresholds for {tags} tags; use the two lists of one model")
    return torch.tensor(values)


def _random_tags(count: int) -> tuple[list[str], Tensor]:
    """Names that nobody takes for an answer, and the threshold that leaves a handful of them on."""
    logit = ram_network.RANDOM_LOGIT_STD * NormalDist().inv_cdf(1 - RANDOM_TAGS_PER_IMAGE / count)
    return [f"tag{i + 1:04d}" for i in range(count)], torch.full((count,), 1 / (1 + math.exp(-logit)))

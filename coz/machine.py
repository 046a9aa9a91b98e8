"""The machine that runs this: processors, memory, disk, GPUs and installed packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "peft", "spandrel", "timm", "pyiqa", "trl", "gradio", "zarr")


@dataclass(frozen=True)
class Gpu:
    """One GPU as PyTorch sees it."""

    name: str
    memory_gb: float
    free_gb: float
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    system: str
    python: str
    cores: int
    memory_gb: float
    available_gb: float
    bf16_cpu: bool
    gpus: tuple[Gpu, ...]
    disks: Mapping[str, float]
    """What lies there and where → free GB."""
    versions: Mapping[str, str]
    """Of installed packages; absent ones are left out."""

    @property
    def gpu_gb(self) -> float:
        """Memory of the largest GPU, 0 without one."""
        return max((gpu.memory_gb for gpu in self.gpus), default=0.0)


def look_at_machine(*, outputs: Path) -> Machine:
    """The machine that runs this, as far as it tells without any privilege."""
    import torch

    from coz.models.placement import cpu_has_bf16

    total_gb, available_gb = _memory()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cache_folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=total_gb,
        available_gb=available_gb,
        bf16_cpu=cpu_has_bf16(),
        gpus=tuple(_gpus(torch)),
        disks={f"{what} ({path})": _free_gb(path) for what, path in (("outputs", outputs), ("weights", cache_folder))},
        versions=versions,
    )


def _gpus(torch: object) -> Iterator[Gpu]:
    cuda = torch.cuda  # type: ignore[attr-defined]
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        try:
            free = cuda.mem_get_info(index)[0]
        except RuntimeError:  # a card that others hold alone
            free = 0
        yield Gpu(properties.name, properties.total_memory / GB, free / GB, properties.major >= 8)


def _memory() -> tuple[float, float]:
    """(total, available) GB of main memory; a container's limit counts where there is one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 / GB for line in lines}
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) / GB
    except (OSError, ValueError):  # none, or the word "max"
        return total, available
    return min(total, limit), min(available, limit)


def _free_gb(path: Path) -> float:
    """Free space where a folder is, or would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GB


def describe_machine(machine: Machine) -> Iterator[str]:
    """Lines for people."""
    yield f"system    {machine.system}, Python {machine.python}"
    yield f"CPU       {machine.cores} cores{', bf16 in hardware' if machine.bf16_cpu else ''}"
    yield f"memory    {machine.memory_gb:.1f} GB, {machine.available_gb:.1f} GB of it available"
    for gpu in machine.gpus:
        yield f"GPU       {gpu.name}, {gpu.memory_gb:.0f} GB ({gpu.free_gb:.0f} free){'' if gpu.bf16 else ', no bf16'}"
    if not machine.gpus:
        yield "GPU       none that PyTorch sees"
    for place, free_gb in machine.disks.items():
        yield f"disk      {free_gb:.0f} GB free for {place}" + (": LITTLE" if free_gb < 5 else "")
    yield "packages  " + ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    absent = [name for name in PACKAGES if name not in machine.versions]
    if absent:
        yield f"          not installed: {', '.join(absent)}"

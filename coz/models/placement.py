"""Which device and which number format a model runs in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from coz.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def pick_device(device: str) -> torch.device:
    """`auto` → the GPU if there is one, else the CPU; anything else as PyTorch names it.

    Raises:
        UserError: a CUDA device that this machine lacks, or a name that PyTorch does not know.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device} is not a device; use auto, cpu, cuda or cuda:N") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}, but this machine shows {torch.cuda.device_count()} GPUs; use device=auto or cpu")
    return picked


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` → bf16 on a GPU or on a CPU whose arithmetic units know it, else fp32.

    Raises:
        UserError: an unknown name.
    """
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if fast else torch.float32
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in names:
        raise UserError(f"precision={precision} is unknown; use auto, fp32, bf16 or fp16")
    return names[precision]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); emulated bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags

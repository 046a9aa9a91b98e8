"""Memory plans of SD3: what stays on the GPU, what visits it, and an estimate of the need before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from coz.errors import UserError
from coz.models.device_memory import GB, NotEnoughMemory
from coz.models.diffusers_folder import Shapes

PlanName = Literal["full", "24gb", "16gb", "12gb"]
TextPlacement = Literal["resident", "visit", "stream"]
Offload = Literal["none", "cpu"]


@dataclass(frozen=True)
class MemoryPlan:
    """How to trade time for memory on a GPU. A CPU has one memory, where all plans are alike."""

    text: TextPlacement
    """`resident`: text encoders stay on the GPU. `visit`: they live in main memory, and each comes to the GPU as a whole
    when there is a new prompt. `stream`: as `visit`, but T5 passes through the GPU layer by layer."""
    vae_batch: int | None
    """Images that go through the VAE at once; None for all."""
    trades: str


PLANS: dict[str, MemoryPlan] = {
    "full": MemoryPlan("resident", None, "nothing: all weights stay on the GPU, the whole batch goes through the VAE"),
    "24gb": MemoryPlan("resident", 4, "a little speed at large batches: the VAE takes 4 images at a time"),
    "16gb": MemoryPlan("visit", 2, "about a second for each batch with new prompts: the text encoders live in main memory"),
    "12gb": MemoryPlan("stream", 1, "seconds for each batch with new prompts: T5 passes through the GPU layer by layer"),
}


def plan_named(name: str) -> MemoryPlan:
    """The plan of that name.

    Raises:
        UserError: an unknown name.
    """
    if name not in PLANS:
        raise UserError(f"memory={name} is unknown; use {', '.join(PLANS)}")
    return PLANS[name]


@dataclass(frozen=True)
class ComponentBytes:
    """Bytes of weights on the device."""

    transformer: int
    vae: int
    text: tuple[int, ...]
    text_layer: int
    """The largest tensor-holding layer of T5, twice: the one that computes and the one that arrives."""
    vae_pixel: int
    """Working memory of the VAE for one pixel of an image, and of the transformer, which is smaller."""


def component_bytes(shapes: Mapping[str, Shapes], *, dtypes: Mapping[str, torch.dtype], use_t5: bool) -> ComponentBytes:
    """Sizes out of tensor shapes alone.

    Args:
        dtypes: of `transformer`, `vae` and `text`.
    """
    counts = {part: {name: math.prod(shape) for name, shape in tensors.items()} for part, tensors in shapes.items()}
    item = {part: torch.empty((), dtype=dtype).element_size() for part, dtype in dtypes.items()}
    texts = [part for part in counts if part.startswith("text_encoder") and (use_t5 or not part.endswith("_3"))]
    t5 = counts.get("text_encoder_3", {})
    layers: dict[str, int] = {}
    for name, count in t5.items():
        layer = ".".join(name.split(".")[:3])
        layers[layer] = layers.get(layer, 0) + count
    # widest point of the decoder: a residual block at full size that holds its input, its normalized and activated copies
    # and its output, of the second level's channels
    channels = shapes["vae"]["decoder.up_blocks.3.resnets.0.conv1.weight"][1]
    return ComponentBytes(
        transformer=item["transformer"] * sum(counts["transformer"].values()),
        vae=item["vae"] * sum(counts["vae"].values()),
        text=tuple(item["text"] * sum(counts[part].values()) for part in texts),
        text_layer=2 * item["text"] * max(layers.values(), default=0) if use_t5 else 0,
        vae_pixel=4 * channels * item["vae"],
    )


def estimate_gb(
    plan: MemoryPlan,
    sizes: ComponentBytes,
    *,
    batch: int,
    pixels: int = 512 * 512,
    drop_text: bool = False,
    offload: Offload = "none",
) -> tuple[float, float]:
    """Device memory in GB (10^9 bytes), without the driver's own share: (between calls, at the peak of a call).

    Args:
        drop_text: the text encoders are freed after use, and come one at a time.
        offload: `cpu` where transformer and VAE leave the device between calls, and while text is encoded.
    """
    images = batch if plan.vae_batch is None else min(batch, plan.vae_batch)
    work = images * pixels * sizes.vae_pixel
    image_model = sizes.transformer + sizes.vae
    staying = image_model if offload == "none" else 0
    visiting = 0
    if plan.text == "resident" and not drop_text:
        staying += sum(sizes.text)
    else:
        visiting = max(*sizes.text[:2], sizes.text_layer if plan.text == "stream" else sum(sizes.text[2:]))
    restoring = work + (image_model if offload == "cpu" else 0)
    return staying / GB, (staying + max(visiting, restoring)) / GB


def describe(
    name: str, sizes: ComponentBytes, *, device: torch.device, drop_text: bool = False, offload: Offload = "none"
) -> str:
    """One line for the log: what the plan needs, what the GPU has, what the plan trades.

    Raises:
        NotEnoughMemory: the plan does not fit the GPU even with one image at a time; names the plans that do.
    """
    plan = plan_named(name)
    need, more = (estimate_gb(plan, sizes, batch=batch, drop_text=drop_text, offload=offload)[1] for batch in (1, 16))
    line = f"memory={name} needs about {need:.1f} GB for one image of 512 x 512 ({more:.1f} GB for 16)"
    if device.type != "cuda":
        return f"{line} on {device.type}"
    has = torch.cuda.get_device_properties(device).total_memory / GB
    if need > has:
        fitting = [other for other in PLANS if estimate_gb(PLANS[other], sizes, batch=1)[1] < has]
        remedy = (
            f"use memory={fitting[0]}" if fitting else "no plan fits; use precision=bf16, text_encoder_3=false or device=cpu"
        )
        raise NotEnoughMemory(f"{line}, the GPU has {has:.0f} GB; {remedy}")
    return f"{line}, the GPU has {has:.0f} GB; it trades {plan.trades}"

"""The SD3 backbone against the released algorithm: time, peak memory and agreement along a chain, one line per change.

    python benchmarks/osediff_sd3.py                      # mid-size random weights on a CPU in float32, about 4 minutes
    python benchmarks/osediff_sd3.py --full-size          # full-size random weights on a GPU, with bf16 and batches
    python benchmarks/osediff_sd3.py --images 4 --scale 16  # a quick look

The baseline follows the description of the released code: adapters beside the weights, the text encoded again at every
step, one image at a time, float32, a PNG written and read between steps. Every line adds one change to the line above,
and runs in a process of its own, so that its peak memory is its own. CPU seconds are the better measure on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coz.backbones.osediff_sd3 import OSEDiffSD3
from coz.image import CENTER, from_pil, quantize, resize, to_pil, view_at
from coz.models.sd3_source import RandomSource

STEP = 4  # enlargement of one step


@dataclass(frozen=True)
class Line:
    """One line of the ablation."""

    label: str
    settings: dict[str, object] = field(default_factory=dict)
    """Of the backbone."""
    forget: bool = True
    """Encode the text again at every step."""
    png: bool = True
    """States travel through PNG files."""
    batch: int = 1


@dataclass(frozen=True)
class Work:
    """What every line computes."""

    size: str
    side_px: int
    scale: int
    images: int
    device: str
    threads: int

    @property
    def steps(self) -> int:
        return round(np.log(self.scale) / np.log(STEP))


def ablation(batch: int, *, gpu: bool) -> list[Line]:
    """The released algorithm, then one change after the other."""
    line = Line("released algorithm", {"precision": "fp32", "merge": False})
    lines = [line]

    def add(label: str, settings: dict[str, object] | None = None, **changes: object) -> None:
        nonlocal line
        line = replace(line, label=f"+ {label}", settings=line.settings | (settings or {}), **changes)
        lines.append(line)

    add("embeddings remembered", forget=False)
    add("adapters merged", {"merge": True})
    add("states in memory, not PNG", png=False)
    add(f"batches of {batch}", batch=batch)
    if gpu:
        add("bf16", {"precision": "bf16"})
        add("torch.compile", {"compile": True})
    add("text encoders dropped", {"drop_text_encoders": True})
    if gpu:
        fast = lines[-2]  # all but the dropped text encoders
        for plan in ("24gb", "16gb", "12gb"):
            lines.append(replace(fast, label=f"  the same, memory={plan}", settings=fast.settings | {"memory": plan}))
        lines += [replace(fast, label=f"  the same, batches of {size}", batch=size) for size in (1, 4)]
    return lines


def photos(images: int, side_px: int) -> Tensor:
    """Smooth random pictures with detail at every scale, on the 8-bit grid: (images, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(images, 3, side_px, side_px)
    for level in range(1, int(np.log2(side_px))):
        coarse = torch.randn(images, 3, 2**level, 2**level, generator=generator)
        total += nn.functional.interpolate(coarse, size=side_px, mode="bicubic") / 2 ** (0.7 * level)
    return quantize(total.mul(0.2).add(0.5).clamp(0, 1))


def run_line(line: Line, work: Work, answer: multiprocessing.connection.Connection) -> None:
    """Time the chain of one line, in a process of its own; send seconds (wall, CPU), peak memory and the states."""
    torch.set_num_threads(work.threads)
    RandomSource(size="tiny").text_encoder("text_encoder_3", dtype=torch.float32)  # imports what every line needs
    base_mb = _resident_mb()
    backbone = OSEDiffSD3(weights="random", size=work.size, device=work.device, **line.settings)
    states = photos(work.images, work.side_px)
    _step(backbone, states[: line.batch], range(line.batch))  # the first call warms kernels and compiles
    if not line.settings.get("drop_text_encoders"):  # whose reading belongs to the load, as the other lines' does
        backbone.forget_prompts()
    gpu = backbone._device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, cpu_seconds, records = 0.0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(work.steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            parts = []
            for first in range(0, work.images, line.batch):
                if line.forget:
                    backbone.forget_prompts()
                part = states[first : first + line.batch]
                seeds = range(first + work.images * step, first + work.images * step + len(part))
                out = _step(backbone, part, seeds)
                parts.append(_through_png(out, Path(folder)) if line.png else quantize(out, rounding="truncate"))
            states = torch.cat(parts)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            records.append(states)
    peak_mb = (
        torch.cuda.max_memory_allocated() / 1e6 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - base_mb
    )
    answer.send((seconds, cpu_seconds, peak_mb, [(record * 255).round().byte().numpy() for record in records]))


def _step(backbone: OSEDiffSD3, states: Tensor, seeds: Iterable[int]) -> Tensor:
    side = states.shape[-1]
    view = resize(view_at(side, STEP, CENTER).crop(states), side)
    return backbone(view, size=side, seeds=list(seeds))


def _through_png(states: Tensor, folder: Path) -> Tensor:
    for i, image in enumerate(to_pil(states, rounding="truncate")):
        image.save(folder / f"{i}.png")
    return torch.cat([from_pil(Image.open(folder / f"{i}.png")) for i in range(states.shape[0])])


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(line: Line, work: Work) -> tuple[float, float, float, list[np.ndarray]]:
    """Run one line in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_line, args=(line, work, send))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{line.label}: its process ended with {process.exitcode}; see above") from None
    process.join()
    return result


def flops(size: str, side_px: int) -> dict[str, int]:
    """Work of each part for one image (T5: one prompt), counted on the meta device."""
    source = RandomSource(size=size)
    transformer, vae = source.skeletons
    config = transformer.config
    with torch.device("meta"):
        t5 = source._text_model("text_encoder_3", torch.float32)
        latent = torch.empty(1, config.in_channels, side_px // 8, side_px // 8)
        image = torch.empty(1, 3, side_px, side_px)
        context = torch.empty(1, 77 + 512, config.joint_attention_dim)
        pooled, timestep = torch.empty(1, config.pooled_projection_dim), torch.empty(1)
        ids = torch.zeros(1, 512, dtype=torch.long)
    calls = {
        "transformer": lambda: transformer(latent, context, pooled, timestep),
        "T5": lambda: t5(ids),
        "encoder": lambda: vae.encoder(image),
        "decoder": lambda: vae.decoder(latent),
    }
    counts = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts[name] = counter.get_total_flops()
    return counts


def print_shares(work: Work) -> None:
    """Show that the model's work is divided as at full size."""
    ours, full = flops(work.size, work.side_px), flops("full", 512)
    print(f"work of one step ({work.size}, {work.side_px} px) and its share, beside the full size at 512 px:")
    for name in ours:
        share, wanted = ours[name] / sum(ours.values()), full[name] / sum(full.values())
        print(
            f"  {name:12} {ours[name] / 1e9:9.2f} GFLOP {share:6.1%}   {full[name] / 1e12:5.2f} TFLOP {wanted:6.1%}"
            f"   {share / wanted - 1:+.1%}"
        )


def report(lines: list[Line], work: Work) -> list[dict[str, object]]:
    """Measure and print every line."""
    kind = torch.cuda.get_device_name() if work.device != "cpu" else f"{platform.processor() or 'CPU'}, {work.threads} threads"
    print(f"\n{work.images} images to {work.scale}x ({work.steps} steps), empty prompt, {kind}, torch {torch.__version__}")
    heads = f"{'s':>8}{'ms/step':>9}{'faster':>8}{'CPU s':>9}{'faster':>8}{'peak MB':>9}  levels off: max, mean of first | last"
    print(f"{'':38}{heads}")
    rows: list[dict[str, object]] = []
    reference: list[np.ndarray] = []
    for line in lines:
        seconds, cpu_seconds, peak_mb, states = measure(line, work)
        reference = reference or states
        off = [np.abs(a.astype(int) - b.astype(int)) for a, b in zip(states, reference, strict=True)]
        rows.append(
            {
                "line": line.label,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "ms_per_step": 1000 * seconds / work.steps / work.images,
                "speedup": rows[0]["seconds"] / seconds if rows else 1.0,
                "cpu_speedup": rows[0]["cpu_seconds"] / cpu_seconds if rows else 1.0,
                "peak_mb": peak_mb,
                "levels_first_max": int(off[0].max()),
                "levels_first_mean": float(off[0].mean()),
                "levels_last_max": int(off[-1].max()),
                "levels_last_mean": float(off[-1].mean()),
            }
        )
        row = rows[-1]
        timing = f"{seconds:8.2f}{row['ms_per_step']:9.1f}{row['speedup']:7.2f}x{cpu_seconds:9.2f}{row['cpu_speedup']:7.2f}x"
        agreement = [f"{row[f'levels_{step}_max']}, {row[f'levels_{step}_mean']:.4f}" for step in ("first", "last")]
        print(f"{line.label:38}{timing}{peak_mb:9.0f}  {' | '.join(agreement)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--scale", type=int, default=256, help="a power of 4")
    parser.add_argument(
        "--batch", type=int, help="images at once in the later lines (16 on a GPU, 4 on a CPU, which gains little)"
    )
    parser.add_argument("--size", default="mid", help="of the random weights: mid, tiny, full")
    parser.add_argument("--side-px", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--full-size", action="store_true", help="full size at 512 px on a GPU")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if args.full_size:
        args.size, args.side_px, args.device = "full", 512, "cuda"
    work = Work(args.size, args.side_px, args.scale, args.images, args.device, args.threads)
    if STEP**work.steps != work.scale:
        parser.error(f"--scale {work.scale} is not a power of {STEP}")
    print_shares(work)
    rows = report(ablation(min(args.batch or (4 if args.device == "cpu" else 16), args.images), gpu=args.device != "cpu"), work)
    if args.json:
        args.json.write_text(json.dumps({"work": vars(args) | {"json": str(args.json)}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

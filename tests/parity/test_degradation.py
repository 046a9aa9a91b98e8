"""The degradation equals OSEDiff's, operator by operator and along recorded runs, and agrees with it in distribution."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coz.data import degradation_exact as exact
from coz.data import kernels
from coz.data.degradation import (
    FIRST,
    SECOND,
    Blur,
    Degradation,
    GaussianNoise,
    Jpeg,
    PoissonNoise,
    RealESRGAN,
    Resize,
)
from coz.image import from_pil


@pytest.fixture(scope="module")
def folder(parity) -> Path:
    return parity("degradation")


@pytest.fixture(scope="module")
def tolerance(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["tolerance"]


@pytest.fixture(scope="module")
def parameters(folder) -> dict:
    return json.loads((folder / "parameters.json").read_text())


@pytest.fixture(scope="module")
def arrays(folder) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "operators.npz"))


@pytest.fixture(scope="module")
def recorded_kernels(folder) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "kernels.npz"))


def of_kind(parameters: dict, kind: str) -> dict[str, dict]:
    found = {name: value for name, value in parameters["operators"].items() if name.startswith(kind)}
    assert found, f"the set records no {kind}"
    return found


def picture(arrays: dict, names: str | Sequence[str]) -> torch.Tensor:
    names = [names] if isinstance(names, str) else names
    return torch.cat([from_pil(Image.fromarray(arrays[name])) for name in names])


def unbatched(x: torch.Tensor, like: np.ndarray) -> np.ndarray:
    return x.numpy() if like.ndim == 4 else x[0].numpy()


# ---------------------------------------------------------------------------------------------------------------------
# kernels


def test_kernels(parameters, recorded_kernels, tolerance):
    for name, values in parameters["kernels"].items():
        shape, size = values["type"], values["size"]
        rest = {key: value for key, value in values.items() if key not in ("type", "size", "pad_to")}
        if shape == "sinc":
            kernel = kernels.sinc(size, **rest)
            kernel = kernels.pad(kernel, values["pad_to"]) if values["pad_to"] else kernel
        else:
            kernel = (kernels.plateau if shape.startswith("plateau") else kernels.gaussian)(size, **rest)
        np.testing.assert_allclose(kernel, recorded_kernels[name], rtol=0, atol=tolerance["kernels"]["atol"], err_msg=name)


class OfficialDraws:
    """The streams that the authors' code draws from: Python's for choices, NumPy's for numbers."""

    def __init__(self, seed: int) -> None:
        self._choices, self._numbers = random.Random(seed), np.random.RandomState(seed)

    def uniform(self, low, high):
        return self._numbers.uniform(low, high)

    def choice(self, options, weights=None):
        return self._choices.choice(options) if weights is None else self._choices.choices(options, weights)[0]


def test_seeded_kernels_keep_the_official_order_of_draws(folder, tolerance):
    recorded = dict(np.load(folder / "seeded_kernels.npz"))
    for seed in {int(name.split("_")[0].removeprefix("seed")) for name in recorded}:
        draws = OfficialDraws(seed)
        found = {"kernel1": kernels.draw_blur(draws, FIRST.blur), "kernel2": kernels.draw_blur(draws, SECOND.blur)}
        found["sinc"] = kernels.draw_last_sinc(draws, probability=0.8, sizes=SECOND.blur.sizes)
        for name, kernel in found.items():
            expected = recorded[f"seed{seed}_{name}"]
            np.testing.assert_allclose(kernel, expected, rtol=0, atol=tolerance["seeded_kernels"]["atol"], err_msg=f"{seed}")


# ---------------------------------------------------------------------------------------------------------------------
# operators


def test_blur(arrays, parameters, recorded_kernels, tolerance):
    for name, values in of_kind(parameters, "filter2D").items():
        names = [values["kernel"]] if isinstance(values["kernel"], str) else values["kernel"]
        side = values["kernel_padded_to"]
        found = [kernels.pad(recorded_kernels[k], side) if side else recorded_kernels[k] for k in names]
        blurred = exact.blur(picture(arrays, values["input"]), torch.from_numpy(np.stack(found)).float())
        np.testing.assert_allclose(
            unbatched(blurred, arrays[name]), arrays[name], rtol=0, atol=tolerance["filter2D"]["atol"], err_msg=name
        )


def test_gaussian_noise(arrays, parameters, tolerance):
    for name, values in of_kind(parameters, "gaussian").items():
        color = torch.from_numpy(arrays[f"{name}_draw_color"])[None]
        gray = torch.from_numpy(arrays[f"{name}_draw_gray"])[None, None] if values["gray"] else None
        noisy = exact.gaussian_noise(picture(arrays, values["input"]), sigma_255=values["sigma_255"], color=color, gray=gray)
        np.testing.assert_allclose(noisy[0].numpy(), arrays[name], rtol=0, atol=tolerance["gaussian"]["atol"], err_msg=name)


def test_poisson_noise(arrays, parameters, tolerance):
    for name, values in of_kind(parameters, "poisson").items():
        x, gray = picture(arrays, values["input"]), bool(values["gray"])
        counts = torch.from_numpy(arrays[f"{name}_counts_{'gray' if gray else 'color'}"].astype(np.float32))
        assert exact.poisson_levels(exact.on_grid(x)) == values["vals_color"]
        noisy = exact.poisson_noise(x, scale=values["scale"], counts=counts.view(1, -1, *x.shape[-2:]), gray=gray)
        np.testing.assert_allclose(noisy[0].numpy(), arrays[name], rtol=0, atol=tolerance["poisson"]["atol"], err_msg=name)


def assert_jpeg(found: np.ndarray, expected: np.ndarray, atol: float, what: str) -> None:
    """Equal but for the few 8 x 8 blocks in which a coefficient lies on a rounding edge."""
    off = (np.abs(found - expected) > atol).any(axis=-3).reshape(-1, *expected.shape[-2:])
    blocks = [block for plane in off for rows in _cut(plane, 0) for block in _cut(rows, 1)]
    count = sum(block.any() for block in blocks)
    # a chroma coefficient moves 16 x 16 pixels, four blocks, and one of them may be more than the share
    assert count <= max(0.003 * len(blocks), 4), f"{what}: {count} of {len(blocks)} blocks"


def _cut(x: np.ndarray, axis: int) -> list[np.ndarray]:
    return np.split(x, range(8, x.shape[axis], 8), axis=axis)


def test_jpeg(arrays, parameters, tolerance):
    exactly = 0
    for name, values in of_kind(parameters, "jpeg").items():
        x = picture(arrays, values["input"])
        qualities = values["quality"] if isinstance(values["quality"], list) else [values["quality"]]
        found = unbatched(exact.jpeg(x, torch.tensor(qualities)), arrays[name])
        assert_jpeg(found, arrays[name], tolerance["jpeg"]["atol"], name)
        exactly += np.abs(found - arrays[name]).max() <= tolerance["jpeg"]["atol"]
    assert exactly >= len(of_kind(parameters, "jpeg")) - 2


def test_resize(arrays, parameters, tolerance):
    for name, values in of_kind(parameters, "resize").items():
        x = picture(arrays, values["input"])
        if "scale_factor" in values:
            resized = exact.resize_by(x, values["scale_factor"], values["mode"])
        else:
            resized = exact.resize_to(x, tuple(values["size"]), values["mode"])
        assert resized[0].shape == arrays[name].shape
        np.testing.assert_allclose(resized[0].numpy(), arrays[name], rtol=0, atol=tolerance["resize"]["atol"], err_msg=name)


def test_sharpen(arrays, parameters, tolerance):
    for name, values in of_kind(parameters, "usm").items():
        settings = {key: values[key] for key in ("weight", "radius", "threshold")}
        sharp = exact.sharpen(picture(arrays, values["input"]), **settings)
        np.testing.assert_allclose(sharp[0].numpy(), arrays[name], rtol=0, atol=tolerance["usm"]["atol"], err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


@dataclass
class RecordedNoise:
    """Hands out what one run drew; gray noise draws a colour field too, which it does not use."""

    queue: list[np.ndarray] = field(default_factory=list)

    def _next(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.queue.pop(0).astype(np.float32)).view(*shape)

    def normal(self, shape):
        return self._next(shape)

    def poisson(self, means):
        return self._next(means.shape)


def test_recorded_runs(folder, parameters, tolerance):
    recorded = dict(np.load(folder / "traces.npz"))
    for run, values in parameters["traces"].items():
        x = from_pil(Image.fromarray(recorded["img_u8"]))
        x = x.flip(-1) if values["flip"] else x
        for step in values["ops"]:
            x = replay(step, x, {key: recorded.get(f"{run}/{step[key]}") for key in step if isinstance(step[key], str)})
            if "output" in step:
                assert_jpeg(x[0].numpy(), recorded[f"{run}/{step['output']}"], tolerance["trace_after_jpeg"]["atol"], run)
        levels = (exact.on_grid(x)[0] * 255).round().permute(1, 2, 0).numpy()
        off = np.abs(levels - recorded[f"{run}/lq_full_size_u8"].astype(float))
        limits = tolerance["trace_final_u8"]
        assert (off > limits["max_level_difference"]).mean() <= limits["share_of_pixels_beyond"], run


def replay(step: dict, x: torch.Tensor, recorded: dict[str, np.ndarray]) -> torch.Tensor:
    gray = bool(step.get("gray"))
    if step["op"] == "filter2D":
        return Blur(recorded["kernel"]).run(x, RecordedNoise(), "exact")
    if step["op"] == "resize":
        size = tuple(step["size"]) if "size" in step else None
        return Resize(step["mode"], factor=step.get("scale_factor"), size=size).run(x, RecordedNoise(), "exact")
    if step["op"] == "jpeg":
        return Jpeg(step["quality"]).run(x, RecordedNoise(), "exact")
    key = ("draw_" if step["op"] == "gaussian_noise" else "counts_") + ("gray" if gray else "color")
    noise = RecordedNoise([recorded[key]])
    if step["op"] == "gaussian_noise":
        return GaussianNoise(step["sigma_255"], gray).run(x, noise, "exact")
    return PoissonNoise(step["scale"], gray).run(x, noise, "exact")


# ---------------------------------------------------------------------------------------------------------------------
# distribution


def luma(x: np.ndarray) -> np.ndarray:
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def gradient_energy(x: np.ndarray) -> float:
    return np.square(np.diff(x, axis=0)).mean() + np.square(np.diff(x, axis=1)).mean()


def noise_level(x: np.ndarray) -> float:
    second = x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]
    laplacian = second[2:] - 2 * second[1:-1] + second[:-2]
    return math.sqrt(math.pi / 2) / 6 * np.abs(laplacian).mean() * 255


def block_means(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0] // 4, 4, x.shape[1] // 4, 4).mean((1, 3))


def measures(lq: np.ndarray, hr: np.ndarray) -> dict[str, float]:
    lq, hr = lq.astype(np.float64), hr.astype(np.float64)
    return {
        "psnr_db": 10 * math.log10(1 / np.square(lq - hr).mean()),
        "grad_energy_ratio": gradient_energy(luma(lq)) / gradient_energy(luma(hr)),
        "noise_full_res": noise_level(luma(lq)),
        "noise_after_4x4_mean": noise_level(block_means(luma(lq))),
        "chroma_noise_after_4x4_mean": noise_level(block_means(lq[2] - lq[1])),
        "mean_luma_shift": 255 * (luma(lq).mean() - luma(hr).mean()),
    }


def draw_measures(degradation: Degradation, folder: Path, *, count: int) -> dict[str, np.ndarray]:
    pictures = [from_pil(Image.open(path)) for path in sorted((folder / "hr").iterdir())]
    rows = []
    for index in range(count):
        hr = pictures[index % len(pictures)]
        rows.append(measures(degradation(hr, seed=1, indices=[index])[0].numpy(), hr[0].numpy()))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "count"), [("fast", 1504), ("exact", 96)])
def test_distribution_of_many_draws(folder, engine, count):
    from scipy.stats import ks_2samp

    recorded = dict(np.load(folder / "distribution.npz"))
    torch.set_num_threads(1)
    found = draw_measures(RealESRGAN(engine=engine), folder, count=count)
    n_recorded = len(recorded["values"])
    limit = 1.95 * math.sqrt((count + n_recorded) / (count * n_recorded))  # 0.1 %: 0.069 for 1600 against 1600
    for name, column in zip(recorded["columns"], recorded["values"].T, strict=True):
        mine = found[str(name)]
        assert ks_2samp(mine, column).statistic < limit, name
        error = math.hypot(mine.std() / math.sqrt(count), column.std() / math.sqrt(n_recorded))
        assert abs(mine.mean() - column.mean()) < 4 * error, name


def test_a_sample_depends_on_seed_and_index_alone():
    hr = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for engine in ("exact", "fast"):
        degradation = RealESRGAN(engine=engine)
        together = degradation(hr, seed=5, indices=[4, 7, 9])
        torch.manual_seed(99)
        alone = degradation(hr[1:2], seed=5, indices=[7])
        assert torch.equal(together[1:2], alone)
        assert not torch.equal(alone, degradation(hr[1:2], seed=6, indices=[7]))
        assert degradation(hr, seed=5, indices=[1, 2, 3], enlarged=False).shape == (3, 3, 16, 24)

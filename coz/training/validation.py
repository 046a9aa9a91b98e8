"""How good a network is on photographs that it does not train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from coz.checkpoint import WeightsNotFound
from coz.data.degradation import Degradation
from coz.image import encode_png, to_pil, to_uint8
from coz.metrics import Niqe, psnr
from coz.perceptual import load_lpips
from coz.provenance import INVENTED, SOFTWARE
from coz.store import write_atomic

NIQE_PX = 192  # two blocks a side
Row = dict[str, float | int | str]
Restore = Callable[[Tensor, Sequence[int]], Tensor]  # degraded crops and their numbers → restored crops


@dataclass
class Validation:
    """Held-out crops, degraded once and for all.

    Args:
        photos, names, hr: of the crops; (3, S, S) each.
        degradation, seed: what the network is given.
        enlarged: see `Degradation`.
        batch_size: crops at once.
    """

    photos: Sequence[Path]
    names: Sequence[str]
    hr: Sequence[Tensor]
    degradation: Degradation
    seed: int
    enlarged: bool
    batch_size: int = 1
    _lpips: nn.Module | None = field(default=None, repr=False)
    _niqe: Niqe = field(default_factory=Niqe, repr=False)

    def degraded(self, number: int) -> Tensor:
        """What the network is given of one crop, (1, 3, s, s)."""
        return self.degradation(self.hr[number][None], seed=self.seed, indices=[number], enlarged=self.enlarged)

    def restore(self, restore: Restore, numbers: Sequence[int], device: torch.device) -> list[Tensor]:
        """Run the network on some of the crops: (3, S, S) each, on the CPU."""
        restored: list[Tensor] = []
        for start in range(0, len(numbers), self.batch_size):
            part = list(numbers[start : start + self.batch_size])
            lq = torch.cat([self.degraded(number) for number in part]).to(device)
            restored += list(restore(lq, part).float().cpu())
        return restored

    def measure(self, number: int, picture: Tensor) -> Row:
        """PSNR and LPIPS against the photograph, NIQE of the picture alone."""
        hr = self.hr[number]
        row: Row = {"crop": self.names[number], "psnr": psnr(picture, hr)}
        lpips = self._load_lpips()
        if lpips is not None:
            with torch.no_grad():
                row["lpips"] = float(lpips(picture[None], hr[None], normalize=True))
        if min(hr.shape[-2:]) >= NIQE_PX:
            row["niqe"] = self._niqe.score(to_uint8(picture[None])[0])
        return row

    def floor(self, number: int) -> Row:
        """What costs nothing: the best picture of one colour, and the degraded picture itself, enlarged."""
        hr = self.hr[number]
        flat = hr.mean((-2, -1), keepdim=True).expand_as(hr)
        enlarged = self.degradation(hr[None], seed=self.seed, indices=[number], enlarged=True)[0]
        return {"psnr_constant_color": psnr(flat, hr), "psnr_input": psnr(enlarged, hr)}

    def _load_lpips(self) -> nn.Module | None:
        if self._lpips is None:
            try:
                self._lpips = load_lpips("alex")
            except WeightsNotFound:
                return None
        return self._lpips

    def grid(self, restored: Mapping[int, Tensor], path: Path, *, rows: int = 4) -> None:
        """Degraded, restored, photograph: one row for each of the first crops."""
        shown = sorted(restored)[:rows]
        size = self.hr[0].shape[-1]
        sheet = Image.new("RGB", (3 * size, len(shown) * size))
        for i, number in enumerate(shown):
            lq = to_pil(self.degraded(number))[0].resize((size, size), Image.Resampling.NEAREST)
            cells = [lq, *to_pil(restored[number][None]), *to_pil(self.hr[number][None])]
            for j, cell in enumerate(cells):
                sheet.paste(cell, (j * size, i * size))
        write_atomic(path, encode_png(sheet, note={"Software": SOFTWARE, "Warning": INVENTED}))


def averages(rows: Sequence[Row]) -> dict[str, float]:
    """Means of the numbers over the crops."""
    names = [name for name in rows[0] if isinstance(rows[0][name], float)]
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in names}


@dataclass(frozen=True)
class Gain:
    """A paired difference with its 95 % interval."""

    metric: str
    before: float
    after: float
    mean: float
    low: float
    high: float


def paired_gain(before: Sequence[float], after: Sequence[float], metric: str) -> Gain:
    """Mean of after - before over the same crops, with Student's 95 % interval."""
    from scipy.stats import t

    steps = [b - a for a, b in zip(before, after, strict=True)]
    n, mean = len(steps), sum(steps) / len(steps)
    deviation = math.sqrt(sum((step - mean) ** 2 for step in steps) / max(n - 1, 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n) if n > 1 else math.inf
    return Gain(metric, sum(before) / n, sum(after) / n, mean, mean - half, mean + half)

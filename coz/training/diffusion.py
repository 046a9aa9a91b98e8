"""Two noise processes behind one interface: SD2.1 predicts the noise, SD3 a velocity.

SD2.1:  x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e,   the network predicts e
SD3:    x_t = (1 - s) x0 + s e,                 the network predicts v = e - x0
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """What the losses need to know of a diffusion model. Times are (B,), on the latents' device."""

    def distillation_times(self, uniform: Tensor) -> Tensor:
        """Times for the distillation out of uniform draws (B,) in [0, 1); the ends of the schedule are left out."""
        ...

    def regression_times(self, uniform: Tensor) -> Tensor:
        """Times for the regulariser's own loss out of uniform draws (B,) in [0, 1)."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...

    def estimate_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """The clean latent that a prediction implies."""
        ...

    def regression_loss(self, prediction: Tensor, *, clean: Tensor, noise: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """How far a prediction is off, one number in float32."""
        ...


class EpsilonProcess:
    """SD2.1's. Times are whole numbers of 0 to T - 1.

    Args:
        alphas_cumprod: (T,), the cumulative alpha by time.
        low, high: the part of the schedule that the distillation uses, low <= t < high (OSEDiff: 20 to 980 of 1000).
    """

    def __init__(self, alphas_cumprod: Tensor, *, low: float = 0.02, high: float = 0.98) -> None:
        self._alphas = alphas_cumprod.float()
        self._low, self._high = round(low * len(alphas_cumprod)), round(high * len(alphas_cumprod))

    def distillation_times(self, uniform: Tensor) -> Tensor:
        return (self._low + uniform * (self._high - self._low)).floor().long()

    def regression_times(self, uniform: Tensor) -> Tensor:
        return (uniform * len(self._alphas)).floor().long()

    def _alpha(self, times: Tensor) -> Tensor:
        return self._alphas.to(times.device)[times].view(-1, 1, 1, 1)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        alpha = self._alpha(times)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def estimate_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        alpha = self._alpha(times)
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()

    def regression_loss(self, prediction: Tensor, *, clean: Tensor, noise: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        return (prediction.float() - noise.float()).square().mean()


class FlowProcess:
    """SD3's. Times are 1000 times the share of noise s.

    Args:
        shift: bends uniform times towards noise, s = shift u / (1 + (shift - 1) u); SD3's is 3.
        low, high: the uniform times that the distillation uses.
    """

    def __init__(self, *, shift: float = 3.0, low: float = 0.02, high: float = 0.98) -> None:
        self._shift, self._low, self._high = shift, low, high

    def distillation_times(self, uniform: Tensor) -> Tensor:
        return 1000 * shifted(self._low + uniform * (self._high - self._low), self._shift)

    def regression_times(self, uniform: Tensor) -> Tensor:
        return 1000 * shifted(uniform.clamp(min=1e-3), self._shift)

    def _sigma(self, times: Tensor) -> Tensor:
        return (times / 1000).view(-1, 1, 1, 1)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = self._sigma(times)
        return (1 - sigma) * clean + sigma * noise

    def estimate_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return noisy - self._sigma(times) * prediction

    def regression_loss(self, prediction: Tensor, *, clean: Tensor, noise: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        return (prediction.float() - (noise - clean).float()).square().mean()


class ReleasedFlowProcess(FlowProcess):
    """As the released code of Chain-of-Zoom has it, for parity: its schedule bends twice and ends at s = 0.0089, s is
    rounded to half, every loss of a batch is taken at one time, and the regulariser's loss compares clean estimates."""

    def __init__(self, *, shift: float = 3.0, steps: int = 1000) -> None:
        super().__init__(shift=shift)
        lowest = shifted(torch.tensor(1 / steps), shift).item()
        self.times = 1000 * shifted(torch.linspace(1, lowest, steps, dtype=torch.float64), shift).float()

    def _released_times(self, uniform: Tensor) -> Tensor:
        index = (uniform[:1] * len(self.times)).floor().long()
        return self.times.to(uniform.device)[index].expand(len(uniform))

    distillation_times = regression_times = _released_times

    def _sigma(self, times: Tensor) -> Tensor:
        return (times / 1000).half().float().view(-1, 1, 1, 1)

    def regression_loss(self, prediction: Tensor, *, clean: Tensor, noise: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        return (self.estimate_clean(noisy, prediction, times) - clean).square().mean()


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """s = shift u / (1 + (shift - 1) u), Esser et al. 2024, equation 23."""
    return shift * uniform / (1 + (shift - 1) * uniform)

"""Correction of the predicted noise at sampling time (PTQD, arXiv 2305.10657, Section 3).

The quantization error of a step splits into a part correlated with the full-precision output and
the rest:  eps_Q - eps = k eps + mu + residual.  The correction is  eps = (eps_Q - mu) / (1 + k).
The residual's variance is taken out of the sampler's own noise where there is any: of DDIM with
eta > 0 and of DDPM, but not of a learned variance.
"""

import torch
from torch import nn

from ..core.context import TimestepContext

LARGEST_K = 0.3


class OutputCorrection(nn.Module):
    """Per calibrated timestep and output channel. Buffers k, mu (S, C) and sigma (S,), float32."""

    k: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor

    def __init__(
        self, context: TimestepContext, k: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor
    ):
        super().__init__()
        self.context = context
        self.register_buffer("k", k)
        self.register_buffer("mu", mu)
        self.register_buffer("sigma", sigma)
        self._sigma = sigma.tolist()  # a look on the device would wait for it in each step

    @classmethod
    def from_state(
        cls, context: TimestepContext, state: dict[str, torch.Tensor]
    ) -> "OutputCorrection":
        """Raises ValueError if the tensors do not fit together."""
        k, mu, sigma = state.get("k"), state.get("mu"), state.get("sigma")
        if k is None or mu is None or sigma is None or k.dim() != 2 or k.shape != mu.shape:
            raise ValueError("damaged correction tables")
        if len(k) != len(context.timesteps) or sigma.shape != (len(k),):
            raise ValueError("the correction tables do not fit the calibrated timesteps")
        if float(k.abs().max()) > LARGEST_K + 1e-6 or float(sigma.min()) < 0:
            raise ValueError("the correction tables are out of range")
        return cls(context, k, mu, sigma)

    def noise_scale(self, t: int, sigma_t: float, direction: float) -> float:
        """What is left of a sampler's noise of standard deviation sigma_t at timestep t, where eps
        has the coefficient `direction` in the step; see corrected_variance."""
        sigma_q = self._sigma[int(self.context.nearest(t))]
        return corrected_variance(sigma_t, direction, sigma_q)

    def forward(self, eps: torch.Tensor) -> torch.Tensor:  # (B, C, H, W)
        index = self.context.index  # a number costs no transfer to the device
        shape = (-1, eps.shape[1], 1, 1)
        return (eps - self.mu[index].view(shape)) / (1 + self.k[index].view(shape))


def corrected_variance(sigma_t: float, direction: float, sigma_q: float) -> float:
    """Standard deviation left for the sampler's own noise (PTQD, variance schedule calibration).

    sigma_t^2 - c_t^2 sigma_q^2, not below zero; c_t is the coefficient of eps in the step, which
    stays the one of the original schedule. Zero for eta = 0.
    """
    left = max(0.0, sigma_t**2 - direction**2 * sigma_q**2) ** 0.5
    return min(left, sigma_t)  # squares of subnormal numbers round up

"""DPM-Solver++(2M), a second-order multistep sampler (Lu et al. 2022b, algorithm 2).

It integrates the predicted x0 in the half log signal-to-noise ratio lambda = log(alpha / sigma),
with one network call per step. Conventions (timesteps descending, on_step) are those of
models.samplers; it draws no noise.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .samplers import Denoiser, FiniteCheck, StepHook, _batch_t

SPACINGS = ("uniform", "logsnr")


def half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """lambda = log(sqrt(abar) / sqrt(1 - abar)), float64, shaped like the table."""
    table = np.asarray(alphas_cumprod, dtype=np.float64)
    return 0.5 * (np.log(table) - np.log1p(-table))


def dpm_timesteps(steps: int, alphas_cumprod: np.ndarray, spacing: str = "uniform") -> list[int]:
    """Timesteps of `steps` network calls, descending from T - 1, without repetitions.

    The way down to t = 0 is divided evenly in t or in lambda; its end is not visited. Even steps
    in lambda crowd near t = 0, where several may fall on one timestep: then there are fewer than
    asked. Raises ValueError when steps is outside 1..T-1.
    """
    last = len(alphas_cumprod) - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps must be within 1..{last}, got {steps}")
    if spacing == "uniform":
        grid = np.linspace(last, 0, steps + 1)[:-1]
        return [int(t) for t in np.round(grid)]
    if spacing != "logsnr":
        raise ValueError(f"unknown spacing '{spacing}' (one of {', '.join(SPACINGS)})")
    ratio = half_log_snr(alphas_cumprod)  # falls with t
    grid = np.linspace(ratio[last], ratio[0], steps + 1)[:-1]
    nearest = {int(np.abs(ratio - value).argmin()) for value in grid}
    return sorted(nearest, reverse=True)


def dpmpp_2m(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    clip_denoised: bool = False,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """DPM-Solver++(2M) for a network that predicts eps.

    The first step is of first order, and so is the last, which goes to the clean image and equals
    the predicted x0. Returns it (B, C, H, W). Raises ValueError unless timesteps strictly descend.
    """
    if any(a <= b for a, b in zip(timesteps, timesteps[1:], strict=False)):
        raise ValueError("DPM-Solver++ needs strictly descending timesteps")
    table = np.asarray(alphas_cumprod, dtype=np.float64)
    ratio = half_log_snr(table)
    earlier_x0, earlier_h = None, math.inf
    check = FiniteCheck()
    for k, t in enumerate(timesteps):
        a_t = float(table[t])
        eps = model(x, _batch_t(x, t))
        x0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        if k == len(timesteps) - 1:
            x_prev = x0
        else:
            a_next = float(table[timesteps[k + 1]])
            h = float(ratio[timesteps[k + 1]] - ratio[t])
            slope = h / (2 * earlier_h)  # 1 / 2r; 0 in the first step
            d = x0 if earlier_x0 is None else (1 + slope) * x0 - slope * earlier_x0
            x_prev = ((1 - a_next) / (1 - a_t)) ** 0.5 * x - a_next**0.5 * math.expm1(-h) * d
            earlier_h = h
        earlier_x0 = x0
        check(x_prev, t)
        if on_step is not None:
            on_step(k=k, t=t, x_t=x, eps=eps, x_prev=x_prev, pred_x0=x0)
        x = x_prev
    check.end()
    return x

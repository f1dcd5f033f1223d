"""Samplers: plain functions of a callable eps(x, t), in the names of the equations.

A sampler receives its start x (B, C, H, W), the timesteps in order of use (descending), the table
alphas_cumprod (T,) float32 or float64 and a function `noise(k)` that returns the Gaussian draw of
step k, shaped like x. Nothing here draws random numbers: an image depends on its own noise alone.

`on_step(k, t, x_t, eps, x_prev, pred_x0)` is called after each step (k counts from 0).
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Noise = Callable[[int], torch.Tensor]
# (t, sigma_t, coefficient of eps in the step) -> the standard deviation that is still to be added
# where the denoiser's eps brings some of the step's noise itself.
NoiseScale = Callable[[int, float, float], float]


class StepHook(Protocol):
    """What a sampler reports after each step; tensors are (B, C, H, W)."""

    def __call__(
        self,
        k: int,
        t: int,
        x_t: torch.Tensor,
        eps: torch.Tensor,
        x_prev: torch.Tensor,
        pred_x0: torch.Tensor,
    ) -> None: ...


class SamplingError(ValueError):
    """The denoiser returned a value that is not finite."""


def _alpha_bar(table: np.ndarray, t: int) -> np.floating:
    return table.dtype.type(1) if t < 0 else table[t]  # before the first step nothing is noise


def _batch_t(x: torch.Tensor, t: int) -> torch.Tensor:
    """The timestep of each sample, (B,), on the host: who needs it as a number (a quantizer that
    chooses its group) need not wait for the device; the denoiser copies it there."""
    return torch.full((x.shape[0],), t, dtype=torch.long)


class FiniteCheck:
    """Finds the first step after which a sample is not finite.

    On the CPU that ends the run at once. On other devices a look at the values would wait for all
    that was asked of the device, so that what is to be looked at stays there until `end`: the
    largest value of each step, which is not finite where one is not, and takes a single launch.
    """

    def __init__(self) -> None:
        self._timesteps: list[float] = []
        self._largest: list[torch.Tensor] = []  # ()

    def __call__(self, x: torch.Tensor, t: float) -> None:
        """After the step from timestep t. Raises SamplingError."""
        self._timesteps.append(t)
        self._largest.append(torch.linalg.vector_norm(x, math.inf))
        if x.device.type == "cpu":
            self.end()

    def end(self) -> None:
        """Raises SamplingError if there was such a step. The next one is the first again."""
        timesteps, largest = self._timesteps, self._largest
        self._timesteps, self._largest = [], []
        if largest and not all(finite := torch.stack(largest).isfinite().tolist()):
            t = timesteps[finite.index(False)]
            raise SamplingError(f"the sample is not finite after timestep {t:g}: NaN or infinity")


def scaled_sigma(
    noise_scale: NoiseScale | None, t: int, sigma: float, a_t: float, a_prev: float
) -> float:
    """sigma of a DDIM step, or what noise_scale leaves of it; the mean of the step stays."""
    if noise_scale is None:
        return sigma
    of_eps = max(1 - a_prev - sigma**2, 0.0) ** 0.5 - (a_prev * (1 - a_t) / a_t) ** 0.5
    return noise_scale(t, sigma, of_eps)


def ddim(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
    noise: Noise | None = None,
    noise_scale: NoiseScale | None = None,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta 0 is deterministic and needs no noise.

    clip_denoised clips the predicted x0 to [-1, 1] and derives eps again from it, so that x0 and
    eps stay consistent. Returns x after the last step (B, C, H, W).
    """
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs a noise function")
    following = [*timesteps[1:], -1]
    check = FiniteCheck()
    for k, (t, t_prev) in enumerate(zip(timesteps, following, strict=True)):
        a_t, a_prev = (
            float(_alpha_bar(alphas_cumprod, t)),
            float(_alpha_bar(alphas_cumprod, t_prev)),
        )
        eps = model(x, _batch_t(x, t))
        x0 = (x - eps * (1 - a_t) ** 0.5) / a_t**0.5
        direction = eps
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
            direction = (x - x0 * a_t**0.5) / (1 - a_t) ** 0.5
        sigma = eta * ((1 - a_t / a_prev) * (1 - a_prev) / (1 - a_t)) ** 0.5
        x_prev = a_prev**0.5 * x0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * direction
        if sigma > 0:
            assert noise is not None  # eta > 0
            x_prev = x_prev + scaled_sigma(noise_scale, t, sigma, a_t, a_prev) * noise(k)
        check(x_prev, t)
        if on_step is not None:
            on_step(k=k, t=t, x_t=x, eps=eps, x_prev=x_prev, pred_x0=x0)
        x = x_prev
    check.end()
    return x


def ddpm(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    noise: Noise,
    noise_scale: NoiseScale | None = None,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the larger variance beta_t.

    x0 is always clipped to [-1, 1]. On a shortened list of timesteps beta_t is that of the jump,
    1 - abar_t / abar_prev. No noise is added at t = 0.
    """
    following = [*timesteps[1:], -1]
    check = FiniteCheck()
    for k, (t, t_prev) in enumerate(zip(timesteps, following, strict=True)):
        a_t, a_prev = _alpha_bar(alphas_cumprod, t), _alpha_bar(alphas_cumprod, t_prev)
        # In the table's own precision: the public samplers use float32, and at small t the
        # cancellation in 1 - a_t / a_prev is visible.
        beta = 1 - a_t / a_prev
        mean_x0 = float(a_prev**0.5 * beta / (1 - a_t))
        mean_x = float((1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t))
        eps = model(x, _batch_t(x, t))
        x0 = (float((1 / a_t) ** 0.5) * x - float((1 / a_t - 1) ** 0.5) * eps).clamp(-1, 1)
        x_prev = mean_x0 * x0 + mean_x * x
        if t > 0:
            sigma = float(beta**0.5)
            if noise_scale is not None:
                sigma = noise_scale(t, sigma, -mean_x0 * float((1 / a_t - 1) ** 0.5))
            x_prev = x_prev + sigma * noise(k)
        check(x_prev, t)
        if on_step is not None:
            on_step(k=k, t=t, x_t=x, eps=eps, x_prev=x_prev, pred_x0=x0)
        x = x_prev
    check.end()
    return x

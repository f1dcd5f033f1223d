"""Samplers of CompVis/latent-diffusion: its DDIM and PLMS, as plain functions of eps(x, t).

They differ from models.samplers in where a trajectory ends. Timesteps are shifted up by one, and
the last step goes to t = 0 (alphas_cumprod[0]), not to the clean image: with eta > 0 it still adds
noise. Conventions (timesteps descending, noise(k), on_step) are those of models.samplers.
"""

from collections import deque
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from .samplers import Denoiser, FiniteCheck, Noise, NoiseScale, StepHook, _batch_t, scaled_sigma

# Adams-Bashforth weights of eps, newest first, by the number of earlier predictions.
ADAMS_BASHFORTH = {
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ldm_timesteps(steps: int, skip: str = "uniform", train_timesteps: int = 1000) -> list[int]:
    """Timesteps of latent diffusion, descending: those of DDIM plus one.

    uniform takes multiples of T // steps, which may be more than asked (400 of 1000 gives 500).
    quad may repeat small t. Raises ValueError where the last one would be T: for uniform, when
    steps is above T / 2.
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps must be within 1..{train_timesteps}, got {steps}")
    if skip == "uniform":
        ascending = np.arange(0, train_timesteps, train_timesteps // steps)
    elif skip == "quad":
        ascending = (np.linspace(0, np.sqrt(train_timesteps * 0.8), steps) ** 2).astype(int)
    else:
        raise ValueError(f"unknown skip '{skip}' (one of uniform, quad)")
    if ascending[-1] + 1 >= train_timesteps:
        raise ValueError(f"{steps} steps end at {train_timesteps}, outside the training timesteps")
    return [int(t) + 1 for t in ascending[::-1]]


def ldm_tables(
    timesteps: Sequence[int], alphas_cumprod: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alphas, alphas_prev and sigmas in the order of `timesteps` (descending), (S,) each.

    alphas have the precision of alphas_cumprod, the others float64. alphas_prev ends with
    alphas_cumprod[0]. sigmas: Song et al. 2021, eq. 16, with 1 / (1 - alphas) in the table's own
    precision, as the public sampler takes it.
    """
    alphas = alphas_cumprod[list(timesteps)]
    alphas_prev = np.append(alphas[1:], alphas_cumprod[0]).astype(np.float64)
    sigmas = eta * np.sqrt((1 - alphas_prev) * (1 / (1 - alphas)) * (1 - alphas / alphas_prev))
    return alphas, alphas_prev, sigmas


def _step(
    x: torch.Tensor, eps: torch.Tensor, a_t: float, a_prev: float, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One DDIM step without its noise (Song et al. 2021, eq. 12): x_prev and the predicted x0."""
    x0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    x_prev = a_prev**0.5 * x0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
    return x_prev, x0


def ldm_ddim(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    noise_scale: NoiseScale | None = None,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """DDIM of latent diffusion. eta 0 is deterministic and needs no noise.

    Returns the latent at t = 0 (B, C, H, W), a little short of the predicted x0.
    """
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs a noise function")
    tables = zip(*ldm_tables(timesteps, alphas_cumprod, eta), strict=True)
    check = FiniteCheck()
    for k, (t, row) in enumerate(zip(timesteps, tables, strict=True)):
        a_t, a_prev, sigma = map(float, row)
        eps = model(x, _batch_t(x, t))
        x_prev, x0 = _step(x, eps, a_t, a_prev, sigma)
        if sigma > 0:
            assert noise is not None  # eta > 0
            x_prev = x_prev + scaled_sigma(noise_scale, t, sigma, a_t, a_prev) * noise(k)
        check(x_prev, t)
        if on_step is not None:
            on_step(k=k, t=t, x_t=x, eps=eps, x_prev=x_prev, pred_x0=x0)
        x = x_prev
    check.end()
    return x


def plms(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """Pseudo linear multistep (Liu et al. 2022, PNDM): DDIM steps along an extrapolated eps.

    Each step combines up to three earlier predictions. The first has none and asks the network
    again at the end of the step (a Heun step): one call more than there are timesteps. on_step
    receives the network's eps at (x_t, t), not the combination. Returns x at t = 0 (B, C, H, W).
    """
    alphas, alphas_prev, _ = ldm_tables(timesteps, alphas_cumprod, eta=0.0)
    earlier: deque[torch.Tensor] = deque(maxlen=3)  # newest first
    check = FiniteCheck()
    for k, t in enumerate(timesteps):
        a_t, a_prev = float(alphas[k]), float(alphas_prev[k])
        eps = model(x, _batch_t(x, t))
        if earlier:
            weights = ADAMS_BASHFORTH[len(earlier)]
            terms = (w * e for w, e in zip(weights, [eps, *earlier], strict=True))
            direction = cast(torch.Tensor, sum(terms))  # never the 0 of an empty sum
        else:
            ahead, _ = _step(x, eps, a_t, a_prev, 0.0)
            t_next = timesteps[min(k + 1, len(timesteps) - 1)]
            direction = (eps + model(ahead, _batch_t(x, t_next))) / 2
        x_prev, x0 = _step(x, direction, a_t, a_prev, 0.0)
        check(x_prev, t)
        if on_step is not None:
            on_step(k=k, t=t, x_t=x, eps=eps, x_prev=x_prev, pred_x0=x0)
        earlier.appendleft(eps)
        x = x_prev
    check.end()
    return x

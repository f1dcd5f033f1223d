"""Noise schedules (betas) and lists of sampling timesteps, in float64.

T is the number of training timesteps (1000 for every public checkpoint). Sampling timesteps are
returned in the order of use, descending, and may repeat: `quad` with S=100 calls t=0 four times.
"""

import math
from collections.abc import Sequence

import numpy as np

SCHEDULES = ("linear", "scaled_linear", "quad", "sigmoid", "cosine", "const", "jsd")
SKIPS = ("uniform", "quad")


def make_betas(
    schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    train_timesteps: int = 1000,
) -> np.ndarray:
    """The noise schedule: betas (T,) float64.

    `quad` of DDIM and `scaled_linear` (called "linear" in latent diffusion) are the same formula:
    the square of a straight line between the roots. `cosine` is Nichol & Dhariwal 2021, eq. 17.
    Raises ValueError for an unknown name or values outside (0, 1).
    """
    count = train_timesteps
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown beta schedule '{schedule}' (one of {', '.join(SCHEDULES)})")
    if count < 1:
        raise ValueError(f"train_timesteps must be at least 1, got {count}")
    if schedule == "cosine":
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(count)])
    if schedule == "jsd":
        return 1.0 / np.linspace(count, 1, count, dtype=np.float64)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    if schedule == "linear":
        return np.linspace(beta_start, beta_end, count, dtype=np.float64)
    if schedule == "sigmoid":
        line = np.linspace(-6, 6, count, dtype=np.float64)
        return 1 / (np.exp(-line) + 1) * (beta_end - beta_start) + beta_start
    if schedule == "const":
        return np.full(count, beta_end, dtype=np.float64)
    return np.linspace(beta_start**0.5, beta_end**0.5, count, dtype=np.float64) ** 2


def alphas_cumprod(betas: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Cumulative product of 1 - beta, (T,). float32, as the public DDIM samplers compute it."""
    return np.cumprod(1 - betas.astype(dtype), axis=0, dtype=dtype)


def sampling_timesteps(steps: int, skip: str = "uniform", train_timesteps: int = 1000) -> list[int]:
    """Timesteps of the DDIM runner, descending (Song et al. 2021, appendix D.2).

    uniform: multiples of T // steps (more than asked when steps does not divide T).
    quad: squares of an even grid up to sqrt(0.8 T); small t may repeat.
    Raises ValueError when steps is outside 1..T.
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps must be within 1..{train_timesteps}, got {steps}")
    if skip == "uniform":
        ascending: Sequence[int] = range(0, train_timesteps, train_timesteps // steps)
    elif skip == "quad":
        grid = np.linspace(0, np.sqrt(train_timesteps * 0.8), steps) ** 2
        ascending = [int(t) for t in grid]
    else:
        raise ValueError(f"unknown skip '{skip}' (one of {', '.join(SKIPS)})")
    return list(ascending)[::-1]

"""Samplers of openai/guided-diffusion: ancestral sampling with a learned variance, and DDIM.

The network returns (B, 2C, H, W): eps, then v, which places the log variance between its bounds
(Nichol & Dhariwal 2021, eq. 15). It sees original timesteps, while betas and variances are those
of the shortened chain. Conventions (timesteps descending, noise(k), on_step) are those of
models.samplers; on_step receives eps alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .samplers import Denoiser, FiniteCheck, Noise, StepHook, _batch_t, ddim


def space_timesteps(spacing: str, train_timesteps: int = 1000) -> list[int]:
    """Timesteps in the notation of guided diffusion, descending.

    "ddimN": the first integer stride that gives exactly N. "250": N spread over 0..T-1 with both
    ends. "10,15,20": the chain in equal sections, each with its own count. Raises ValueError when
    the spacing cannot be read or does not fit.
    """
    if spacing.startswith("ddim"):
        count = _whole(spacing.removeprefix("ddim"), spacing)
        for stride in range(1, train_timesteps):
            chain = range(0, train_timesteps, stride)
            if len(chain) == count:
                return list(chain)[::-1]
        raise ValueError(f"no integer stride gives {count} of {train_timesteps} timesteps")
    counts = [_whole(part, spacing) for part in spacing.split(",")]
    size, longer = divmod(train_timesteps, len(counts))
    taken: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"a section of {length} timesteps cannot give {count}")
        distance = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            taken.add(start + round(position))
            position += distance  # summed, not multiplied: rounding of ties is the upstream's
        start += length
    return sorted(taken, reverse=True)


def _whole(text: str, spacing: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"cannot read the timestep spacing '{spacing}'")
    return int(text)


@dataclass(frozen=True)
class Posterior:
    """q(x_prev | x_t, x0) of a chain, float64 (S,) each, ascending in t (Ho et al. 2020, eq. 7).

    mean = mean_x0 * x0 + mean_x * x_t. The log variance lies between log_variance (of beta tilde,
    whose first value, 0, is replaced by the second) and log_beta.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    mean_x0: np.ndarray
    mean_x: np.ndarray
    log_variance: np.ndarray
    log_beta: np.ndarray


def posterior(timesteps: Sequence[int], alphas_cumprod: np.ndarray) -> Posterior:
    """Tables of the chain of `timesteps` (any order) within the full alphas_cumprod (T,)."""
    bar = np.asarray(alphas_cumprod, dtype=np.float64)[sorted(timesteps)]
    betas = 1 - bar / np.append(1.0, bar[:-1])
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    first = variance[1:2] if len(variance) > 1 else betas
    return Posterior(
        betas=betas,
        alphas_cumprod=bar,
        mean_x0=betas * np.sqrt(before) / (1 - bar),
        mean_x=(1 - before) * np.sqrt(1 - betas) / (1 - bar),
        log_variance=np.log(np.append(first, variance[1:])),
        log_beta=np.log(betas),
    )


def guided_ddpm(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    noise: Noise,
    clip_denoised: bool = True,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """Ancestral sampling with the learned variance. No noise is added in the last step.

    Returns x after the last step (B, C, H, W). Raises ValueError if the network predicts no v.
    """
    table = posterior(timesteps, alphas_cumprod)
    channels = x.shape[1]
    check = FiniteCheck()
    for k, t in enumerate(timesteps):
        i = len(timesteps) - 1 - k
        out = model(x, _batch_t(x, t))
        if out.shape[1] != 2 * channels:
            raise ValueError(f"expected {2 * channels} channels (eps and v), got {out.shape[1]}")
        eps, v = out.chunk(2, dim=1)
        bar = float(table.alphas_cumprod[i])
        x0 = (1 / bar) ** 0.5 * x - (1 / bar - 1) ** 0.5 * eps
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        x_prev = float(table.mean_x0[i]) * x0 + float(table.mean_x[i]) * x
        if i > 0:
            share = (v + 1) / 2
            log_variance = share * float(table.log_beta[i])
            log_variance = log_variance + (1 - share) * float(table.log_variance[i])
            x_prev = x_prev + torch.exp(0.5 * log_variance) * noise(k)
        check(x_prev, t)
        if on_step is not None:
            on_step(k=k, t=t, x_t=x, eps=eps, x_prev=x_prev, pred_x0=x0)
        x = x_prev
    check.end()
    return x


def guided_ddim(
    model: Denoiser,
    x: torch.Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    *,
    eta: float = 0.0,
    clip_denoised: bool = True,
    noise: Noise | None = None,
    on_step: StepHook | None = None,
) -> torch.Tensor:
    """DDIM of models.samplers on the eps half of the network's output; v is ignored."""

    def eps_alone(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x, t)[:, : x.shape[1]]

    return ddim(
        eps_alone,
        x,
        timesteps,
        alphas_cumprod,
        eta=eta,
        clip_denoised=clip_denoised,
        noise=noise,
        on_step=on_step,
    )

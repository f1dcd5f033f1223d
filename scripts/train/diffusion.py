"""The loss of denoisers: the simple eps loss (Ho et al. 2020, eq. 14) with antithetic timesteps."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def antithetic_timesteps(batch: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pairs t and T - 1 - t, (batch,): lower variance of the loss at the same cost."""
    t = torch.randint(0, count, (batch // 2 + 1,), generator=generator)
    return torch.cat([t, count - 1 - t])[:batch]


def eps_loss(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    generator: torch.Generator,
    bfloat16: bool,
) -> torch.Tensor:
    """Mean squared error of the predicted noise. x0 (B, C, H, W), alphas_cumprod (T,)."""
    t = antithetic_timesteps(len(x0), len(alphas_cumprod), generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    a = alphas_cumprod[t][:, None, None, None]
    x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bfloat16):
        eps = model(x_t, t)
    return F.mse_loss(eps.float(), noise)

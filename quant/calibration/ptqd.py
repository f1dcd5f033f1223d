"""The fit of PTQD's correction (arXiv 2305.10657, Section 3; docs/method.md, section 8)."""

import torch

from ..core.context import TimestepContext
from ..runtime.correction import LARGEST_K, OutputCorrection


def fit_tables(
    context: TimestepContext,
    eps: torch.Tensor,
    eps_q: torch.Tensor,
    indices: torch.Tensor,
) -> OutputCorrection:
    """Least squares per calibrated timestep and channel, kept only where it lowers the error of
    held-out samples.

    eps, eps_q (N, C, H, W): full-precision and quantized outputs; indices (N,). Odd samples fit,
    even samples judge. Timesteps without at least four samples stay uncorrected.
    """
    count, channels = len(context.timesteps), eps.shape[1]
    k, mu = torch.zeros(count, channels), torch.zeros(count, channels)
    sigma = torch.zeros(count)
    for b in range(count):
        mine = (indices == b).nonzero().flatten()
        if len(mine) < 4:
            continue
        x = eps[mine].transpose(0, 1).flatten(2).float()  # (C, n, HW)
        error = eps_q[mine].transpose(0, 1).flatten(2).float() - x
        fit_x, fit_error = x[:, 1::2].flatten(1), error[:, 1::2].flatten(1)
        mean_x, mean_error = fit_x.mean(1), fit_error.mean(1)
        centred = fit_x - mean_x[:, None]
        variance = centred.square().mean(1).clamp(min=1e-12)
        slope = (centred * (fit_error - mean_error[:, None])).mean(1) / variance
        slope = slope.clamp(-LARGEST_K, LARGEST_K)
        offset = mean_error - slope * mean_x
        test_x, test_error = x[:, 0::2].flatten(1), error[:, 0::2].flatten(1)
        corrected = (test_x + test_error - offset[:, None]) / (1 + slope[:, None]) - test_x
        better = corrected.square().mean(1) < test_error.square().mean(1)  # (C,)
        k[b] = torch.where(better, slope, 0.0)
        mu[b] = torch.where(better, offset, 0.0)
        residual = torch.where(better[:, None], corrected, test_error)
        sigma[b] = residual.std()
    return OutputCorrection(context, k, mu, sigma)

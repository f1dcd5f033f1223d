"""Correction of the drift: the quantized sampler is led along full-precision trajectories.

PTQD's tables (correction.py) undo what a quantized call adds to the noise of a full-precision
state. Errors of earlier steps stay in x_t, where the denoiser takes part of them for image: the
samples gain contrast step by step. Here the tables are fitted in a closed loop. Both samplers start
from the same noise; at each step the output's scale and offset, per channel, are those that bring
the next state nearest to the full-precision one, and the quantized sampler goes on with them.

A step is taken as linear, x' = a x + b eps; a and b come from the full-precision trajectories, so
that any sampler of one call a step will do.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch

from ..core.context import Timestep, TimestepContext, plain_timestep
from ..runtime.correction import OutputCorrection

# Relative to the product of the powers of x and eps. Below it the two are too much alike for the
# least squares to tell their coefficients apart.
SMALLEST_DETERMINANT = 1e-9
LARGEST_GAIN = 0.1
RIDGE = 1e-8  # keeps steps that do not depend on eps uncorrected


@dataclass(frozen=True)
class Call:
    """One call of a sampler: x (N, C, H, W) and the output eps, whose channels may be followed by
    others (a learned variance)."""

    timestep: Timestep
    x: torch.Tensor
    eps: torch.Tensor


class CallRecorder:
    """Keeps the last calls of a sampler, all of them if `most` is None, and leaves the outputs as
    they are."""

    def __init__(self, most: int | None = None) -> None:
        self.calls: deque[Call] = deque(maxlen=most)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        self.calls.append(Call(plain_timestep(t[0]), x, eps))
        return eps


class DriftFit:
    """Fits a correction while a quantized sampler runs. calls: of full precision, same noise.

    Each output that the sampler gets is corrected by what was fitted for the nearest calibrated
    timestep; the first call there fits, and removes of the drift so far the share of one of its
    calls.
    """

    def __init__(self, context: TimestepContext, calls: Sequence[Call]):
        count, channels = len(context.timesteps), calls[0].eps.shape[1]
        self.context = context
        self.scale = torch.ones(count, channels)  # of all output channels
        self.offset = torch.zeros(count, channels)
        self.indices = [int(context.nearest(call.timestep)) for call in calls]
        self.fitted: set[int] = set()
        self.drift: list[float] = []  # mean square of x_q - x at each call
        self._rest = zip_longest(calls, islice(calls, 1, None))

    def __call__(self, x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        call, following = next(self._rest)
        if plain_timestep(t[0]) != call.timestep:
            raise ValueError(f"the sampler is at timestep {int(t[0])}, not at {call.timestep}")
        b = int(self.context.nearest(call.timestep))
        self.drift.append(float((x - call.x).square().mean()))
        if following is not None and b not in self.fitted:
            self._fit(b, call, following.x, x, eps)
            self.fitted.add(b)
        scale, offset = (v[b].to(eps.device).view(1, -1, 1, 1) for v in (self.scale, self.offset))
        return scale * eps + offset

    def _fit(
        self, b: int, call: Call, following: torch.Tensor, x: torch.Tensor, eps: torch.Tensor
    ) -> None:
        """following: full-precision x of the next call."""
        channels = x.shape[1]
        full, eps = call.eps[:, :channels], eps[:, :channels]
        of_x, of_eps = step_coefficients(call.x, full, following)  # (C, 1)
        share = 1 / self.indices.count(b)
        # What the next state lacks without a correction, (C, N H W)
        lacks = share * of_x * _by_channel(call.x - x) + of_eps * _by_channel(full - eps)
        given = of_eps * _by_channel(eps)
        # given * gain + of_eps * offset = lacks, least squares for each channel
        rows = torch.stack([given, of_eps.expand_as(given)], dim=1)  # (C, 2, N H W)
        left = rows @ rows.mT / rows.shape[2]  # (C, 2, 2)
        left.diagonal(dim1=1, dim2=2).add_(RIDGE)
        right = (rows * lacks[:, None]).mean(2)
        gain, _ = torch.linalg.solve(left, right).unbind(1)
        # Late steps move the state so little that all of the drift would be too much for one.
        gain = gain.clamp(-LARGEST_GAIN, LARGEST_GAIN)
        offset = (right[:, 1] - left[:, 1, 0] * gain) / left[:, 1, 1]  # the best one beside it
        self.scale[b, :channels], self.offset[b, :channels] = 1 + gain.cpu(), offset.cpu()

    def correction(self) -> OutputCorrection:
        """The tables; the sampler's own noise, where there is any, is not changed by them."""
        k, mu = 1 / self.scale - 1, -self.offset / self.scale
        return OutputCorrection(self.context, k, mu, torch.zeros(len(k)))


def no_correction(tables: OutputCorrection) -> OutputCorrection:
    """Tables of the same shape that change nothing."""
    zeros = (torch.zeros_like(v) for v in (tables.k, tables.mu, tables.sigma))
    return OutputCorrection(tables.context, *zeros)


def _by_channel(x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (C, N H W) float64
    return x.transpose(0, 1).flatten(1).double()


def step_coefficients(
    x: torch.Tensor, eps: torch.Tensor, following: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of following = a x + b eps, least squares for each channel; all (N, C, H, W).

    (C, 1) each; (1, 0) where x and eps are too much alike to be told apart.
    """
    x, eps, following = (_by_channel(v) for v in (x, eps, following))
    xx, xe, ee, fx, fe = (
        (p * q).mean(1, keepdim=True)
        for p, q in ((x, x), (x, eps), (eps, eps), (following, x), (following, eps))
    )
    determinant = xx * ee - xe * xe
    apart = determinant > SMALLEST_DETERMINANT * xx * ee
    determinant = torch.where(apart, determinant, 1.0)
    of_x = torch.where(apart, (fx * ee - fe * xe) / determinant, 1.0)
    return of_x, torch.where(apart, (fe * xx - fx * xe) / determinant, 0.0)

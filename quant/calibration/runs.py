"""Runs through the first sampling steps, for the end-to-end steps.

Errors of consecutive steps are alike and add up in the image, those of the first steps decide what
it shows, and a sampler that clips the predicted image takes a large part of some errors out again.
A loss on the eps of one timestep at a time sees none of this. Here the sampler itself makes the
first calls with the quantized denoiser, from the noise of a calibration trajectory; what counts is
how far from that trajectory it ends, and gradients go through the whole run. (A loss over several
steps is the idea of AccuQuant, arXiv 2510.20348.)
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from ..runtime.denoiser import QuantDenoiser
from .states import CalibrationStates

RUN_CALLS = 10  # of the denoiser in a run, at most
RUN_BATCH = 4  # trajectories of an iteration
RUN_RATE = 0.3  # times the learning rates of the steps before

# (denoiser, trajectories, calls) -> what the sampler would give to the call after these, (n, C, H,
# W), with gradients
Begin = Callable[[Callable[..., torch.Tensor], Sequence[int], int], torch.Tensor]


class Runs:
    """How far a model comes off the full-precision trajectories in their first steps."""

    def __init__(self, model: QuantDenoiser, states: CalibrationStates, begin: Begin):
        self._model, self._states, self._begin = model, states, begin
        self.calls = min(RUN_CALLS, len(states.timesteps) - 1)
        # How far full precision comes: the error is told as a part of it.
        self._way = (states.x[self.calls] - states.x[0]).square().mean().to(states.device)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Trajectories of a batch, (n,)."""
        return torch.randperm(self._states.trajectories, generator=generator)[:RUN_BATCH]

    def loss(self, trajectories: torch.Tensor) -> torch.Tensor:
        """Mean squared distance at the end of the runs of these trajectories (n,)."""
        found = self._begin(self._recomputed, trajectories.tolist(), self.calls)
        wanted = self._states.x[self.calls, trajectories].to(found.device)
        return (found - wanted).square().mean() / self._way

    def _recomputed(self, x: torch.Tensor, t: torch.Tensor, **named: Any) -> torch.Tensor:
        """A call, which is made again for its gradients: the memory is that of one."""
        found = checkpoint(self._model, x, t, use_reentrant=False, **named)
        return cast(torch.Tensor, found)

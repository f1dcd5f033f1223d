"""Runs through the first sampling steps, for the end-to-end steps.

Errors of consecutive steps are alike and add up in the image, those of the first steps decide what
it shows, and a sampler that clips the predicted image takes a large part of some errors out again.
A loss on the eps of one timestep at a time sees none of this. Here the sampler itself makes the
first calls with the quantized denoiser, from the noise of a calibration trajectory; what counts is
how far from that trajectory it ends, and gradients go through the whole run. (A loss over several
steps is the idea of AccuQuant, arXiv 2510.20348.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from ..runtime.denoiser import QuantDenoiser
from .drift import step_coefficients
from .states import CalibrationStates

RUN_CALLS = 5  # of the denoiser in a run, at most
RUN_BATCH = 4  # trajectories of an iteration
RUN_RATE = 0.5  # times the learning rates of the steps before

# (denoiser, trajectories, calls) -> what the sampler would give to the call after these, (n, C, H,
# W), with gradients
Begin = Callable[[Callable[..., torch.Tensor], Sequence[int], int], torch.Tensor]


class Runs:
    """How far a model comes off the full-precision trajectories in their first steps."""

    def __init__(
        self,
        model: QuantDenoiser,
        states: CalibrationStates,
        begin: Begin,
        step_weight: torch.Tensor | None,
    ):
        """step_weight (S,): as in end_to_end.finetune."""
        self._model, self._states, self._begin = model, states, begin
        self.calls = min(RUN_CALLS, len(states.timesteps) - 1)
        weight = torch.ones(len(states.timesteps)) if step_weight is None else step_weight
        # What independent eps errors of mean square 1 would come to, and what they would count as
        # single samples: a distance is weighed as they would be.
        moved = torch.zeros(())
        for k in range(self.calls):
            eps = states.eps[k, :, : states.x.shape[2]]
            a, b = step_coefficients(states.x[k], eps, states.x[k + 1])
            moved = a.square().mean() * moved + b.square().mean()
        counted = weight[: self.calls].sum() / weight.sum()
        self._weight = float(counted / moved.clamp(min=torch.finfo(torch.float32).tiny))

    def draw(self, generator: torch.Generator, accumulate: int) -> list[Callable[[], torch.Tensor]]:
        """Shares of the loss of a batch of runs, in so many parts at most."""
        order = torch.randperm(self._states.trajectories, generator=generator)[:RUN_BATCH]
        return [partial(self._share, part, len(order)) for part in order.chunk(accumulate)]

    def _share(self, trajectories: torch.Tensor, count: int) -> torch.Tensor:
        """What the runs of these trajectories (n,) have of the weighted mean squared distance at
        the end of `count` runs."""
        found = self._begin(self._recomputed, trajectories.tolist(), self.calls)
        wanted = self._states.x[self.calls, trajectories].to(found.device)
        distance = (found - wanted).square().mean()
        return distance * self._weight * (len(trajectories) / count)

    def _recomputed(self, x: torch.Tensor, t: torch.Tensor, **named: Any) -> torch.Tensor:
        """A call, which is made again for its gradients: the memory is that of one."""
        found = checkpoint(self._model, x, t, use_reentrant=False, **named)
        return cast(torch.Tensor, found)

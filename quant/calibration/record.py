"""Calls of a denoiser while a sampler runs, as calibration states."""

from typing import Any

import torch
from torch import nn

from ..core.context import Timestep, plain_timestep
from .states import CalibrationStates


class Recorder:
    """A denoiser that keeps its calls. Conditioning must be passed by keyword."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.rows: list[tuple[torch.Tensor, Timestep, dict[str, torch.Tensor], torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        out = self.model(x, t, **conditioning)
        kept = {k: v.detach().cpu() for k, v in conditioning.items() if v is not None}
        first = torch.as_tensor(t).reshape(-1)[0]
        self.rows.append((x.detach().cpu(), plain_timestep(first), kept, out.detach().cpu()))
        return out

    def states(self, together: int, device: str) -> CalibrationStates:
        """The calls so far as states (K, N, ...), see CalibrationStates.

        together: calls that a sampling step takes: one for each part that its rows are split into,
        for example two for the halves of a guided one. PLMS calls once more in its first step,
        which then counts as a step of its own.
        """
        calls = self.rows
        x, eps = torch.cat([c[0] for c in calls]), torch.cat([c[3] for c in calls])
        count = len(calls) // together
        conditioning = {k: torch.cat([c[2][k] for c in calls[:together]]) for k in calls[0][2]}
        return CalibrationStates(
            x.unflatten(0, (count, -1)),
            eps.unflatten(0, (count, -1)),
            [calls[i * together][1] for i in range(count)],
            conditioning,
            device,
        )

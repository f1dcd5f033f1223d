"""A toy denoiser that notices wrong pairs of state and timestep, its states and its sampler."""

from collections.abc import Callable

import torch
from torch import nn

from tinydm.quant.calibration.grouping import assign
from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.calibration.statistics import collect
from tinydm.quant.calibration.wrapping import BitPolicy, activation_quantizers, quantize
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.runtime.denoiser import QuantDenoiser

STEPS = [900, 700, 500, 400, 300, 200, 100, 0]


class Toy(nn.Module):
    """Three layers and no layer_roles; the activations grow with the timestep.

    It refuses a state that does not belong to its timestep: channel 0 of x holds t / 1000, and
    channel 1 the number of the trajectory, which `y` repeats.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(4, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)
        self.embed = nn.Linear(2, 12)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not torch.allclose(x[:, 0, 0, 0], t / 1000):
            raise AssertionError("a state was met with another timestep")
        if not torch.equal(x[:, 1, 0, 0], y):
            raise AssertionError("a state was met with another conditioning")
        grown = (1 + 15 * (t >= 400).float()).view(-1, 1, 1, 1)
        emb = self.embed(torch.stack([t / 1000, torch.cos(t / 100)], 1))
        h = self.norm(self.first(x)) * grown + emb[:, :, None, None]
        return self.last(nn.functional.silu(self.second(h)))


def toy_states(
    denoiser: nn.Module, trajectories: int = 12, seed: int = 1, first: int = 0
) -> CalibrationStates:
    """Its states encode step and trajectory, see Toy."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(STEPS), trajectories, 4, 6, 6, generator=g)
    x[:, :, 0] = torch.tensor(STEPS).view(-1, 1, 1, 1) / 1000
    y = torch.arange(first, first + trajectories).float()
    x[:, :, 1] = y.view(1, -1, 1, 1)
    eps = [denoiser(x[k], torch.full((trajectories,), t), y).detach() for k, t in enumerate(STEPS)]
    return CalibrationStates(x, torch.stack(eps), STEPS, {"y": y})


class ToySampler:
    """See quant.calibration.task.Sampler."""

    @torch.no_grad()
    def run(self, model: nn.Module, on_output: Callable[..., torch.Tensor], count: int) -> None:
        x = torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(5))
        y = torch.arange(count).float()
        for t in STEPS:
            x[:, 0], x[:, 1] = t / 1000, y.view(-1, 1, 1)  # see Toy
            steps = torch.full((count,), t)
            x = x + 0.3 * on_output(x, steps, model(x, steps, y))


def eps_error(model: nn.Module, states: CalibrationStates) -> float:
    """Mean squared error over the whole states."""
    total = 0.0
    with torch.no_grad():
        for k, t in enumerate(states.timesteps):
            steps = torch.full((states.trajectories,), t)
            out = model(states.x[k], steps, **states.conditioning)
            total += float((out - states.eps[k]).square().mean())
    return total / len(states.timesteps)


def toy_model(
    denoiser: nn.Module,
    states: CalibrationStates,
    groups: int,
    policy: BitPolicy,
    how: str = "kmeans",
) -> QuantDenoiser:
    """Under calibration, with ranges from the states."""
    model = quantize(denoiser, TimestepContext(states.timesteps, 1000), policy)
    stats = collect(denoiser, model, states.by_timestep(states.trajectories, 8))
    for name, quantizer in activation_quantizers(model):
        assign(quantizer, stats[name], groups, how, "mse")
    return model

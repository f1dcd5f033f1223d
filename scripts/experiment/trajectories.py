"""Calibration trajectories: what the denoiser sees and outputs while the pipeline samples."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...models.pipeline import OnRows, Pipeline
from ...quant.calibration.states import CalibrationStates
from .processes import ALONE, Team, Tensors

SEED_DOMAIN = 1 << 62  # calibration noise is never the noise of a sampled image
FIRST_FRESH_TRAJECTORY = 1 << 24  # index of the first trajectory that no states holds


class _Recorder:
    """A denoiser that keeps its calls. Conditioning must be passed by keyword."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.rows: list[tuple[torch.Tensor, int, dict[str, torch.Tensor], torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        out = self.model(x, t, **conditioning)
        kept = {k: v.detach().cpu() for k, v in conditioning.items() if v is not None}
        self.rows.append((x.detach().cpu(), int(t[0]), kept, out.detach().cpu()))
        return out


def record_states(
    pipeline: Pipeline,
    denoiser: nn.Module,
    count: int,
    seed: int,
    first: int = 0,
    classes: list[int] | None = None,
    device: str | torch.device = "cpu",
    on_rows: OnRows = lambda n: None,
    team: Team = ALONE,
) -> CalibrationStates | None:
    """The states of `count` trajectories first..first+count-1 and the denoiser's outputs.

    count is rounded up to whole network calls (pipeline.micro_batch). With guidance, the
    unconditional and the conditional half of a call count as trajectories of their own.
    on_rows(n) is called after calls with n rows. They are spread over the team; rank 0 gets the
    states that one process would have made, the others None.
    """
    size = pipeline.micro_batch

    def make(block: int) -> Tensors:
        recorder = _Recorder(denoiser)
        indices = range(first + block * size, first + (block + 1) * size)
        latents = partial(pipeline.latents, recorder, indices, SEED_DOMAIN + seed, classes)
        latents(device=device, on_rows=on_rows)
        return _to_tensors(_stack(recorder, 2 if pipeline.guided else 1, str(device)))

    states, blocks = None, -(-count // size)
    for number, value in enumerate(team.in_turn(blocks, make)):
        block = _from_tensors(value, str(device))
        states = _room_for(block, blocks) if states is None else states
        _put(states, number, block)
        if number % team.world != team.rank:  # made by another process
            on_rows(block.trajectories * len(block.timesteps))
    return states


def _room_for(block: CalibrationStates, blocks: int) -> CalibrationStates:
    """Room for so many blocks like this one: joined one by one they would need three times the
    memory."""

    def room(value: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(value.shape)
        shape[dim] *= blocks
        return torch.empty(shape, dtype=value.dtype)

    conditioning = {name: room(value, 0) for name, value in block.conditioning.items()}
    return replace(block, x=room(block.x, 1), eps=room(block.eps, 1), conditioning=conditioning)


def _put(states: CalibrationStates, number: int, block: CalibrationStates) -> None:
    if block.timesteps != states.timesteps:
        raise ValueError("states with different timesteps cannot be joined")
    rows = slice(number * block.trajectories, (number + 1) * block.trajectories)
    states.x[:, rows], states.eps[:, rows] = block.x, block.eps
    for name, value in block.conditioning.items():
        states.conditioning[name][rows] = value


def _to_tensors(states: CalibrationStates) -> Tensors:
    conditioning = {f"conditioning.{name}": v for name, v in states.conditioning.items()}
    parts = {"x": states.x, "eps": states.eps, "timesteps": torch.tensor(states.timesteps)}
    return parts | conditioning


def _from_tensors(value: Tensors, device: str) -> CalibrationStates:
    prefix = "conditioning."
    conditioning = {n.removeprefix(prefix): v for n, v in value.items() if n.startswith(prefix)}
    return CalibrationStates(
        value["x"], value["eps"], value["timesteps"].tolist(), conditioning, device
    )


def _stack(recorder: _Recorder, together: int, device: str) -> CalibrationStates:
    """Calls in their order -> (S, N, ...). A step takes two together with guidance; PLMS calls once
    more in its first step, which then counts as a step of its own."""
    calls = recorder.rows
    x, eps = (torch.cat([c[i] for c in calls]) for i in (0, 3))
    count = len(calls) // together
    conditioning = {k: torch.cat([c[2][k] for c in calls[:together]]) for k in calls[0][2]}
    return CalibrationStates(
        x.unflatten(0, (count, -1)),
        eps.unflatten(0, (count, -1)),
        [calls[i * together][1] for i in range(count)],
        conditioning,
        device,
    )


def guided_rows(pipeline: Pipeline, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of all rows at one step (N, C, H, W) -> what the sampler makes of them.

    With guidance one of each pair of rows, (N / 2, C, H, W), without it the outputs themselves.
    """
    if not pipeline.guided:
        return rows
    without, given = _halves(rows, pipeline.micro_batch).unbind(1)
    return (without + pipeline.guidance_scale * (given - without)).flatten(0, 1)


def mean_of_halves(pipeline: Pipeline, values: torch.Tensor) -> torch.Tensor:
    """Numbers of rows (S, N) -> of its trajectories, (S, N / 2) with guidance."""
    if not pipeline.guided:
        return values
    return _halves(values.T, pipeline.micro_batch).mean(1).flatten(0, 1).T


def _halves(rows: torch.Tensor, size: int) -> torch.Tensor:
    """(N, ...) -> (N / 2 size, 2, size, ...): the calls of record_states, without and with the
    class."""
    return rows.unflatten(0, (-1, 2, size))


@torch.no_grad()
def predicted_by(
    states: CalibrationStates, denoiser: nn.Module, batch_size: int
) -> CalibrationStates:
    """The same states with this denoiser's outputs."""
    eps = torch.empty_like(states.eps)
    for k in range(len(states.timesteps)):
        outputs = []
        for x, t, conditioning in states.at_step(k, batch_size):
            steps = torch.full((len(x),), t, device=x.device, dtype=torch.long)
            outputs.append(denoiser(x, steps, **conditioning).cpu())
        eps[k] = torch.cat(outputs)
    return replace(states, eps=eps)

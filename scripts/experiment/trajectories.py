"""Calibration trajectories: what the denoiser sees and outputs while the pipeline samples."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...models.pipeline import Pipeline
from ...quant.calibration.distinct import (
    TooFewTrajectoriesError,
    check_trajectories,
    enough_trajectories,
)
from ...quant.calibration.record import Recorder
from ...quant.calibration.states import CalibrationStates
from ...quant.core.context import plain_timestep
from ...quant.core.settings import CalibrationSettings
from ..common.errors import ConfigError
from .counted import Counted
from .processes import ALONE, Team, Tensors

SEED_DOMAIN = 1 << 62  # calibration noise is never the noise of a sampled image
FIRST_FRESH_TRAJECTORY = 1 << 24  # index of the first trajectory that no calibration learns from


def record_states(
    pipeline: Pipeline,
    denoiser: nn.Module,
    count: int,
    seed: int,
    classes: list[int] | None = None,
    device: str | torch.device = "cpu",
    on_rows: Callable[[int], Any] = lambda n: None,
    team: Team = ALONE,
) -> CalibrationStates:
    """The states of the trajectories 0..count-1 and the denoiser's outputs.

    count is rounded up to whole network calls (pipeline.micro_batch). With guidance, the
    unconditional and the conditional half of a call count as trajectories of their own.
    on_rows(n) follows calls with n rows. The calls are spread over the team; each process gets all
    states, the same that one process alone would have made.
    """
    size = pipeline.micro_batch

    def make(block: int) -> Tensors:
        recorder = Recorder(Counted(denoiser, on_rows))
        indices = range(block * size, (block + 1) * size)
        pipeline.latents(recorder, indices, SEED_DOMAIN + seed, classes, device=device)
        return _to_tensors(recorder.states(2 if pipeline.guided else 1, str(device)))

    states, blocks = None, -(-count // size)
    for number, value in enumerate(team.share(blocks, make)):
        block = _from_tensors(value, str(device))
        states = _room_for(block, blocks) if states is None else states
        _put(states, number, block)
        if number % team.world != team.rank:  # made by another process
            on_rows(block.trajectories * len(block.timesteps))
    assert states is not None  # of one block at least
    return states


def shared_states(
    team: Team, states: CalibrationStates | None, device: torch.device
) -> CalibrationStates:
    """The states of rank 0, on every rank; the others have None."""

    def make(number: int) -> Tensors:
        assert states is not None
        return _to_tensors(states)

    given = [_from_tensors(value, str(device)) for value in team.share(1, make)]
    return given[0] if states is None else states


def trajectories_of(
    calibration: CalibrationSettings, steps: int, guided: bool, micro_batch: int
) -> int:
    """How many are to be made: calibration.trajectories, or as many as have no sample twice.

    steps, guided, micro_batch: of the pipeline. Raises ConfigError where that number is too small.
    """
    count, size, halves = calibration.trajectories, micro_batch, 2 if guided else 1
    if count is None:
        return -(-enough_trajectories(calibration.samples, steps) // halves)
    try:
        check_trajectories(calibration, steps, -(-count // size) * size * halves, halves)
    except TooFewTrajectoriesError as error:
        raise ConfigError(str(error)) from error
    return count


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
    timesteps = torch.tensor(states.timesteps, dtype=torch.float64)
    parts = {"x": states.x, "eps": states.eps, "timesteps": timesteps}
    return parts | conditioning


def _from_tensors(value: Tensors, device: str) -> CalibrationStates:
    prefix = "conditioning."
    conditioning = {n.removeprefix(prefix): v for n, v in value.items() if n.startswith(prefix)}
    timesteps = [plain_timestep(t) for t in value["timesteps"]]
    return CalibrationStates(value["x"], value["eps"], timesteps, conditioning, device)


def mean_of_halves(pipeline: Pipeline, values: torch.Tensor) -> torch.Tensor:
    """Numbers of all trajectories (K, N) -> of all images, (K, N / 2) with guidance."""
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
            steps = torch.full((len(x),), t)
            outputs.append(denoiser(x, steps, **conditioning).cpu())
        eps[k] = torch.cat(outputs)
    return replace(states, eps=eps)

"""What a calibration works on, and what it needs from outside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..core.settings import CalibrationSettings, QuantSettings
from ..runtime.denoiser import QuantDenoiser
from .run_state import RunState
from .sharing import Alone, Team
from .states import CalibrationStates

# Streams of random numbers; fixed, so that a new phase leaves those of the others alone.
STREAMS = {"equivalent": 0, "bits": 1, "errors": 2, "search": 3, "finetune": 5}

# (x_t, t, eps) of a call -> the eps that the sampler goes on with.
OnOutput = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Sampler(Protocol):
    """The sampler of the model that is calibrated."""

    def run(self, model: nn.Module, on_output: OnOutput, count: int) -> None:
        """Samples `count` fresh images at once, the same ones each time. on_output sees and may
        change each output that the sampler gets (after guidance)."""
        ...


class Progress(Protocol):
    """Where progress goes; a phase of `total` parts reports each with a short text."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` parts begins."""
        ...

    def step(self, text: str) -> None:
        """A part of it is done."""
        ...

    def end(self) -> None:
        """The phase has ended."""
        ...


def _save_nothing(state: RunState) -> None:
    pass


@dataclass
class Task:
    """A denoiser to be quantized, and how.

    denoiser: full precision, not changed. states: its trajectories. train_timesteps: T of the noise
    schedule. importance (K,): weight of an eps error at each sampling step. state continues an
    earlier run. save(state) gets everything that a later run needs to go on from there. team: the
    processes that have this task; state, progress and save matter on the first one alone.
    """

    denoiser: nn.Module
    states: CalibrationStates
    settings: QuantSettings
    calibration: CalibrationSettings
    train_timesteps: int
    importance: torch.Tensor
    sampler: Sampler
    progress: Progress
    state: RunState = field(default_factory=RunState)
    save: Callable[[RunState], None] = _save_nothing
    team: Team = field(default_factory=Alone)


class Job:
    """A task under way: `model` is the denoiser under calibration."""

    def __init__(self, task: Task, model: QuantDenoiser):
        self.model, self._save = model, task.save
        self.denoiser, self.states, self.state = task.denoiser, task.states, task.state
        self.settings, self.calibration = task.settings, task.calibration
        self.importance, self.sampler = task.importance, task.sampler
        self.progress, self.team = task.progress, task.team

    @property
    def tuples(self) -> torch.Tensor:
        """The calibration samples (n, 2), for the phases after their choice."""
        assert self.state.tuples is not None
        return self.state.tuples

    def generator(self, phase: str) -> torch.Generator:
        """Random numbers of a phase, independent of the phases before it."""
        seed = (self.calibration.seed * 1009 + STREAMS[phase]) % 2**64
        return torch.Generator().manual_seed(seed)

    def save_partial(self, partial: dict[str, Any]) -> None:
        """Saves what the current phase has done so far."""
        self._save_state(partial)

    def save_phase(self, name: str) -> None:
        """Saves the end of a phase."""
        self.state.done.append(name)
        self.state.before = {}
        self._save_state(None)

    def _save_state(self, partial: dict[str, Any] | None) -> None:
        self.state.partial = partial
        self.state.tensors = {k: v.detach() for k, v in self.model.state_dict().items()}
        self._save(self.state)
        self.state.tensors = {}  # they change, and a copy would cost as much memory as the model

    def mark_start(self) -> None:
        """Keeps the start of a phase that will save parts."""
        if self.team.rank == 0 and not self.state.before:
            tensors = self.model.state_dict().items()
            self.state.before = {k: v.detach().cpu().clone() for k, v in tensors}

"""What the phases of a calibration work on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from quant import statistics
from quant.bank import Bank
from quant.methods import CalibrationSettings, QuantSettings
from quant.model import QuantDenoiser
from quant.state import CalibrationState

# Of random numbers; fixed, so that a new phase leaves those of the others alone.
STREAMS = {"equivalent": 0, "search": 3, "finetune": 5}

Adjust = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# Outputs of a bank's rows at one step -> what the sampler goes on with (guidance).
Guide = Callable[[torch.Tensor], torch.Tensor]


class Progress(Protocol):
    """Where progress goes; a phase of `total` parts reports each with a short text."""

    def begin(self, phase: str, total: int) -> None: ...
    def step(self, text: str) -> None: ...
    def end(self) -> None: ...


@dataclass
class Job:
    """See calibration.calibrate. keep(partial) saves what a phase has done so far; remember() keeps
    the start of a phase that will save parts."""

    denoiser: nn.Module
    model: QuantDenoiser
    bank: Bank
    visit: Callable[[nn.Module, int], Bank]
    drive: Callable[[nn.Module, Adjust, int], None]
    settings: QuantSettings
    calibration: CalibrationSettings
    importance: torch.Tensor
    progress: Progress
    state: CalibrationState
    keep: Callable[[dict[str, Any]], None]
    remember: Callable[[], None]
    collect: Callable[..., dict[str, statistics.Statistics]]
    signal_to_noise: torch.Tensor | None
    guide: Guide

    def generator(self, phase: str) -> torch.Generator:
        """Random numbers of a phase, independent of the phases before it."""
        seed = (self.calibration.seed * 1009 + STREAMS[phase]) % 2**64
        return torch.Generator().manual_seed(seed)

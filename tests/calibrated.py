"""Calibrates the toy denoiser in seconds."""

import copy
from dataclasses import replace

import torch
from torch import nn

from quant.calibration import calibrate
from quant.methods import QuantSettings, preset
from quant.model import QuantDenoiser
from quant.state import CalibrationState
from tests.toy import STEPS, toy_bank, toy_sampler


class Silent:
    """Progress that is only counted: phase -> (announced, done)."""

    def __init__(self) -> None:
        self.phases: dict[str, list[int]] = {}
        self.open = ""

    def begin(self, phase: str, total: int) -> None:
        assert not self.open
        self.open, self.phases[phase] = phase, [total, 0]

    def step(self, text: str) -> None:
        self.phases[self.open][1] += 1

    def end(self) -> None:
        self.open = ""


def tiny(
    method: str = "tinydm", progressive: bool = True, **calibration: object
) -> tuple[QuantSettings, object]:
    """Settings of a method in seconds instead of minutes."""
    quant, calib = preset(method)
    finetune = 30 if quant.reconstruct.finetune_iterations else 0
    quant = replace(
        quant,
        activation=replace(quant.activation, bits=6, groups=min(3, quant.activation.groups)),
        search=replace(quant.search, rounds=6, batch_size=8),
        reconstruct=replace(
            quant.reconstruct,
            iterations=25,
            finetune_iterations=finetune,
            progressive=progressive and bool(finetune),  # off by default; it must work too
        ),
    )
    values = {"samples": 64, "trajectories": 12, "batch_size": 8} | calibration
    return quant, replace(calib, **values)


def run(
    denoiser: nn.Module,
    method: str,
    state: CalibrationState | None = None,
    step_bits: tuple[int, ...] = (),
    time_embedding: str = "cached",
    signal_to_noise: torch.Tensor | None = None,
    **calibration: object,
) -> tuple[QuantDenoiser, dict, Silent, list[dict]]:
    """The deployed model, the report, the progress and every state that was saved."""
    bank, progress, saved = toy_bank(denoiser), Silent(), []
    quant, calib = tiny(method, **calibration)
    activation = replace(quant.activation, step_bits=step_bits)
    quant = replace(quant, activation=activation, time_embedding=time_embedding)
    model, report = calibrate(
        denoiser,
        bank,
        lambda model, number: toy_bank(denoiser, 4, 100 + number, 50 * number),
        toy_sampler,
        quant,
        calib,
        1000,
        torch.ones(len(STEPS)),
        progress,
        state,
        lambda state: saved.append(copy.deepcopy(state.to_plain())),
        signal_to_noise=signal_to_noise,
    )
    return model, report, progress, saved

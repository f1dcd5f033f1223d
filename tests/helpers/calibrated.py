"""Calibrates the toy denoiser in seconds."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from tests.helpers.toy import STEPS, ToySampler, toy_states
from tinydm.quant.calibration.calibrate import calibrate
from tinydm.quant.calibration.run_state import RunState
from tinydm.quant.calibration.task import Task
from tinydm.quant.core.settings import QuantSettings, preset
from tinydm.quant.runtime.denoiser import QuantDenoiser


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


def tiny(method: str = "tinydm", **calibration: object) -> tuple[QuantSettings, object]:
    """Settings of a method in seconds instead of minutes."""
    quant, calib = preset(method)
    finetune = 14 if quant.reconstruct.finetune_iterations else 0
    quant = replace(
        quant,
        activation=replace(quant.activation, bits=6, groups=min(3, quant.activation.groups)),
        search=replace(quant.search, rounds=3, batch_size=8),
        reconstruct=replace(quant.reconstruct, iterations=12, finetune_iterations=finetune),
    )
    values = {"samples": 64, "trajectories": 12, "batch_size": 8} | calibration
    return quant, replace(calib, **values)


def run(
    denoiser: nn.Module,
    method: str,
    state: RunState | None = None,
    time_embedding: str = "cached",
    weight: Mapping[str, Any] = MappingProxyType({}),
    **calibration: object,
) -> tuple[QuantDenoiser, dict, Silent, list[dict]]:
    """The deployed model, the report, the progress and every state that was saved."""
    states, progress, saved = toy_states(denoiser), Silent(), []
    quant, calib = tiny(method, **calibration)
    quant = replace(quant, weight=replace(quant.weight, **weight))
    task = Task(
        denoiser,
        states,
        replace(quant, time_embedding=time_embedding),
        calib,
        train_timesteps=1000,
        importance=torch.ones(len(STEPS)),
        sampler=ToySampler(),
        progress=progress,
        state=RunState() if state is None else state,
        save=lambda state: saved.append(copy.deepcopy(state.to_plain())),
    )
    model, report = calibrate(task)
    return model, report, progress, saved

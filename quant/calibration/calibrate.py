"""The whole calibration: each phase in its order, each resumable.

After each phase, each chunk of units and every learn.STEPS_PER_CHECKPOINT end-to-end steps,
Task.save gets everything that a later run needs to go on from there.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from ..core.context import Timestep, TimestepContext
from ..runtime.denoiser import QuantDenoiser
from .distinct import check_trajectories
from .finite import check_finite
from .mixed_bits import set_bits
from .phases import PHASES
from .run_state import restore
from .task import Job, Task
from .wrapping import BitPolicy, count_layers, deploy, quantize


def calibrated_timesteps(sampling: list[Timestep], limit: int) -> list[Timestep]:
    """At most `limit` distinct timesteps of a sampling schedule, evenly by rank, ascending."""
    distinct = sorted(set(sampling))
    if len(distinct) <= limit:
        return distinct
    ranks = torch.linspace(0, len(distinct) - 1, limit).round().long().unique().tolist()
    return [distinct[r] for r in ranks]


def calibrate(task: Task) -> tuple[QuantDenoiser, dict[str, Any]]:
    """Quantizes the denoiser of a task. Returns the deployed model and a report of plain values.

    Raises DivergenceError if a loss or a learned value is not finite: in the phase that
    phases.unfinished_phase(task.state) names. Raises TooFewTrajectoriesError.
    """
    state, progress = task.state, task.progress
    check_trajectories(task.calibration, len(task.states.timesteps), task.states.trajectories)
    timesteps = calibrated_timesteps(task.states.timesteps, task.calibration.calibrated_timesteps)
    context = TimestepContext(timesteps, task.train_timesteps)
    policy = BitPolicy.of(task.settings)
    if state.tensors:  # which hold the scales that were found
        policy = replace(policy, weight_scale="minmax")
    progress.begin("weight scales", count_layers(task.denoiser))
    model = quantize(task.denoiser, context, policy, on_layer=progress.step)
    progress.end()
    if state.tensors:
        set_bits(model, (state.report.get("bits") or {}).get("bits", {}))
        restore(model, state.tensors)
        state.tensors = {}
    job = Job(task, model)
    for phase in PHASES:
        if phase.name in state.done:
            continue
        began = time.perf_counter()
        report = phase.run(job)
        if report is not None:
            report["seconds"] = round(time.perf_counter() - began, 2)
            state.report[phase.name] = report
        check_finite(model)
        job.save_phase(phase.name)
    return deploy(model), state.report

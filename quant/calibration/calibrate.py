"""The whole calibration: each phase in its order, each resumable.

After each phase, each chunk of units and every learn.STEPS_PER_CHECKPOINT end-to-end steps,
Task.save gets everything that a later run needs to go on from there.
"""

import io
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
from .run_state import RunState, restore
from .sharing import Tensors
from .task import Job, Task
from .wrapping import BitPolicy, count_layers, deploy, quantize, weight_layers


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
    state, progress, first = task.state, task.progress, task.team.rank == 0
    check_trajectories(task.calibration, len(task.states.timesteps), task.states.trajectories)
    timesteps = calibrated_timesteps(task.states.timesteps, task.calibration.calibrated_timesteps)
    context = TimestepContext(timesteps, task.train_timesteps)
    policy = BitPolicy.of(task.settings)
    if state.tensors or not first:  # the scales come from the state, or from the first process
        policy = replace(policy, weight_scale="minmax")
    progress.begin("weight scales", count_layers(task.denoiser))
    model = quantize(task.denoiser, context, policy, on_layer=progress.step)
    progress.end()
    if state.tensors:
        _restore(model, state)
    for _, layer in weight_layers(model):
        # Later phases search scales again, of other bits or of scaled channels.
        layer.quantizer.scale_search = task.settings.weight.scale
    job = Job(task, model)
    _agree(job)
    for phase in PHASES:
        if phase.name in state.done or not (first or phase.shared):
            continue
        if phase.shared:
            _agree(job)
        began = time.perf_counter()
        report = phase.run(job)
        if report is not None:
            report["seconds"] = round(time.perf_counter() - began, 2)
            state.report[phase.name] = report
        check_finite(model)
        job.save_phase(phase.name)
    return deploy(model), state.report


def _restore(model: QuantDenoiser, state: RunState) -> None:
    """Gives the model the tensors of a state, which does not keep them."""
    set_bits(model, (state.report.get("bits") or {}).get("bits", {}))
    restore(model, state.tensors)
    state.tensors = {}


def _agree(job: Job) -> None:
    """Every process goes on with the state and the model of the first one."""
    team, state = job.team, job.state
    if team.world == 1:
        return

    def make(number: int) -> Tensors:
        file = io.BytesIO()
        tensors = {name: value.detach().cpu() for name, value in job.model.state_dict().items()}
        torch.save(state.to_plain() | {"tensors": tensors, "before": {}}, file)
        return {"state": torch.frombuffer(file.getbuffer(), dtype=torch.uint8)}

    for values in team.share(1, make):
        if team.rank != 0:
            file = io.BytesIO(values["state"].numpy().tobytes())
            for name, value in torch.load(file, map_location="cpu", weights_only=True).items():
                setattr(state, name, value)
            _restore(job.model, state)

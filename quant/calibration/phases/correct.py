"""The last phase: the correction of the output."""

from collections.abc import Callable
from typing import Any

import torch

from ...runtime.denoiser import QuantDenoiser
from ..drift import CallRecorder, DriftFit
from ..ptqd import fit_tables
from ..states import CalibrationStates
from ..task import Job, OnOutput, Progress
from ..wrapping import deploy

Guided = Callable[[torch.Tensor], torch.Tensor]  # see Sampler.guided
DRIFT_TRAJECTORIES = 16  # 32 and 64 gave the same; at most as many as the calibration has


def correction(job: Job) -> dict[str, Any] | None:
    kinds = {"ptqd": _noise_correction, "drift": _drift_correction}
    fit = kinds.get(job.settings.correction)
    return None if fit is None else fit(job, deploy(job.model))


def _noise_correction(job: Job, model: QuantDenoiser) -> dict[str, Any]:
    size = job.calibration.batch_size
    report = correct_noise(model, job.states, size, job.progress, job.sampler.guided)
    job.model.correction = model.correction
    return report


@torch.no_grad()
def correct_noise(
    model: QuantDenoiser,
    states: CalibrationStates,
    batch_size: int,
    progress: Progress,
    guided: Guided,
) -> dict[str, Any]:
    """Gives a deployed model PTQD's correction, in place; the report of the phase.

    The tables are those of guided outputs. Applied to each half of a guided one they are the same,
    since the halves' weights sum to 1.
    """
    full, outputs, indices = [], [], []
    progress.begin("noise correction", len(states.timesteps))
    for k, t in enumerate(states.timesteps):
        rows = []
        for x, _, conditioning in states.at_step(k, batch_size):
            steps = torch.full((len(x),), t)
            rows.append(model(x, steps, **conditioning).cpu())
        full.append(guided(states.eps[k]))
        outputs.append(guided(torch.cat(rows)))
        indices += [int(model.context.nearest(t))] * len(full[-1])
        progress.step(f"t = {t}")
    progress.end()
    tables = fit_tables(model.context, torch.cat(full), torch.cat(outputs), torch.tensor(indices))
    model.correction = tables
    return {"largest_k": float(model.correction.k.abs().max())}


@torch.no_grad()
def _drift_correction(job: Job, model: QuantDenoiser) -> dict[str, Any]:
    """Fits the drift correction on fresh trajectories: those that the weights learned from drift
    less."""
    count = min(DRIFT_TRAJECTORIES, job.states.trajectories)
    job.progress.begin("drift correction", 2 * len(job.states.timesteps))

    def with_progress(on_output: OnOutput) -> OnOutput:
        def call(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
            job.progress.step(f"t = {int(t[0])}")
            return on_output(x, t, eps)

        return call

    recorder = CallRecorder()
    job.sampler.run(job.denoiser, with_progress(recorder), count)
    fit = DriftFit(job.model.context, recorder.calls)
    job.sampler.run(model, with_progress(fit), count)
    job.progress.end()
    job.model.correction = fit.correction()
    return {"largest_k": float(job.model.correction.k.abs().max()), "drift": fit.drift}

"""The last phase: the correction of the output, fitted on fresh trajectories. On those that the
weights learned from, errors are smaller than in use."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...core.context import plain_timestep
from ...runtime.correction import OutputCorrection
from ...runtime.denoiser import QuantDenoiser
from ..drift import CallRecorder, DriftFit, no_correction
from ..ptqd import fit_tables
from ..sharing import Alone, SharedRows, Team
from ..states import CalibrationStates
from ..task import Job, OnOutput, Progress, Sampler
from ..wrapping import deploy

# Fresh ones of a correction; at most as many as the calibration has.
NOISE_TRAJECTORIES = 64
DRIFT_TRAJECTORIES = 16  # 32 and 64 gave the same

# Samples fresh images with the model; the same noise each time.
Run = Callable[[nn.Module, OnOutput], None]


def correction(job: Job) -> dict[str, Any] | None:
    """Fits the correction of the output that the settings name, and gives it to the model."""
    kind = job.settings.correction
    if kind == "none":
        return None
    model = deploy(job.model)
    report = correct(kind, model, job.denoiser, job.sampler, job.states, job.progress, job.team)
    assert model.correction is not None  # of the fit
    tables = model.correction.state_dict()
    # A deployed model has a timestep of its own, which the next one would not set.
    job.model.correction = OutputCorrection(job.model.context, **tables)
    return report


@torch.no_grad()
def correct(
    kind: str,
    model: QuantDenoiser,
    denoiser: nn.Module,
    sampler: Sampler,
    states: CalibrationStates,
    progress: Progress,
    team: Team | None = None,
) -> dict[str, Any]:
    """Gives a deployed model a correction, in place; the report of the phase.

    kind: as in quant.correction. denoiser: full precision. states: of the calibration.
    team: processes that call it together, with the same arguments.
    """
    fit, title, most, runs = {
        "ptqd": (_noise_tables, "noise correction", NOISE_TRAJECTORIES, 2),
        "drift": (_drift_tables, "drift correction", DRIFT_TRAJECTORIES, 3),
    }[kind]
    count = min(most, states.trajectories)
    progress.begin(title, runs * len(states.timesteps))

    def run(network: nn.Module, on_output: OnOutput) -> None:
        def call(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
            progress.step(f"t = {int(t[0])}")
            return on_output(x, t, eps)

        sampler.run(SharedRows(network, team or Alone()), call, count)

    tables, report = fit(model, denoiser, run)
    progress.end()
    model.correction = tables
    return {"largest_k": float(tables.k.abs().max())} | report


def _noise_tables(
    model: QuantDenoiser, denoiser: nn.Module, run: Run
) -> tuple[OutputCorrection, dict[str, Any]]:
    """PTQD's, of the outputs that the sampler gets: after guidance.

    Applied to each half of a guided one they are the same, since the halves' weights sum to 1. The
    second run goes along the first one's trajectories, whatever the quantized model says.
    """
    full: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    indices: list[int] = []

    def keep_full(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        full.append(eps)
        indices.extend([int(model.context.nearest(plain_timestep(t[0])))] * len(eps))
        return eps

    def keep(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        outputs.append(eps)
        return full[len(outputs) - 1]

    run(denoiser, keep_full)
    run(model, keep)
    eps, eps_q = torch.cat(full).cpu(), torch.cat(outputs).cpu()
    return fit_tables(model.context, eps, eps_q, torch.tensor(indices)), {}


def _drift_tables(
    model: QuantDenoiser, denoiser: nn.Module, run: Run
) -> tuple[OutputCorrection, dict[str, Any]]:
    """Those of the drift, where they bring the sampler nearer to full precision than none does."""
    recorder, plain = CallRecorder(), CallRecorder(most=1)
    run(denoiser, recorder)
    fit = DriftFit(model.context, recorder.calls)
    run(model, fit)
    run(model, plain)
    without = float((plain.calls[-1].x - recorder.calls[-1].x).square().mean())
    kept = fit.drift[-1] <= without
    report = {"drift": fit.drift, "drift_without": without, "kept": kept}
    return fit.correction() if kept else no_correction(fit.correction()), report

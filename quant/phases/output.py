"""The last phases: bits by step and the correction of the output."""

from typing import Any

import torch

from quant.bank import Bank
from quant.correction import fit as fit_tables
from quant.drift import CallRecorder, DriftFit
from quant.model import QuantDenoiser, roles_of
from quant.phases.job import Adjust, Guide, Job, Progress
from quant.phases.prepare import statistics_of
from quant.precision import choose_bits
from quant.statistics import collect

DRIFT_TRAJECTORIES = 16  # 32 and 64 gave the same; at most as many as the calibration has


def precision(job: Job) -> dict[str, Any] | None:
    activation, size = job.settings.activation, job.calibration.batch_size
    if not activation.step_bits:
        return None
    if job.signal_to_noise is None:
        raise ValueError("step_bits needs the signal-to-noise ratio of each step")
    roles = roles_of(job.denoiser)
    counts = len({*activation.step_bits, activation.bits}), len(job.bank.timesteps)
    job.progress.begin("bits by step", counts[0] * counts[1])
    report = choose_bits(
        job.model,
        job.bank,
        statistics_of(job, collect),  # in this process alone: other ranks have ended
        activation,
        [*roles.inputs, *roles.outputs],
        job.signal_to_noise,
        size,
        job.progress.step,
    )
    job.progress.end()
    return report


def correction(job: Job) -> dict[str, Any] | None:
    kinds = {"ptqd": _noise_correction, "drift": _drift_correction}
    fit = kinds.get(job.settings.correction)
    return None if fit is None else fit(job, job.model.deploy())


def _noise_correction(job: Job, model: QuantDenoiser) -> dict[str, Any]:
    size = job.calibration.batch_size
    report = correct_noise(model, job.bank, size, job.progress, job.guide)
    job.model.correction = model.correction
    return report


@torch.no_grad()
def correct_noise(
    model: QuantDenoiser, bank: Bank, batch_size: int, progress: Progress, guide: Guide
) -> dict[str, Any]:
    """Gives a deployed model PTQD's correction, in place; the report of the phase.

    The tables are those of guided outputs. Applied to each half of a guided one they are the same,
    since the halves' weights sum to 1.
    """
    full, outputs, bins = [], [], []
    progress.begin("noise correction", len(bank.timesteps))
    for k, t in enumerate(bank.timesteps):
        rows = []
        for x, _, conditioning in bank.at_step(k, batch_size):
            steps = torch.full((len(x),), t, device=x.device, dtype=torch.long)
            rows.append(model(x, steps, **conditioning).cpu())
        full.append(guide(bank.eps[k]))
        outputs.append(guide(torch.cat(rows)))
        bins += [int(model.context.bin_of_t[t])] * len(full[-1])
        progress.step(f"t = {t}")
    progress.end()
    tables = fit_tables(model.context, torch.cat(full), torch.cat(outputs), torch.tensor(bins))
    model.correction = tables
    return {"largest_k": float(model.correction.k.abs().max())}


@torch.no_grad()
def _drift_correction(job: Job, model: QuantDenoiser) -> dict[str, Any]:
    """On trajectories of their own: what the weights have learned on the others drifts less."""
    count = min(DRIFT_TRAJECTORIES, job.bank.trajectories)
    job.progress.begin("drift correction", 2 * len(job.bank.timesteps))

    def watched(adjust: Adjust) -> Adjust:
        def call(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
            job.progress.step(f"t = {int(t[0])}")
            return adjust(x, t, eps)

        return call

    recorder = CallRecorder()
    job.drive(job.denoiser, watched(recorder), count)
    fit = DriftFit(job.model.context, recorder.calls)
    job.drive(model, watched(fit), count)
    job.progress.end()
    job.model.correction = fit.correction()
    return {"largest_k": float(job.model.correction.k.abs().max()), "drift": fit.drift}

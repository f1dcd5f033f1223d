"""The phases in which weights and scales learn: unit by unit, then from end to end."""

from collections.abc import Sequence
from typing import Any

import torch

from ....models.protocols import roles_of
from ..end_to_end import EndToEnd, Plan
from ..parking import parked
from ..reconstruct import HELD_OUT_SHARE, Reconstruction, unit_names
from ..task import Job

STEPS_PER_CHECKPOINT = 100
MOST_VIEWS = 10  # of a sample by the end-to-end steps: more would learn a small set by heart


def temporal(job: Job) -> dict[str, Any] | None:
    """The layers of the timestep alone, over all timesteps of the schedule (TFMQ-DM, Section 4):
    there are no others to judge by, and one sample of each is all there is to see."""
    names = _apart(job)
    if not names or job.settings.reconstruct.iterations == 0:
        return None
    steps = torch.arange(len(job.states.timesteps))
    tuples = torch.stack([steps, torch.zeros_like(steps)], 1)
    return _learn_units(job, "temporal reconstruction", names, tuples, held_out=0.0)


def _apart(job: Job) -> list[str]:
    """Layers that are reconstructed before the units that hold them, and left alone there."""
    if job.settings.time_embedding != "reconstructed":
        return []
    return list(roles_of(job.denoiser).timestep_only)


def reconstruct(job: Job) -> dict[str, Any] | None:
    """Rounding and activation scales of the units learn, one after the other (AdaRound)."""
    if job.settings.weight.rounding != "adaround" or job.settings.reconstruct.iterations == 0:
        return None
    apart, roles = _apart(job), roles_of(job.denoiser)
    # Units hold some of the layers of the timestep alone; the others come before them.
    inside = tuple(f"{unit}." for unit in roles.units)
    first = [n for n in roles.timestep_only if not n.startswith(inside) and n not in apart]
    units = unit_names(job.model, (*first, *roles.units), apart)
    return _learn_units(job, "block reconstruction", units, job.tuples, apart)


def _learn_units(
    job: Job,
    title: str,
    units: list[str],
    tuples: torch.Tensor,
    apart: Sequence[str] = (),
    held_out: float = HELD_OUT_SHARE,
) -> dict[str, Any]:
    errors: dict[str, tuple[float, float]] = dict(job.state.partial or {})

    def on_unit(name: str, before: float, after: float) -> None:
        errors[name] = (before, after)
        job.progress.step(name)

    job.mark_start()
    job.progress.begin(title, len(units))
    for name in errors:
        job.progress.step(name)
    reconstruction = Reconstruction(
        job.denoiser,
        job.model,
        job.states,
        tuples,
        units,
        job.settings.reconstruct,
        learn_scales=job.settings.activation.learned,
        memory_gb=job.calibration.memory_gb,
        seed=job.calibration.seed,
        apart=apart,
        held_out=held_out,
    )
    reconstruction.run(on_unit, lambda: job.save_partial(dict(errors)), frozenset(errors))
    job.progress.end()
    kept = sum(after < before for before, after in errors.values())
    return {"units": len(units), "improved": kept, "errors": errors}


def finetune(job: Job) -> dict[str, Any] | None:
    """Weights and scales learn together from the eps error; goes on behind the last checkpoint."""
    settings = job.settings.reconstruct
    if settings.finetune_iterations == 0:
        return None
    batch_size = min(settings.finetune_batch_size, len(job.tuples))
    enough = -(-MOST_VIEWS * len(job.tuples) // batch_size)
    iterations = min(settings.finetune_iterations, enough)
    partial = job.state.partial or {}
    losses: list[float] = list(partial.get("losses", ()))

    def on_iteration(i: int, loss: float) -> None:
        losses.append(loss)
        recent = losses[-20:]
        job.progress.step(f"eps error {sum(recent) / len(recent):.2e}")

    resumable = iterations >= STEPS_PER_CHECKPOINT
    if resumable:
        job.mark_start()

    def on_checkpoint(progress: dict[str, Any]) -> None:
        if resumable and len(losses) % STEPS_PER_CHECKPOINT == 0:
            job.save_partial({"losses": list(losses), "progress": progress})

    weight = job.importance if settings.weigh_steps else None
    plan = Plan(iterations, batch_size, settings.lr_scale, settings.accumulate, weight)
    job.progress.begin("end-to-end steps", iterations)
    for _ in losses:
        job.progress.step("")
    with parked(job.denoiser):  # the states hold its outputs
        steps = EndToEnd(job.model, job.states, job.tuples, plan, job.team)
        steps.run(job.generator("finetune"), on_iteration, on_checkpoint, partial.get("progress"))
    job.progress.end()
    tenth = max(1, len(losses) // 10)
    return {
        "error_start": sum(losses[:tenth]) / tenth,
        "error_end": sum(losses[-tenth:]) / tenth,
        "iterations": iterations,
    }

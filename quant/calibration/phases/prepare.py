"""The first phases: scaling of channels, ranges and groups, rounding, search."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import distinct, gptq, grouping, timesteps
from ..equivalent import scale_equivalently
from ..search import SearchResult
from ..search import search as search_groups
from ..statistics import Statistics
from ..task import Job
from ..wrapping import activation_quantizers

STATISTICS_TRAJECTORIES = 8  # at each timestep
STATISTICS_CONDITIONED = 32  # likewise: classes and texts have ranges of their own
MOST_PROBES = 64  # samples, all steps alike, that a layer's own measures look at


def _probes(job: Job) -> torch.Tensor:
    """Samples (n, 2) of all steps alike, in random order; no more than there are states."""
    generator, count = job.generator("equivalent"), len(job.states.timesteps)
    number = min(MOST_PROBES, count * job.states.trajectories)
    steps = timesteps.all_steps(number, count)[torch.randperm(number, generator=generator)]
    return timesteps.tuples_of_steps(steps, job.states.trajectories, generator)


def equivalent(job: Job) -> dict[str, Any] | None:
    if not job.settings.equivalent_scaling:
        return None
    size = job.calibration.batch_size
    probes = _probes(job)
    job.progress.begin("equivalent scaling", -(-len(probes) // size) + 1)
    relative = scale_equivalently(
        job.denoiser, job.model, job.states, probes, size, lambda: job.progress.step("")
    )
    job.progress.end()
    return {"relative_errors": relative}


def ranges(job: Job) -> dict[str, Any]:
    """Methods without groups see what their own calibration samples see, the others all steps."""
    activation = job.settings.activation
    quantizers = list(activation_quantizers(job.model))
    if activation.search == "none":
        _select(job, None)
    job.progress.begin("activation ranges", len(quantizers))
    stats = statistics_of(job, job.collect)
    for name, quantizer in quantizers:
        grouping.assign(
            quantizer, stats[name], activation.groups, activation.search, activation.scale
        )
        job.progress.step("")
    job.progress.end()
    return {"quantizers": len(quantizers)}


def statistics_of(job: Job, collect: Callable[..., dict[str, Statistics]]) -> dict[str, Statistics]:
    """Statistics of every activation quantizer. collect: statistics.collect, or a function that
    spreads its work over several processes."""
    states, size = job.states, job.calibration.batch_size
    if job.settings.activation.search == "none":
        batches = states.tuples_by_timestep(job.tuples, size)
    else:
        limit = STATISTICS_CONDITIONED if states.conditioning else STATISTICS_TRAJECTORIES
        batches = states.by_timestep(limit, size)
    return collect(job.denoiser, job.model, batches, seed=job.calibration.seed)


def rounding(job: Job) -> dict[str, Any] | None:
    if job.settings.weight.rounding != "gptq":
        return None
    job.progress.begin("weight rounding", len(gptq.compensated_layers(job.model)))
    gains = gptq.compensate(
        job.model,
        job.states,
        _probes(job),
        job.calibration.batch_size,
        job.calibration.memory_gb,
        job.progress.step,
    )
    job.progress.end()
    return {"relative_errors": gains}


def _select(job: Job, result: SearchResult | None) -> None:
    """Chooses the calibration tuples, all different. result: of the search, for the rule active."""
    calibration, generator = job.calibration, job.generator("search")
    samples, count = calibration.samples, len(job.states.timesteps)
    tuples = torch.zeros(0, 2, dtype=torch.long)
    if calibration.timesteps == "active" and result is not None:
        tuples, draw = timesteps.spread(result.tuples, samples), result.selector.pick
    elif calibration.timesteps == "uniform":
        draw = partial(timesteps.uniform_steps, count=count, spaced=distinct.UNIFORM_STEPS)
    elif calibration.timesteps == "normal":
        draw = partial(timesteps.normal_steps, count=count, generator=generator)
    else:
        draw = partial(timesteps.all_steps, count=count)
    trajectories = job.states.trajectories
    tuples = distinct.fill(tuples, draw, samples, count, trajectories, generator)
    job.state.tuples = tuples
    job.state.report["tuples_per_step"] = torch.bincount(tuples[:, 0], minlength=count).tolist()


def search(job: Job) -> dict[str, Any] | None:
    """Also chooses the calibration tuples, since active selection is part of the search."""
    settings, activation = job.settings.search, job.settings.activation
    if activation.search == "none":
        return None  # chosen already, for the ranges
    if activation.search != "differentiable":
        _select(job, None)
        return None
    # The other root is in how often the search chooses a step.
    weigh = job.settings.reconstruct.weigh_steps
    importance = job.importance.sqrt() if weigh else torch.ones_like(job.importance)
    job.progress.begin("group search", settings.rounds)
    result = search_groups(
        job.model,
        job.states,
        settings,
        job.generator("search"),
        importance,
        lambda i, loss: job.progress.step(f"loss {loss:.3f}"),
    )
    job.progress.end()
    _select(job, result)
    return {
        "decided": result.decided,
        "moved": result.moved,
        "error_start": result.error_start,
        "error_end": result.error_end,
    }

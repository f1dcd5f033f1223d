"""The first phases: scaling of channels, ranges and groups, rounding, search."""

from functools import partial
from typing import Any

import torch

from ...core.settings import average_bits, bits_by_group, weighted_groups
from .. import distinct, gptq, grouping, timesteps
from ..equivalent import scale_equivalently
from ..mixed_bits import (
    choices,
    curvatures,
    free_layers,
    losses,
    set_bits,
    share_out,
    timestep_layers,
)
from ..parking import parked
from ..quantizer import LearnedQuantizer
from ..search import Search, SearchResult
from ..sharing import Tensors
from ..statistics import Statistics, collect
from ..task import Job
from ..timestep_bits import bits_of_timesteps
from ..wrapping import activation_quantizers

STATISTICS_TRAJECTORIES = 8  # at each timestep
STATISTICS_CONDITIONED = 32  # likewise: classes and texts have ranges of their own
ERROR_TRAJECTORIES = 4  # at each step, for the first estimate of its error
MOST_PROBES = 64  # samples, all steps alike, that a layer's own measures look at
ROUNDING_PROBES = 256  # likewise of second-order rounding: four rows for each column of a 4 x 4 map
JUDGING_SHARE = 8  # one of so many trajectories judges the rounding


def _probes(job: Job, most: int = MOST_PROBES) -> torch.Tensor:
    """Samples (n, 2) of all steps alike, in random order; no more than there are states."""
    generator, count = job.generator("equivalent"), len(job.states.timesteps)
    number = min(most, count * job.states.trajectories)
    steps = timesteps.all_steps(number, count)[torch.randperm(number, generator=generator)]
    return timesteps.tuples_of_steps(steps, job.states.trajectories, generator)


def equivalent(job: Job) -> dict[str, Any] | None:
    """Scales the input channels of layers whose output error falls by it."""
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


def mixed_bits(job: Job) -> dict[str, Any] | None:
    """Gives each layer its bits under the budget of the settings."""
    average = average_bits(job.settings)
    if average == 0:
        return None
    general = free_layers(job.model, job.settings.weight.bits)
    of_timesteps = timestep_layers(job.model)
    layers, allowed = general | of_timesteps, choices(average)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    budget = average * sum(sizes[name] for name in general)  # bits of the file
    budget += sum(sizes[name] * layer.quantizer.bits for name, layer in of_timesteps.items())
    if budget < min(allowed) * sum(sizes.values()) + min(sizes.values(), default=1):
        return None  # no layer can get a bit more than the fewest
    learn = job.settings.reconstruct
    probes, size = _probes(job), max(1, learn.finetune_batch_size // learn.accumulate)
    job.progress.begin("bits of the layers", -(-len(probes) // size) + 1)
    with parked(job.model):
        found = curvatures(
            job.denoiser,
            list(layers),
            job.states,
            probes,
            _importance(job),
            size,
            job.generator("bits"),
            lambda: job.progress.step(""),
        )
    losses_of = {name: losses(layer, found.pop(name), allowed) for name, layer in layers.items()}
    bits = share_out(losses_of, sizes, budget / sum(sizes.values()))
    set_bits(job.model, bits)
    job.progress.step("")
    job.progress.end()
    return {"bits": bits}


def ranges(job: Job) -> dict[str, Any]:
    """Collects activation statistics and sets ranges and groups.

    Methods without groups see what their own calibration samples see, the others all steps.
    """
    activation = job.settings.activation
    quantizers = list(activation_quantizers(job.model))
    if activation.search == "none":
        _select(job, None)
    searched = activation.search == "differentiable"
    weighted = weighted_groups(job.settings)
    passes = 2 if weighted else 1
    job.progress.begin("activation ranges", passes * len(quantizers))
    stats = statistics_of(job)
    report: dict[str, Any] = {"quantizers": len(quantizers)}
    weight = bits = None
    for _ in range(passes):
        assigned = partial(_assigned, job, quantizers, stats, weight, bits)
        shared = job.team.share(len(quantizers), assigned)
        for (_, quantizer), values in zip(quantizers, shared, strict=True):
            quantizer.take_ranges(values)
            job.progress.step("")
        if (searched or weighted) and weight is None:
            errors = step_errors(job)
            report["step_errors"] = errors.tolist()
            weight = _by_timestep(job, _importance(job) * errors)
            if bits_by_group(job.settings):
                calls = _by_timestep(job, torch.ones(len(errors))).long()
                bits = bits_of_timesteps(weight, calls, activation.bits, activation.groups)
                report["bits_of_timesteps"] = bits.tolist()
    job.progress.end()
    return report


def _assigned(
    job: Job,
    quantizers: list[tuple[str, LearnedQuantizer]],
    stats: dict[str, Statistics],
    weight: torch.Tensor | None,
    bits: torch.Tensor | None,
    number: int,
) -> Tensors:
    """The ranges and groups of one quantizer. bits (S,): of those that have the bits of the
    settings."""
    (name, quantizer), activation = quantizers[number], job.settings.activation
    grouping.assign(
        quantizer,
        stats[name],
        activation.groups,
        activation.search,
        activation.scale,
        weight,
        bits if quantizer.bits == activation.bits else None,
    )
    return quantizer.ranges()


def _by_timestep(job: Job, values: torch.Tensor) -> torch.Tensor:
    """Values of the sampling steps (K,), added up at the calibrated timesteps (S,) they use."""
    context = job.model.context
    nearest = context.nearest(torch.tensor(job.states.timesteps))
    return torch.zeros(len(context.timesteps)).index_add(0, nearest, values)


def _importance(job: Job) -> torch.Tensor:
    """Weights of the sampling steps (K,); all alike where the method does not weigh them."""
    weigh = job.settings.reconstruct.weigh_steps
    return job.importance if weigh else torch.ones_like(job.importance)


@torch.no_grad()
def step_errors(job: Job) -> torch.Tensor:
    """Mean squared eps error of the model under calibration at each sampling step, (K,)."""
    count = len(job.states.timesteps)
    steps = torch.arange(count).repeat_interleave(min(ERROR_TRAJECTORIES, job.states.trajectories))
    index = timesteps.tuples_of_steps(steps, job.states.trajectories, job.generator("errors"))
    found = torch.zeros(count)
    parts = index.split(job.calibration.batch_size)

    def make(number: int) -> Tensors:
        x, t, eps, conditioning = job.states.gather(parts[number])
        error = (job.model(x, t, **conditioning) - eps).square().flatten(1).mean(1)
        return {"error": error.cpu()}

    for part, values in zip(parts, job.team.share(len(parts), make), strict=True):
        found.index_add_(0, part[:, 0], values["error"])
    return found / steps.bincount(minlength=count)


def statistics_of(job: Job) -> dict[str, Statistics]:
    """Statistics of every activation quantizer."""
    states, size = job.states, job.calibration.batch_size
    if job.settings.activation.search == "none":
        batches = states.tuples_by_timestep(job.tuples, size)
    else:
        limit = STATISTICS_CONDITIONED if states.conditioning else STATISTICS_TRAJECTORIES
        batches = states.by_timestep(limit, size)
    return collect(job.denoiser, job.model, batches, seed=job.calibration.seed, team=job.team)


def rounding(job: Job) -> dict[str, Any] | None:
    """Second-order rounding of the weights; a part of the trajectories judges the choice."""
    if job.settings.weight.rounding != "gptq":
        return None
    job.progress.begin("weight rounding", len(gptq.compensated_layers(job.model)))
    probes = _probes(job, ROUNDING_PROBES)
    judging = probes[:, 1] % JUDGING_SHARE == 0
    if judging.all() or not judging.any():  # of too few trajectories: all of them do both
        learning = judging = torch.ones_like(judging)
    else:
        learning = ~judging
    gains = gptq.compensate(
        job.model,
        job.states,
        probes[learning],
        probes[judging],
        job.calibration.batch_size,
        job.calibration.memory_gb,
        job.progress.step,
        job.team,
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
        draw = partial(timesteps.uniform_steps, count=count)
    elif calibration.timesteps == "normal":
        draw = partial(timesteps.normal_steps, count=count, generator=generator)
    else:
        draw = partial(timesteps.all_steps, count=count)
    trajectories = job.states.trajectories
    tuples = distinct.fill(tuples, draw, samples, count, trajectories, generator)
    job.state.tuples = tuples
    job.state.report["tuples_per_step"] = torch.bincount(tuples[:, 0], minlength=count).tolist()


def search(job: Job) -> dict[str, Any] | None:
    """Learns the groups, and chooses the calibration tuples: active selection is part of it."""
    settings, activation = job.settings.search, job.settings.activation
    if activation.search == "none":
        return None  # chosen already, for the ranges
    if activation.search != "differentiable":
        _select(job, None)
        return None
    job.progress.begin("group search", settings.rounds)
    first_errors = torch.tensor(job.state.report["ranges"]["step_errors"])
    result = Search(job.model, job.states, settings, _importance(job), first_errors, job.team).run(
        job.generator("search"), lambda i, loss: job.progress.step(f"loss {loss:.3f}")
    )
    job.progress.end()
    _select(job, result)
    return {
        "decided": result.decided,
        "moved": result.moved,
        "error_start": result.error_start,
        "error_end": result.error_end,
    }

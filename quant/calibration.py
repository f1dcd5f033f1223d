"""The phases of calibration in their order, each resumable.

    equivalent   scaling of input channels (equivalent.py)
    ranges       activation statistics, grouping by error table (grouping.py)
    rounding     second-order rounding of the weights (gptq.py)
    search       differentiable groups with active timestep selection (search.py)
    temporal     AdaRound of the layers of the timestep alone (reconstruct.py)
    reconstruct  block-wise AdaRound and activation scales (reconstruct.py)
    finetune     end-to-end steps on the eps error (finetune.py)
    precision    bits of the activations by step (precision.py)
    correction   of the output: PTQD's tables (correction.py) or of the drift (drift.py)

After each phase, each chunk of blocks and every CHECKPOINT end-to-end steps, `save(state)` gets
everything that a later run needs to go on from there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from quant import correction, gptq, grouping, statistics, timesteps
from quant.bank import Bank
from quant.context import TimestepContext
from quant.drift import CallRecorder, DriftFit
from quant.equivalent import scale_equivalently
from quant.finetune import finetune
from quant.finite import check_finite
from quant.methods import CalibrationSettings, QuantSettings
from quant.model import (
    BitPolicy,
    QuantDenoiser,
    activation_quantizers,
    count_layers,
    quantize,
    roles_of,
)
from quant.precision import choose_bits
from quant.reconstruct import reconstruct, unit_names
from quant.search import SearchResult, search
from quant.state import PHASES, CalibrationState, restore

STATISTICS_TRAJECTORIES = 8  # at each timestep
STATISTICS_CONDITIONED = 32  # likewise: classes and texts have ranges of their own
CHECKPOINT = 100
DRIFT_TRAJECTORIES = 16  # 32 and 64 gave the same; at most as many as the calibration has
MOST_VIEWS = 10  # of a sample by the end-to-end steps: more would learn a small set by heart
TEMPORAL_TRAJECTORIES = 8  # whose features are alike: as many samples judge as there are steps
PROBES = 64  # samples, all steps alike, that a layer's own measures look at


Adjust = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Progress(Protocol):
    """Where progress goes; a phase of `total` parts reports each with a short text."""

    def begin(self, phase: str, total: int) -> None: ...
    def step(self, text: str) -> None: ...
    def end(self) -> None: ...


def bit_policy(settings: QuantSettings) -> BitPolicy:
    activation = settings.activation
    log2 = activation.softmax == "log2"  # whose codes may be fewer than those of the other tensors
    return BitPolicy(
        weight=settings.weight.bits,
        activation=activation.bits,
        edge=max(settings.edge_bits, settings.weight.bits),
        edge_activation=settings.edge_activation_bits,
        time=max(settings.time_bits, settings.weight.bits),
        softmax=activation.softmax_bits if log2 else max(activation.softmax_bits, activation.bits),
        split_skip=settings.split_skip,
        quantize_matmuls=settings.quantize_matmuls,
        cache_timestep=settings.time_embedding == "cached",
        symmetric=activation.symmetric,
        softmax_codes=activation.softmax,
        weight_scale=settings.weight.scale,
    )


def calibrated_timesteps(sampling: list[int], limit: int) -> list[int]:
    """At most `limit` distinct timesteps of a sampling schedule, evenly by rank, ascending."""
    distinct = sorted(set(sampling))
    if len(distinct) <= limit:
        return distinct
    ranks = torch.linspace(0, len(distinct) - 1, limit).round().long().unique().tolist()
    return [distinct[r] for r in ranks]


def calibrate(
    denoiser: nn.Module,
    bank: Bank,
    visit: Callable[[nn.Module, int], Bank],
    drive: Callable[[nn.Module, Adjust, int], None],
    settings: QuantSettings,
    calibration: CalibrationSettings,
    train_timesteps: int,
    importance: torch.Tensor,
    progress: Progress,
    state: CalibrationState | None = None,
    save: Callable[[CalibrationState], None] = lambda state: None,
    collect: Callable[..., dict[str, statistics.Statistics]] = statistics.collect,
    signal_to_noise: torch.Tensor | None = None,
) -> tuple[QuantDenoiser, dict[str, Any]]:
    """Quantizes the denoiser. Returns the deployed model and a report of plain values.

    denoiser: full precision, not changed. bank: its trajectories. visit(model, number): those of
    a quantized model, with full-precision answers. drive(model, adjust, count) samples `count`
    fresh images at once, the same ones each time; adjust(x, t, eps) -> eps sees and may change each
    output that the sampler gets. importance (S,): weight of an eps error at each sampling step;
    signal_to_noise (S,): abar / (1 - abar) there, which settings.activation.step_bits needs.
    `state` continues an earlier run; its `phase` is the one that raised DivergenceError, because a
    loss or a learned value is not finite. `collect` stands for statistics.collect.
    """
    context = TimestepContext(
        calibrated_timesteps(bank.timesteps, calibration.bins), train_timesteps
    )
    state = CalibrationState() if state is None else state
    policy = bit_policy(settings)
    if state.tensors:  # which hold the scales that were found
        policy = replace(policy, weight_scale="minmax")
    progress.begin("weight scales", count_layers(denoiser))
    model = quantize(denoiser, context, policy, on_layer=progress.step)
    progress.end()
    if state.tensors:
        restore(model, state.tensors)
        state.tensors = {}
    phases = {
        "equivalent": _equivalent,
        "ranges": _ranges,
        "rounding": _rounding,
        "search": _search,
        "temporal": _temporal,
        "reconstruct": _reconstruct,
        "finetune": _finetune,
        "precision": _precision,
        "correction": _correction,
    }

    def keep(partial: dict[str, Any] | None) -> None:
        if partial is None:
            state.before = {}
        state.partial = partial
        state.tensors = {k: v.detach() for k, v in model.state_dict().items()}
        save(state)
        state.tensors = {}  # they change, and a copy would cost as much memory as the model

    def remember() -> None:
        if not state.before:
            tensors = model.state_dict().items()
            state.before = {k: v.detach().cpu().clone() for k, v in tensors}

    job = _Job(
        denoiser,
        model,
        bank,
        visit,
        drive,
        settings,
        calibration,
        importance,
        progress,
        state,
        keep,
        remember,
        collect,
        signal_to_noise,
    )
    for phase in PHASES:
        if phase in state.done:
            continue
        began = time.perf_counter()
        report = phases[phase](job)
        if report is not None:
            state.report[phase] = report | {"seconds": round(time.perf_counter() - began, 2)}
        check_finite(model)
        state.done.append(phase)
        keep(None)
    return model.deploy(), state.report


@dataclass
class _Job:
    denoiser: nn.Module
    model: QuantDenoiser
    bank: Bank
    visit: Callable[[nn.Module, int], Bank]
    drive: Callable[[nn.Module, Adjust, int], None]
    settings: QuantSettings
    calibration: CalibrationSettings
    importance: torch.Tensor
    progress: Progress
    state: CalibrationState
    keep: Callable[[dict[str, Any]], None]
    remember: Callable[[], None]  # the start of a phase that will keep parts
    collect: Callable[..., dict[str, statistics.Statistics]]
    signal_to_noise: torch.Tensor | None

    def generator(self, phase: str) -> torch.Generator:
        """Random numbers of a phase, independent of the phases before it."""
        return torch.Generator().manual_seed(self.calibration.seed * 1009 + PHASES.index(phase))


def _probes(job: _Job) -> torch.Tensor:
    """Samples (n, 2) of all steps alike, in random order; no more than there are states."""
    generator, count = job.generator("equivalent"), len(job.bank.timesteps)
    number = min(PROBES, count * job.bank.trajectories)
    steps = timesteps.all_steps(number, count)[torch.randperm(number, generator=generator)]
    return timesteps.tuples_of_steps(steps, job.bank.trajectories, generator)


def _equivalent(job: _Job) -> dict[str, Any] | None:
    if not job.settings.equivalent_scaling:
        return None
    size = job.calibration.batch_size
    probes = _probes(job)
    job.progress.begin("equivalent scaling", -(-len(probes) // size) + 1)
    relative = scale_equivalently(
        job.denoiser, job.model, job.bank, probes, size, lambda: job.progress.step("")
    )
    job.progress.end()
    return {"relative_errors": relative}


def _ranges(job: _Job) -> dict[str, Any]:
    """Methods without groups see what their own calibration samples see, the others all steps."""
    activation = job.settings.activation
    quantizers = list(activation_quantizers(job.model))
    if activation.search == "none":
        _select(job, None)
    job.progress.begin("activation ranges", len(quantizers))
    stats = _statistics(job)
    for name, quantizer in quantizers:
        grouping.assign(
            quantizer, stats[name], activation.groups, activation.search, activation.scale
        )
        job.progress.step("")
    job.progress.end()
    return {"quantizers": len(quantizers)}


def _statistics(job: _Job) -> dict[str, statistics.Statistics]:
    bank, size = job.bank, job.calibration.batch_size
    if job.settings.activation.search == "none":
        batches = bank.tuples_by_timestep(job.state.tuples, size)
    else:
        limit = STATISTICS_CONDITIONED if bank.conditioning else STATISTICS_TRAJECTORIES
        batches = bank.by_timestep(limit, size)
    return job.collect(job.denoiser, job.model, batches, seed=job.calibration.seed)


def _rounding(job: _Job) -> dict[str, Any] | None:
    if job.settings.weight.rounding != "gptq":
        return None
    job.progress.begin("weight rounding", len(gptq.compensated_layers(job.model)))
    gains = gptq.compensate(
        job.model,
        job.bank,
        _probes(job),
        job.calibration.batch_size,
        job.calibration.memory_gb,
        job.progress.step,
    )
    job.progress.end()
    return {"relative_errors": gains}


def _select(job: _Job, result: SearchResult | None) -> None:
    """Chooses the calibration tuples. result: of the search, for active selection."""
    calibration, generator = job.calibration, job.generator("search")
    samples, count = calibration.samples, len(job.bank.timesteps)
    tuples = torch.zeros(0, 2, dtype=torch.long)
    if calibration.timesteps == "active" and result is not None:
        tuples = result.tuples[:samples]
        steps = result.selector.pick(samples - len(tuples))
    elif calibration.timesteps == "uniform":
        steps = timesteps.uniform_steps(samples, count)
    elif calibration.timesteps == "normal":
        steps = timesteps.normal_steps(samples, count, generator)
    else:
        steps = timesteps.all_steps(samples, count)
    if len(steps):
        more = timesteps.tuples_of_steps(steps, job.bank.trajectories, generator)
        tuples = torch.cat([tuples, more])
    job.state.tuples = tuples
    job.state.report["tuples_per_step"] = torch.bincount(tuples[:, 0], minlength=count).tolist()


def _search(job: _Job) -> dict[str, Any] | None:
    """Also chooses the calibration tuples, since active selection is part of the search."""
    settings, activation = job.settings.search, job.settings.activation
    if activation.search == "none":
        return None  # chosen already, for the ranges
    if activation.search != "differentiable":
        _select(job, None)
        return None
    job.progress.begin("group search", settings.rounds)
    result = search(
        job.model,
        job.bank,
        settings,
        job.generator("search"),
        job.importance.sqrt(),  # the other root is in how often the search chooses a step
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


def _temporal(job: _Job) -> dict[str, Any] | None:
    """The layers of the timestep alone, over all timesteps of the schedule (TFMQ-DM, Section 4)."""
    names = _apart(job)
    if not names or job.settings.reconstruct.iterations == 0:
        return None
    bank = job.bank
    count, trajectories = len(bank.timesteps), min(TEMPORAL_TRAJECTORIES, bank.trajectories)
    steps = timesteps.all_steps(trajectories * count, count)
    tuples = timesteps.tuples_of_steps(steps, trajectories, job.generator("temporal"))
    return _learn_units(job, "temporal reconstruction", names, tuples)


def _apart(job: _Job) -> list[str]:
    """Layers that are reconstructed before the units that hold them, and left alone there."""
    if job.settings.time_embedding != "reconstructed":
        return []
    return list(roles_of(job.denoiser).timestep_only)


def _reconstruct(job: _Job) -> dict[str, Any] | None:
    if job.settings.weight.rounding != "adaround" or job.settings.reconstruct.iterations == 0:
        return None
    apart = _apart(job)
    units = unit_names(job.model, roles_of(job.denoiser).units, apart)
    return _learn_units(job, "block reconstruction", units, job.state.tuples, apart)


def _learn_units(
    job: _Job, title: str, units: list[str], tuples: torch.Tensor, apart: Sequence[str] = ()
) -> dict[str, Any]:
    errors: dict[str, tuple[float, float]] = dict(job.state.partial or {})

    def on_unit(name: str, before: float, after: float) -> None:
        errors[name] = (before, after)
        job.progress.step(name)

    job.remember()
    job.progress.begin(title, len(units))
    for name in errors:
        job.progress.step(name)
    reconstruct(
        job.denoiser,
        job.model,
        job.bank,
        tuples,
        job.settings.reconstruct,
        job.settings.activation.learned,
        units,
        job.calibration.memory_gb,
        job.calibration.seed,
        on_unit,
        on_chunk=lambda: job.keep(dict(errors)),
        finished=frozenset(errors),
        apart=apart,
    )
    job.progress.end()
    kept = sum(after < before for before, after in errors.values())
    return {"units": len(units), "improved": kept, "errors": errors}


def _finetune(job: _Job) -> dict[str, Any] | None:
    settings = job.settings.reconstruct
    if settings.finetune_iterations == 0:
        return None
    enough = -(-MOST_VIEWS * len(job.state.tuples) // settings.finetune_batch_size)
    iterations = min(settings.finetune_iterations, enough)
    partial = job.state.partial or {}
    losses: list[float] = list(partial.get("losses", ()))

    def on_iteration(i: int, loss: float) -> None:
        losses.append(loss)
        recent = losses[-20:]
        job.progress.step(f"eps error {sum(recent) / len(recent):.2e}")

    resumable = not settings.progressive and iterations >= CHECKPOINT  # visits would be lost
    if resumable:
        job.remember()

    def on_checkpoint(progress: dict[str, Any]) -> None:
        if resumable and len(losses) % CHECKPOINT == 0:
            job.keep({"losses": list(losses), "progress": progress})

    visits = [0]

    def visit(model: nn.Module) -> Bank:
        visits[0] += 1
        return job.visit(model, visits[0])

    job.progress.begin("end-to-end steps", iterations)
    for _ in losses:
        job.progress.step("")
    finetune(
        job.model,
        job.bank,
        job.state.tuples,
        iterations,
        settings.finetune_batch_size,
        settings.lr_scale,
        job.generator("finetune"),
        visit if settings.progressive else None,
        on_iteration,
        job.importance if settings.weigh_steps else None,
        on_checkpoint,
        partial.get("progress"),
        settings.accumulate,
    )
    job.progress.end()
    tenth = max(1, len(losses) // 10)
    return {
        "error_start": sum(losses[:tenth]) / tenth,
        "error_end": sum(losses[-tenth:]) / tenth,
        "iterations": iterations,
        "visited": visits[0],
    }


def _precision(job: _Job) -> dict[str, Any] | None:
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
        _statistics(job),
        activation,
        [*roles.inputs, *roles.outputs],
        job.signal_to_noise,
        size,
        job.progress.step,
    )
    job.progress.end()
    return report


def _correction(job: _Job) -> dict[str, Any] | None:
    kinds = {"ptqd": _noise_correction, "drift": _drift_correction}
    fit = kinds.get(job.settings.correction)
    return None if fit is None else fit(job, job.model.deploy())


def _noise_correction(job: _Job, model: QuantDenoiser) -> dict[str, Any]:
    report = correct_noise(model, job.bank, job.calibration.batch_size, job.progress)
    job.model.correction = model.correction
    return report


@torch.no_grad()
def correct_noise(
    model: QuantDenoiser, bank: Bank, batch_size: int, progress: Progress
) -> dict[str, Any]:
    """Gives a deployed model PTQD's correction, in place; the report of the phase."""
    outputs, bins = [], []
    progress.begin("noise correction", len(bank.timesteps))
    for k, t in enumerate(bank.timesteps):
        for x, _, conditioning in bank.at_step(k, batch_size):
            steps = torch.full((len(x),), t, device=x.device, dtype=torch.long)
            outputs.append(model(x, steps, **conditioning).cpu())
        bins += [int(model.context.bin_of_t[t])] * bank.trajectories
        progress.step(f"t = {t}")
    progress.end()
    eps = bank.eps.flatten(0, 1)
    model.correction = correction.fit(model.context, eps, torch.cat(outputs), torch.tensor(bins))
    return {"largest_k": float(model.correction.k.abs().max())}


@torch.no_grad()
def _drift_correction(job: _Job, model: QuantDenoiser) -> dict[str, Any]:
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

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

After each phase, each chunk of units and every learn.CHECKPOINT end-to-end steps,
`save(state)` gets everything that a later run needs to go on from there.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quant import statistics
from quant.bank import Bank
from quant.context import TimestepContext
from quant.finite import check_finite
from quant.methods import CalibrationSettings, QuantSettings
from quant.model import BitPolicy, QuantDenoiser, count_layers, quantize
from quant.phases import learn, output, prepare
from quant.phases.job import Adjust, Guide, Job, Progress
from quant.state import PHASES, CalibrationState, restore


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
    guide: Guide = lambda eps: eps,
) -> tuple[QuantDenoiser, dict[str, Any]]:
    """Quantizes the denoiser. Returns the deployed model and a report of plain values.

    denoiser: full precision, not changed. bank: its trajectories. visit(model, number): those of
    a quantized model, with full-precision answers. drive(model, adjust, count) samples `count`
    fresh images at once, the same ones each time; adjust(x, t, eps) -> eps sees and may change each
    output that the sampler gets. importance (S,): weight of an eps error at each sampling step;
    signal_to_noise (S,): abar / (1 - abar) there, which settings.activation.step_bits needs.
    guide(eps): outputs of all rows of the bank at a step -> what the sampler makes of them.
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
        "equivalent": prepare.equivalent,
        "ranges": prepare.ranges,
        "rounding": prepare.rounding,
        "search": prepare.search,
        "temporal": learn.temporal,
        "reconstruct": learn.reconstruct,
        "finetune": learn.finetune,
        "precision": output.precision,
        "correction": output.correction,
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

    job = Job(
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
        guide,
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

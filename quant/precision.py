"""Bits of the activations by step (step-aware mixed precision of PTQD; METHOD 1.3, point 4).

Where x_t is mostly noise, quantization noise below it hardly matters. With the signal-to-noise
ratio of b bits  SNR_Q(b, t) = |eps|^2 / |eps_b - eps|^2  and that of the forward process
SNR_F(t) = abar / (1 - abar), a step takes the lowest b with SNR_Q(b, t) > SNR_F(t), else the most
bits. Weights have one set of codes and keep their bits; so do the first and the last layer, and
attention probabilities as far as `softmax_bits` says.

Legend: S bins (calibrated timesteps), G groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant import grouping
from quant.bank import Bank
from quant.log2 import LearnedLog2Quantizer
from quant.methods import ActivationSettings
from quant.model import QuantDenoiser, activation_quantizers
from quant.quantizer import LearnedQuantizer
from quant.statistics import Statistics

SMALLEST_NOISE = 1e-30
TRAJECTORIES = 16  # on which the errors of each number of bits are measured


@dataclass(frozen=True)
class Ranges:
    """What one number of bits gives a quantizer: bits, log_scale and zero_point (G,), group_of_bin
    (S,)."""

    bits: int
    log_scale: torch.Tensor
    zero_point: torch.Tensor
    group_of_bin: torch.Tensor

    @classmethod
    def of(cls, quantizer: LearnedQuantizer) -> "Ranges":
        scale, zero_point = quantizer.log_scale.detach(), quantizer.zero_point.detach()
        return cls(quantizer.bits, scale.clone(), zero_point.clone(), quantizer.group_of_bin)


def lowest_sufficient(
    ratios: Mapping[int, torch.Tensor], signal_to_noise: torch.Tensor
) -> torch.Tensor:
    """Bits of each bin (S,). ratios: bits -> SNR_Q (S,); signal_to_noise: SNR_F (S,)."""
    chosen = torch.full((len(signal_to_noise),), max(ratios), dtype=torch.long)
    for bits in sorted(ratios, reverse=True):
        chosen[ratios[bits] > signal_to_noise] = bits
    return chosen


def adjustable(
    model: QuantDenoiser, edges: Sequence[str], bits: int
) -> dict[str, LearnedQuantizer]:
    """Name -> quantizer of those whose bits may vary. edges: names of the first and last layers."""
    return {
        name: q
        for name, q in activation_quantizers(model)
        if q.bits == bits
        and not isinstance(q, LearnedLog2Quantizer)
        and name.removeprefix("denoiser.").partition(".inputs.")[0] not in edges
    }


def with_bits(
    quantizer: LearnedQuantizer, stats: Statistics, bits: int, settings: ActivationSettings
) -> Ranges:
    """Ranges for other bits, from the statistics as at the start of the calibration."""
    if quantizer.unsigned:
        bits = max(bits, min(settings.softmax_bits, quantizer.bits))
    other = LearnedQuantizer(quantizer.context, bits, quantizer.symmetric, quantizer.unsigned)
    grouping.assign(
        other.to(stats.low.device), stats, settings.groups, settings.search, settings.scale
    )
    return Ranges.of(other.to(quantizer.log_scale.device))


def give_ranges(
    quantizer: LearnedQuantizer, ranges: Mapping[int, Ranges], bits_of_bin: torch.Tensor
) -> None:
    """Each bin takes the group that the ranges of its bits (S,) have for it."""
    scales, zero_points, bits, count = [], [], [], 0
    group_of_bin = torch.zeros_like(quantizer.group_of_bin)
    for wanted in bits_of_bin.unique().tolist():
        part, mine = ranges[wanted], (bits_of_bin == wanted).to(group_of_bin.device)
        used, index = part.group_of_bin[mine].unique(return_inverse=True)
        group_of_bin[mine] = count + index
        scales.append(part.log_scale[used])
        zero_points.append(part.zero_point[used])
        bits += [part.bits] * len(used)
        count += len(used)
    learned = quantizer.zero_point.requires_grad
    quantizer.log_scale = nn.Parameter(torch.cat(scales))
    quantizer.zero_point = nn.Parameter(torch.cat(zero_points), requires_grad=learned)
    quantizer.group_bits = torch.tensor(bits, dtype=torch.uint8, device=group_of_bin.device)
    quantizer.group_of_bin = group_of_bin


@torch.no_grad()
def signal_to_quantization_noise(
    model: QuantDenoiser, bank: Bank, batch_size: int, step: Callable[[str], None]
) -> torch.Tensor:
    """SNR_Q of each bin (S,), 0 for bins without a call. model: deployed."""
    signal, noise = torch.zeros(2, len(model.context.timesteps), dtype=torch.float64)
    for k, t in enumerate(bank.timesteps):
        b, seen = int(model.context.bin_of_t[t]), 0
        for x, _, conditioning in bank.at_step(k, batch_size):
            eps = bank.eps[k, seen : seen + len(x)].to(x.device)
            answer = model(x, torch.full((len(x),), t, device=x.device), **conditioning)
            signal[b] += float(eps.double().square().sum())
            noise[b] += float((answer - eps).double().square().sum())
            seen += len(x)
            if seen >= TRAJECTORIES:
                break
        step(f"t = {t}")
    return signal / noise.clamp(min=SMALLEST_NOISE)


def choose_bits(
    model: QuantDenoiser,
    bank: Bank,
    statistics: Mapping[str, Statistics],
    settings: ActivationSettings,
    edges: Sequence[str],
    signal_to_noise: torch.Tensor,
    batch_size: int,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """Gives every bin its bits, in place; the report of the phase.

    model: under calibration. signal_to_noise: SNR_F of each sampling step of the bank. step(text)
    follows each timestep that was measured, (1 + candidates) times the bank's.
    """
    quantizers = adjustable(model, edges, settings.bits)
    candidates = sorted({*settings.step_bits, settings.bits}, reverse=True)
    ranges = {
        name: {
            bits: Ranges.of(q)
            if bits == settings.bits
            else with_bits(q, statistics[name], bits, settings)
            for bits in candidates
        }
        for name, q in quantizers.items()
    }

    def give(bits_of_bin: torch.Tensor) -> None:
        for name, q in quantizers.items():
            give_ranges(q, ranges[name], bits_of_bin)

    bins, ratios = len(model.context.timesteps), {}
    for bits in candidates:
        give(torch.full((bins,), bits))
        ratios[bits] = signal_to_quantization_noise(model.deploy(), bank, batch_size, step)
    of_bin = [int(model.context.bin_of_t[t]) for t in bank.timesteps]
    strictest: dict[int, float] = {}  # steps that share a bin share its bits
    for b, ratio in zip(of_bin, signal_to_noise.tolist(), strict=True):
        strictest[b] = max(ratio, strictest.get(b, 0.0))
    forward = [strictest.get(b, math.inf) for b in range(bins)]  # no step: most bits
    chosen = lowest_sufficient(ratios, torch.tensor(forward, dtype=torch.float64))
    give(chosen)
    of_step = chosen[of_bin]
    return {
        "bits_of_step": of_step.tolist(),
        "average_bits": float(of_step.double().mean()),
        "signal_to_noise": signal_to_noise.tolist(),
        "of_bits": {str(bits): ratio[of_bin].tolist() for bits, ratio in ratios.items()},
    }

"""Activation statistics of a calibration, whose batches are spread over the processes of a job.

Rank 0 has the trajectories: it gives the batches to all, and gets the draws of each in its order.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...quant.calibration.layers import CalibLayer
from ...quant.calibration.statistics import VALUES_PER_TIMESTEP, Batch, Draws, Statistics, collect
from ...quant.calibration.wrapping import BitPolicy, quantize
from ...quant.core.context import TimestepContext
from ...quant.core.settings import QuantSettings
from ...quant.runtime.denoiser import QuantDenoiser
from .processes import Team, Tensors

SCALE = ".channel_scale"


def collect_together(
    team: Team, denoiser: nn.Module, model: QuantDenoiser, batches: Any, seed: int
) -> dict[str, Statistics]:
    """quant.statistics.collect on rank 0, while the other ranks are in help_collect."""
    batches = list(batches)
    if team.world > 1:
        state = {n: v.cpu() for n, v in model.state_dict().items() if n.endswith(SCALE)}
        team.share(state | _to_tensors(batches))
    return collect(denoiser, model, batches, seed=seed, in_turn=team.in_turn)


def help_collect(
    team: Team, denoiser: nn.Module, settings: QuantSettings, seed: int, device: torch.device
) -> None:
    """Makes this rank's part of the draws, and sends them to rank 0."""
    values = team.share({})
    # Its structure alone matters here: no search of weight scales.
    policy = replace(BitPolicy.of(settings), weight_scale="minmax")
    model = quantize(denoiser, TimestepContext([0], 1), policy)
    for name, module in model.named_modules():
        if isinstance(module, CalibLayer) and f"{name}{SCALE}" in values:
            module.channel_scale = values[f"{name}{SCALE}"].to(device)
    batches = _from_tensors(values, device)
    draws = Draws(denoiser, model, batches, VALUES_PER_TIMESTEP, seed)
    for _ in team.in_turn(len(batches), draws.make):
        raise AssertionError("only rank 0 gets values")


def _to_tensors(batches: list[Batch]) -> Tensors:
    values: Tensors = {"batches": torch.tensor([t for _, t, _ in batches])}
    for i, (x, _, conditioning) in enumerate(batches):
        values[f"{i} x"] = x.cpu()
        values |= {f"{i} y {name}": value.cpu() for name, value in conditioning.items()}
    return values


def _from_tensors(values: Tensors, device: torch.device) -> list[Batch]:
    batches = []
    for i, t in enumerate(values["batches"].tolist()):
        prefix = f"{i} y "
        own = {
            n.removeprefix(prefix): v.to(device) for n, v in values.items() if n.startswith(prefix)
        }
        x = values[f"{i} x"].to(device)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        batches.append((x, t, own))
    return batches

"""What each activation looks like at each calibrated timestep, from full-precision calls.

For each activation quantizer and bin a random subset of values is kept, with the exact extremes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant.context import TimestepContext
from quant.layers import CalibLayer, QuantMatMul, scale_channels
from quant.model import QuantDenoiser


class StatisticsError(ValueError):
    """Activations that no range can be found for; one line."""


@dataclass
class Statistics:
    """values (S, N) float32: a sample of the activation per bin, extremes included;
    low, high (S,): exact minimum and maximum; weight (S,): samples seen in the bin, 0 for a bin
    whose row is that of the nearest one which was reached."""

    values: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    weight: torch.Tensor


def quantizer_operands(model: QuantDenoiser) -> dict[str, tuple[str, Callable]]:
    """Activation quantizer name -> (layer name in the original denoiser, args -> its operand)."""
    operands: dict[str, tuple[str, Callable]] = {}
    for name, module in model.denoiser.named_modules():
        if isinstance(module, CalibLayer):
            original = name.removesuffix(".layer")  # inside a TimestepLayer
            for i in range(len(module.inputs)):
                operands[f"denoiser.{name}.inputs.{i}"] = (original, _input_part(module, i))
        elif isinstance(module, QuantMatMul):
            operands[f"denoiser.{name}.left"] = (name, _left_part(module))
            operands[f"denoiser.{name}.right"] = (name, lambda args: args[1])
    return operands


def _left_part(product: QuantMatMul) -> Callable:
    return lambda args: product.left_operand(args[0])[0]


def _input_part(layer: CalibLayer, part: int) -> Callable:
    """What quantizer `part` of the layer sees, from the arguments of the original layer."""

    def take(args: tuple) -> torch.Tensor:
        dim = layer.op.channel_dim
        x = scale_channels(args[0], layer.channel_scale, dim)
        if len(layer.inputs) == 1:
            return x
        return x.split([layer.split, x.shape[dim] - layer.split], dim=dim)[part]

    return take


@torch.no_grad()
def collect(
    denoiser: nn.Module,
    model: QuantDenoiser,
    batches: Iterable[tuple[torch.Tensor, int, dict[str, Any]]],
    values_per_bin: int = 1024,
    seed: int = 0,
) -> dict[str, Statistics]:
    """Runs the full-precision denoiser on batches (x_t (B, C, H, W), t, conditioning).

    Each batch shares one timestep. Returns the statistics of every activation quantizer of
    `model`. Bins that no batch reached copy the nearest one that was. Raises StatisticsError on
    values that are not finite, naming the layer.
    """
    context: TimestepContext = model.context
    bins = len(context.timesteps)
    operands = quantizer_operands(model)
    by_layer: dict[str, list[tuple[str, Callable]]] = {}
    for name, (layer, take) in operands.items():
        by_layer.setdefault(layer, []).append((name, take))
    kept: dict[str, list[list[torch.Tensor]]] = {n: [[] for _ in range(bins)] for n in operands}
    generator = torch.Generator().manual_seed(seed)
    seen = torch.zeros(bins)
    current = 0

    def hook_of(layer: str):
        def hook(module: nn.Module, args: tuple) -> None:
            for name, take in by_layer[layer]:
                x = take(args).detach().flatten()
                low, high = x.amin(), x.amax()
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    raise StatisticsError(f"layer {layer}: its input is NaN or infinite")
                index = torch.randint(x.numel(), (values_per_bin,), generator=generator)
                sample = x[index.to(x.device)]
                kept[name][current].append(torch.cat([sample, low[None], high[None]]))

        return hook

    handles = [denoiser.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in by_layer]
    try:
        for x, t, conditioning in batches:
            current = int(context.bin_of_t[t])
            seen[current] += len(x)
            denoiser(x, torch.full((len(x),), t, device=x.device, dtype=torch.long), **conditioning)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _merge(lists, seen, values_per_bin, generator) for name, lists in kept.items()}


def _merge(
    lists: list[list[torch.Tensor]], seen: torch.Tensor, count: int, generator: torch.Generator
) -> Statistics:
    """Draws of all batches of a bin -> `count` values with the extremes among them."""
    reached = [i for i, draws in enumerate(lists) if draws]
    if not reached:
        raise ValueError("no calibration batch reached a calibrated timestep")
    rows, low, high = [], [], []
    for i in range(len(lists)):
        draws = lists[min(reached, key=lambda j: abs(j - i))]
        everything = torch.cat(draws).float()
        index = torch.randperm(len(everything), generator=generator)[: count - 2]
        low.append(everything.amin())
        high.append(everything.amax())
        rows.append(
            torch.cat(
                [everything[index.to(everything.device)], low[-1:][0][None], high[-1:][0][None]]
            )
        )
    return Statistics(
        torch.stack(rows).cpu(), torch.stack(low).cpu(), torch.stack(high).cpu(), seen
    )

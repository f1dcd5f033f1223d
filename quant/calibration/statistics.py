"""What each activation looks like at each calibrated timestep, from full-precision calls.

For each activation quantizer and calibrated timestep a random subset of values is kept, with the
exact extremes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.context import Timestep
from ..core.operation import scale_channels
from ..runtime.denoiser import QuantDenoiser
from .layers import CalibLayer, CalibMatMul
from .sharing import Alone, Team, Tensors

Batch = tuple[torch.Tensor, Timestep, dict[str, Any]]  # x_t (B, C, H, W), t, conditioning
VALUES_PER_TIMESTEP = 1024  # per timestep
LARGEST_DRAW_RANGE = 2**27  # range up to which torch.randint takes equally many random numbers


class StatisticsError(ValueError):
    """Activations that no range can be found for; one line."""


@dataclass
class Statistics:
    """What one activation looks like at each of S calibrated timesteps.

    values (S, N) float32: some of its values, extremes included; low, high (S,): exact minimum and
    maximum; weight (S,): samples seen there. A timestep that no sample reached has weight 0 and the
    row of the nearest one that was reached.
    """

    values: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    weight: torch.Tensor


def quantizer_operands(model: QuantDenoiser) -> dict[str, tuple[str, Callable]]:
    """Activation quantizer name -> (layer name in the original denoiser, args -> its operand)."""
    operands: dict[str, tuple[str, Callable]] = {}
    for name, module in model.denoiser.named_modules():
        if isinstance(module, CalibLayer):
            original = name.removesuffix(".layer")  # inside a CalibTimestepLayer
            for i in range(len(module.inputs)):
                operands[f"denoiser.{name}.inputs.{i}"] = (original, _input_part(module, i))
        elif isinstance(module, CalibMatMul):
            operands[f"denoiser.{name}.left"] = (name, _left_operand(module))
            operands[f"denoiser.{name}.right"] = (name, lambda args: args[1])
    return operands


def _left_operand(product: CalibMatMul) -> Callable:
    return lambda args: product.left_operand(args[0])


def _input_part(layer: CalibLayer, part: int) -> Callable:
    """What quantizer `part` of the layer sees, from the arguments of the original layer."""

    def take(args: tuple) -> torch.Tensor:
        dim = layer.op.channel_dim
        x = scale_channels(args[0], layer.channel_scale, dim)
        if len(layer.inputs) == 1:
            return x
        return x.split([layer.split, x.shape[dim] - layer.split], dim=dim)[part]

    return take


def collect(
    denoiser: nn.Module,
    model: QuantDenoiser,
    batches: Iterable[Batch],
    values_per_timestep: int = VALUES_PER_TIMESTEP,
    seed: int = 0,
    team: Team | None = None,
) -> dict[str, Statistics]:
    """Runs the full-precision denoiser on batches (x_t (B, C, H, W), t, conditioning).

    Each batch shares one timestep. Returns the statistics of every activation quantizer of `model`.
    Timesteps that no batch reached copy the nearest one that was. team: processes that call it
    together, with the same arguments, and share the batches. Raises StatisticsError on values that
    are not finite, naming the layer.
    """
    batches, context = list(batches), model.context
    draws = Draws(denoiser, model, batches, values_per_timestep, seed)
    timesteps = len(context.timesteps)
    kept: dict[str, list[list[torch.Tensor]]] = {
        n: [[] for _ in range(timesteps)] for n in draws.names
    }
    seen = torch.zeros(timesteps)
    shared = (team or Alone()).share(len(batches), draws.make)
    for (x, t, _), values in zip(batches, shared, strict=True):
        current = int(context.nearest(t))
        seen[current] += len(x)
        for name, value in values.items():
            kept[name][current].append(value)
    generator = draws.at(len(batches))
    return {
        name: _merge(lists, seen, values_per_timestep, generator) for name, lists in kept.items()
    }


class Draws:
    """Random values of every activation at every batch, each batch for itself.

    The positions come from one stream of random numbers over all batches; a process that makes
    some of the batches only passes over the numbers of the others.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        model: QuantDenoiser,
        batches: Sequence[Batch],
        values_per_timestep: int,
        seed: int,
    ):
        self._denoiser, self._batches, self._count = denoiser, batches, values_per_timestep
        operands = quantizer_operands(model)
        self.names = list(operands)
        self._by_layer: dict[str, list[tuple[str, Callable]]] = {}
        for name, (layer, take) in operands.items():
            self._by_layer.setdefault(layer, []).append((name, take))
        self._generator, self._passed = torch.Generator().manual_seed(seed), 0

    def at(self, number: int) -> torch.Generator:
        """The stream behind the first `number` batches. It cannot go back."""
        while self._passed < number:
            for _ in self.names:
                torch.randint(1, (self._count,), generator=self._generator)
            self._passed += 1
        return self._generator

    @torch.no_grad()
    def make(self, number: int) -> Tensors:
        """Quantizer -> values_per_timestep draws and the two extremes at a batch, on the CPU."""
        generator, values = self.at(number), {}

        def hook_of(layer: str) -> Callable:
            def hook(module: nn.Module, args: tuple) -> None:
                for name, take in self._by_layer[layer]:
                    if name in values:
                        raise ValueError(f"layer {layer} runs twice in one call")
                    values[name] = self._draw(take(args).detach().flatten(), layer, generator)

            return hook

        modules = {layer: self._denoiser.get_submodule(layer) for layer in self._by_layer}
        handles = [m.register_forward_pre_hook(hook_of(layer)) for layer, m in modules.items()]
        x, t, conditioning = self._batches[number]
        try:
            steps = torch.full((len(x),), t)
            self._denoiser(x, steps.to(x.device), **conditioning)
        finally:
            for handle in handles:
                handle.remove()
        self._passed += 1
        return {name: value.cpu() for name, value in values.items()}

    def _draw(self, x: torch.Tensor, layer: str, generator: torch.Generator) -> torch.Tensor:
        low, high = x.amin(), x.amax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise StatisticsError(f"layer {layer}: its input is NaN or infinite")
        stride = -(-x.numel() // LARGEST_DRAW_RANGE)
        places = -(-x.numel() // stride)
        index = torch.randint(places, (self._count,), generator=generator) * stride
        return torch.cat([x[index.to(x.device)], low[None], high[None]])


def _merge(
    lists: list[list[torch.Tensor]], seen: torch.Tensor, count: int, generator: torch.Generator
) -> Statistics:
    """Draws of all batches of a timestep -> `count` values with the extremes among them."""
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

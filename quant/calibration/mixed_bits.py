"""Bits of each layer's weights under a common budget.

If the weights alone are off by D, the eps error is the quadratic form |J D|^2 near full precision,
where J is the derivative of eps by the weights. Rounding errors of different weights are unrelated,
so that the diagonal is what counts:

    loss of a layer at b bits = sum over its weights of h D(b)^2
    h = E[(J^T r)^2], where r are random signs

h takes one backward pass for each batch of samples, whatever the number of layers and bits. The
bits are then given out one after the other, each to the layer that gains most for its size.

Legend: O output channels, I input channels.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ..core.settings import FEWEST_BITS, MOST_BITS
from ..runtime.denoiser import QuantDenoiser
from .layers import CalibLayer, CalibTimestepLayer
from .states import CalibrationStates
from .weights import WeightQuantizer, roughly_rounded

Key = TypeVar("Key", bound=Hashable)


def choices(average_bits: float) -> tuple[int, ...]:
    """Bits that a layer may get: whole ones from those of the mean on. With fewer the images came
    out worse, whatever the others gained (docs/ablations.md)."""
    return tuple(range(max(FEWEST_BITS, int(average_bits)), MOST_BITS + 1))


def free_layers(model: QuantDenoiser, bits: int) -> dict[str, CalibLayer]:
    """The layers in general, by the name of the layer that they replace: those of `bits` bits whose
    inputs are quantized to at most MOST_BITS. The first, the last and those of the timestep alone
    are others."""
    return {
        name: module
        for name, module in model.denoiser.named_modules()
        if isinstance(module, CalibLayer)
        and module.quantizer.bits == bits
        and len(module.inputs)
        and all(q.bits <= MOST_BITS for q in module.inputs)
    }


def timestep_layers(model: QuantDenoiser) -> dict[str, CalibLayer]:
    """The layers that are computed once for each timestep, by the name of the layer that they
    replace."""
    return {
        name: module.layer
        for name, module in model.denoiser.named_modules()
        if isinstance(module, CalibTimestepLayer)
    }


def curvatures(
    denoiser: nn.Module,
    names: Sequence[str],
    states: CalibrationStates,
    tuples: torch.Tensor,
    importance: torch.Tensor,
    batch_size: int,
    generator: torch.Generator,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """h of each weight of the named full-precision layers, shaped like the weight.

    tuples (n, 2) of the states; importance (K,): weight of an eps error at each sampling step.
    """
    weights = [denoiser.get_submodule(name).get_parameter("weight") for name in names]
    wanted = [p.requires_grad for p in denoiser.parameters()]
    denoiser.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    found = {name: torch.zeros_like(weight) for name, weight in zip(names, weights, strict=True)}

    def take(name: str, weight: torch.Tensor) -> None:  # at once: all gradients would be a model
        assert weight.grad is not None
        found[name].addcmul_(weight.grad, weight.grad)
        weight.grad = None

    hooks = [
        weight.register_post_accumulate_grad_hook(partial(take, name))
        for name, weight in zip(names, weights, strict=True)
    ]
    try:
        for start in range(0, len(tuples), batch_size):
            index = tuples[start : start + batch_size]
            x, t, _, conditioning = states.gather(index)
            eps = denoiser(x, t.to(x.device), **conditioning)
            signs = (torch.randint(2, eps.shape, generator=generator) * 2 - 1).to(eps.device)
            root = importance[index[:, 0]].sqrt().to(eps.device)
            ((eps * signs).flatten(1).sum(1) * root).sum().backward()
            on_batch()
    finally:
        for hook in hooks:
            hook.remove()
        for p, value in zip(denoiser.parameters(), wanted, strict=True):
            p.requires_grad_(value)
    return found


@torch.no_grad()
def losses(layer: CalibLayer, curvature: torch.Tensor, choices: Sequence[int]) -> dict[int, float]:
    """Loss of a layer at each of the choices of bits, with its weights rounded to nearest."""
    weight, r = layer.weight, layer.channel_scale
    if r is not None:  # the layer holds W / r
        curvature = curvature * r.square().view(1, -1, *(1,) * (weight.dim() - 2))
    kind = layer.quantizer.scale_search
    found = {}
    for bits in choices:
        error = roughly_rounded(weight, bits, kind) - weight
        found[bits] = float((curvature * error.square()).sum())
    return found


def share_out(
    losses_of: Mapping[Key, Mapping[int, float]], sizes: Mapping[Key, int], average_bits: float
) -> dict[Key, int]:
    """Bits of each part, of a mean weighted by the sizes of at most average_bits.

    losses_of: loss by bits of each part; sizes: how many numbers have these bits.
    """
    chosen = {name: min(of) for name, of in losses_of.items()}
    left = average_bits * sum(sizes.values()) - sum(sizes[n] * b for n, b in chosen.items())

    def best_step(name: Key) -> tuple[float, int]:
        """(loss that a bit of the file saves, new bits); several bits at once may save more."""
        of, now = losses_of[name], chosen[name]
        steps = [
            ((of[now] - of[b]) / (sizes[name] * (b - now)), b)
            for b in of
            if b > now and sizes[name] * (b - now) <= left
        ]
        return max(steps, default=(0.0, now))

    while True:
        gains = {name: best_step(name) for name in chosen}
        name = max(gains, key=lambda n: gains[n][0])
        if gains[name][0] <= 0:
            return chosen
        left -= sizes[name] * (gains[name][1] - chosen[name])
        chosen[name] = gains[name][1]


def set_bits(model: QuantDenoiser, bits: Mapping[str, int]) -> None:
    """Gives the named layers quantizers of so many bits."""
    for name, count in bits.items():
        layer = model.denoiser.get_submodule(name)
        layer = layer.layer if isinstance(layer, CalibTimestepLayer) else layer
        assert isinstance(layer, CalibLayer)
        kind = layer.quantizer.scale_search
        layer.weight_quantizer = WeightQuantizer(layer.weight, count, kind)

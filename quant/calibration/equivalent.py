"""Equivalent scaling: ranges of input channels move from the activations into the weights.

    y = W x = (W / r) (r x),    r (C,) per input channel

The activation quantizer sees r x, whose channels are more alike, and the weight quantizer W / r.
There is still one scale per tensor, so that an int8 GEMM stays possible: r is a factor of the
quantization step, which has to touch every value anyway. As SmoothQuant (Xiao et al. 2023),

    r_c = (max_o |w_oc|)^(1 - alpha) / (max |x_c|)^alpha,    normalised to a geometric mean of 1,

but alpha is chosen for each layer by the error of its own quantized output, and alpha = none
(r = 1) is among the candidates, so that no layer gets worse by its own measure.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..core.affine import fake_quantize, range_to_scale
from ..core.operation import quantize_input, scale_channels
from ..core.settings import MOST_BITS
from ..runtime.denoiser import QuantDenoiser
from .layers import CalibLayer
from .states import CalibrationStates
from .weights import WeightQuantizer, roughly_rounded

ALPHAS = (0.0, 0.25, 0.5, 0.75)
LARGEST_FACTOR = 16.0  # of r and 1 / r
CLIPPING_RATIOS = (1.0, 0.85, 0.7, 0.55)  # of the largest value, tried as clipping ranges


class _DynamicQuantizer(nn.Module):
    """The best of a few ranges of the tensor at hand, for comparing candidates only."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, best_error = x, float("inf")
        for ratio in CLIPPING_RATIOS:
            scale, zero = range_to_scale(x.amin() * ratio, x.amax() * ratio, self.bits, False)
            x_hat = fake_quantize(x, scale, zero, 2**self.bits - 1)
            error = float((x_hat - x).square().mean())
            if error < best_error:
                best, best_error = x_hat, error
        return best


def candidate(largest: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """r (C,) of one alpha. largest (C,): largest |x_c|; weight (O, C, ...). Exact in float16."""
    w_max = weight.detach().abs().transpose(0, 1).flatten(1).amax(1).clamp(min=1e-5)
    r = w_max.pow(1 - alpha) / largest.clamp(min=1e-5).pow(alpha)
    r = r / r.log().mean().exp()
    return r.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR).half().float()


def scaled_layers(model: QuantDenoiser) -> dict[str, CalibLayer]:
    """The layers that can be scaled, by the name of the layer they replace."""
    return {
        name: module
        for name, module in model.denoiser.named_modules()
        if isinstance(module, CalibLayer)
        and len(module.inputs)
        and all(q.bits <= MOST_BITS for q in module.inputs)
        and (not module.op.is_conv or module.op.groups == 1)
    }


@torch.no_grad()
def scale_equivalently(
    denoiser: nn.Module,
    model: QuantDenoiser,
    states: CalibrationStates,
    tuples: torch.Tensor,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sets channel_scale of the layers of `model` and folds 1 / r into their weights.

    tuples (n, 2) of the states; the last batch judges, all batches give the largest values. Returns
    the error of each layer's output relative to that without scaling (1.0: not scaled).
    """
    layers = scaled_layers(model)
    largest: dict[str, torch.Tensor] = {}
    relative: dict[str, float] = {}

    def see(name: str) -> Callable:
        dim = layers[name].op.channel_dim

        def hook(module: nn.Module, args: tuple) -> None:
            seen = args[0].detach().abs().transpose(0, dim).flatten(1).amax(1)
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return hook

    def judge(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            relative[name] = _choose(layers[name], args[0], out, largest[name])

        return hook

    batches = [tuples[i : i + batch_size] for i in range(0, len(tuples), batch_size)]
    for make, chosen in ((see, batches), (judge, batches[-1:])):
        handles = []
        for name in layers:
            original = denoiser.get_submodule(name)
            if make is see:
                handles.append(original.register_forward_pre_hook(make(name)))
            else:
                handles.append(original.register_forward_hook(make(name)))
        try:
            for index in chosen:
                x, t, _, conditioning = states.gather(index)
                denoiser(x, t.to(x.device), **conditioning)
                on_batch()
        finally:
            for handle in handles:
                handle.remove()
    return relative


def _choose(
    layer: CalibLayer, x: torch.Tensor, target: torch.Tensor, largest: torch.Tensor
) -> float:
    """Gives the layer its best r; returns the error relative to r = 1."""
    kind, bits = layer.quantizer.scale_search, layer.quantizer.bits
    quantizers = nn.ModuleList(_DynamicQuantizer(q.bits) for q in layer.inputs)
    candidates: list[torch.Tensor | None] = [None]
    candidates += [candidate(largest, layer.weight, alpha) for alpha in ALPHAS]
    errors = []
    for r in candidates:
        weight = layer.weight if r is None else unscaled_weight(layer.weight, r)
        rounded = roughly_rounded(weight, bits, kind)
        scaled = scale_channels(x, r, layer.op.channel_dim)
        scaled = quantize_input(scaled, quantizers, layer.split, layer.op.channel_dim)
        out = layer.op(scaled, rounded, layer.bias)
        errors.append(float((out - target).square().mean()))
    best = min(range(len(errors)), key=errors.__getitem__)
    r = candidates[best]
    if r is not None:
        weight = unscaled_weight(layer.weight, r)
        layer.set_channel_scale(r, weight, WeightQuantizer(weight, bits, kind))
    return errors[best] / max(errors[0], 1e-20)


def unscaled_weight(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """W / r: weight (O, C, ...), r (C,)."""
    return weight / r.view(1, -1, *(1,) * (weight.dim() - 2))

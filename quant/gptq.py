"""Second-order rounding: each weight's rounding error is made up by the weights still to come.

GPTQ (Frantar et al. 2023) on every layer, with H = X^T X of the layer's own quantized inputs X. The
codes move to the grid that the scale search chose; what later phases learn starts from them.

For layers of the timestep alone X has one row a timestep, so that this is the reconstruction of the
temporal features over the whole schedule (TFMQ-DM), in closed form.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quant.bank import Bank
from quant.layers import CalibLayer
from quant.model import QuantDenoiser
from quant.weights import per_channel

ROWS = 64  # output positions per sample that enter H, at most (a grid over the feature map)
DAMPING = 0.01  # of the mean of H's diagonal
BLOCK = 128  # columns whose update of the rest is delayed


def compensated_layers(model: QuantDenoiser) -> dict[str, CalibLayer]:
    """All layers but grouped convolutions."""
    return {
        name: m
        for name, m in model.denoiser.named_modules()
        if isinstance(m, CalibLayer) and (not m.op.is_conv or m.op.groups == 1)
    }


def input_rows(layer: CalibLayer, x: torch.Tensor) -> torch.Tensor:
    """What the layer multiplies its weight with, at some output positions: (rows, I * kh * kw)."""
    op = layer.op
    if not op.is_conv:
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(1, len(flat) // (ROWS * len(x)))]
    kernel, stride, padding, dilation = (
        _two(v) for v in (layer.weight.shape[2:], op.stride, op.padding, op.dilation)
    )
    if x.dim() == 3:  # Conv1d: a unit height
        x = x.unsqueeze(2)
        padding = (0, padding[1])
    positions = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    side = ROWS if positions[0] == 1 else int(ROWS**0.5)
    step = tuple(s * max(1, p // side) for s, p in zip(stride, positions, strict=True))
    return F.unfold(x, kernel, dilation, padding, step).transpose(1, 2).flatten(0, 1)


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return tuple(value) if len(value) == 2 else (1, *value)


@torch.no_grad()
def compensate(
    model: QuantDenoiser,
    bank: Bank,
    tuples: torch.Tensor,
    batch_size: int,
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Rounds the weights of all layers in place. tuples (n, 2): samples of the bank for H.

    Returns tr(E H E^T) after, relative to rounding to nearest, by layer name.
    """
    layers = compensated_layers(model)
    hessians: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Callable:
        def hook(module: CalibLayer, args: tuple) -> None:
            rows = input_rows(module, module.quantized_input(args[0]))
            square = rows.T @ rows
            hessians[name] = hessians[name].add_(square) if name in hessians else square

        return hook

    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in layers.items()]
    try:
        for start in range(0, len(tuples), batch_size):
            x, t, _, conditioning = bank.gather(tuples[start : start + batch_size])
            model(x, t, **conditioning)
    finally:
        for handle in handles:
            handle.remove()
    gains = {}
    for name, layer in layers.items():
        gains[name] = _round_layer(layer, hessians.pop(name))
        on_layer(name)
    return gains


def _round_layer(layer: CalibLayer, hessian: torch.Tensor) -> float:
    quantizer = layer.weight_quantizer
    weight = layer.weight.detach()
    flat = weight.flatten(1) / per_channel(quantizer.scale, weight).flatten(1)  # in codes
    zero, top = quantizer.zero_point[:, None], 2**quantizer.bits - 1
    codes = second_order_codes(flat, hessian, -zero, top - zero)
    nearest = torch.clamp(flat.round(), -zero, top - zero)
    s = quantizer.scale[:, None]

    def loss(q: torch.Tensor) -> float:
        error = (q - flat) * s
        return float(((error @ hessian) * error).sum())

    before, after = loss(nearest), loss(codes)
    if after < before:
        quantizer.fix_codes((codes + zero).view_as(weight))
    return min(after, before) / max(before, 1e-20)


def second_order_codes(
    weight: torch.Tensor, hessian: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """weight (O, N) in units of its scale, hessian (N, N), low and high (O, 1) -> codes (O, N).

    Columns in the order of falling H_ii; what rounding a column loses is moved to the others by
    the inverse of H.
    """
    order = hessian.diagonal().argsort(descending=True)
    h = hessian[order][:, order].double()
    h.diagonal().add_(DAMPING * h.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)  # H^-1 = U^T U
    w = weight[:, order].clone()
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        errors = torch.empty(len(w), end - start, dtype=w.dtype, device=w.device)
        for i in range(start, end):
            column = torch.clamp(w[:, i : i + 1].round(), low, high)
            codes[:, i : i + 1] = column
            error = (w[:, i : i + 1] - column) / upper[i, i]
            w[:, i:end] -= error * upper[i, i:end]
            errors[:, i - start : i - start + 1] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result

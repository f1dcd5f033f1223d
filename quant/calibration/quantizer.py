"""Activation quantizers under calibration: scales and zero points that learn.

Legend: B batch, G groups of timesteps, S calibrated timesteps.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from ..core.affine import (
    SMALLEST_SCALE,
    fake_quantize,
    numbers_per_sample,
    range_to_scale,
    sample_rows,
)
from ..core.context import TimestepContext
from ..runtime.quantizer import ActivationQuantizer


class _LearnedFakeQuantize(torch.autograd.Function):
    """fake_quantize with straight-through gradients for x, LSQ gradients for scale and zero_point.

    Inside the range the gradient of the scale is round(x/s) - x/s, outside it is the clamped
    integer (Esser et al. 2020); the gradient of the zero point is -s where x is clipped (Bhalgat et
    al. 2020). With g the incoming gradient and g_x the part of it inside, they are sums,
    (<g, x_hat> - <g_x, x>) / s  and  -s (<g, 1> - <g_x, 1>), that need no tensor of their own.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, top):
        x_hat = fake_quantize(x, scale, zero_point, top)
        ctx.save_for_backward(x, x_hat, scale, zero_point)
        ctx.top = top
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        x, x_hat, scale, zero_point = ctx.saved_tensors
        low, high = (-zero_point - 0.5) * scale, (ctx.top - zero_point + 0.5) * scale
        x_rows = sample_rows(x)
        if x_rows is None or scale.numel() not in (1, len(x)):
            grad_x = grad * ((x >= low) & (x <= high))
            product = _sum_like(grad * x_hat, scale) - _sum_like(grad_x * x, scale)
            clipped = _sum_like(grad - grad_x, zero_point)
        else:
            grad_x, product, clipped = _backward_by_row(grad, x, x_hat, low, high)
            if scale.numel() == 1:
                product, clipped = product.sum(), clipped.sum()
            product, clipped = product.view_as(scale), clipped.view_as(scale)
        return grad_x, product / scale, -clipped * scale, None


def _backward_by_row(
    grad: torch.Tensor, x: torch.Tensor, x_hat: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of x, and per sample (B,) <g, x_hat> - <g_x, x> and <g, 1> - <g_x, 1>."""
    grad_x = torch.empty_like(x)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    grad, x_hat = (v.contiguous(memory_format=layout) for v in (grad, x_hat))
    products, clipped = [], []
    bounds = zip(numbers_per_sample(low, len(x)), numbers_per_sample(high, len(x)), strict=True)
    # Each has rows as x has, whose layout all share.
    rows = cast(list[torch.Tensor], [sample_rows(v) for v in (grad, x, x_hat, grad_x)])
    for g, v, q, out, (a, b) in zip(*rows, bounds, strict=True):
        torch.ops.aten.hardtanh_backward.grad_input(g, v, a, b, grad_input=out)
        products.append(torch.dot(g, q) - torch.dot(out, v))
        clipped.append(g.sum() - out.sum())
    return grad_x, torch.stack(products), torch.stack(clipped)


def _sum_like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sums `value` down to the broadcastable shape of `target`."""
    if target.dim() == 0:
        return value.sum()
    dims = [d for d in range(value.dim()) if target.shape[d] == 1 and value.shape[d] != 1]
    return value.sum(dim=dims, keepdim=True) if dims else value


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """Rounding whose gradient is one."""
    return x + (x.round() - x).detach()


def rate_of_scale(lr: float, bits: int) -> float:
    """Learning rate of a log-scale. lr is that of 4 bits: each bit more halves the change of the
    range that moves an outer value by one code."""
    return lr * 2.0 ** (4 - bits)


class LearnedQuantizer(nn.Module):
    """Activation quantizer under calibration: learnable log-scale and zero point per group.

    During the search (search.py) every calibrated timestep also holds a softmax over the groups,
    and the output is the mixture of the two likeliest quantizers.

    bits: of the codes, where the groups have none of their own (timestep_bits.py). log_scale (G,)
    and shared_log_scale are in units of 2^(bits - bits of the group), so that a step of the
    optimizer moves outer values of each group by as many codes.
    """

    group_of_timestep: torch.Tensor
    group_bits: torch.Tensor
    group_error: torch.Tensor | None

    def __init__(self, context: TimestepContext, bits: int, symmetric: bool, unsigned: bool):
        super().__init__()
        self.context, self.bits = context, bits
        self.symmetric, self.unsigned = symmetric, unsigned
        self.enabled = True
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=not (symmetric or unsigned))
        # What the groups learn together: each of them alone sees only its share of the samples.
        self.shared_log_scale = nn.Parameter(torch.zeros(()))
        self.shared_zero_point = nn.Parameter(torch.zeros(()))
        self.register_buffer(
            "group_of_timestep", torch.zeros(len(context.timesteps), dtype=torch.long)
        )
        self.register_buffer("group_bits", torch.full((1,), bits))  # (G,)
        # Error of each timestep under each group's range, relative to the timestep's best; until
        # the search.
        self.register_buffer("group_error", None)  # (S, G)
        self.logits: nn.Parameter | None = None  # (S, G) during the search
        self.temperature = 1.0

    @property
    def groups(self) -> int:
        """Number of groups of timesteps, G."""
        return len(self.log_scale)

    def set_ranges(
        self,
        low: torch.Tensor,
        high: torch.Tensor,
        group_of_timestep: torch.Tensor,
        bits: torch.Tensor | None = None,
    ) -> None:
        """low, high (G,): ranges of the groups; group_of_timestep (S,): the group of each
        timestep; bits (G,): of each group, None: those of the quantizer."""
        bits = torch.full(low.shape, self.bits) if bits is None else bits
        scale, zero_point = range_to_scale(low, high, bits, self.symmetric)
        if self.unsigned:
            zero_point = torch.zeros_like(zero_point)
        device = self.log_scale.device
        self.group_bits = bits.long().to(device)
        self.log_scale = nn.Parameter(scale.float().log().to(device) / self._unit())
        self.zero_point = nn.Parameter(
            zero_point.float().to(device), requires_grad=self.zero_point.requires_grad
        )
        self.group_of_timestep = group_of_timestep.long().to(device)

    def ranges(self) -> dict[str, torch.Tensor]:
        """What set_ranges and grouping.assign set, for take_ranges."""
        values = {name: getattr(self, name).detach() for name in ("log_scale", "zero_point")}
        values["group_of_timestep"], values["group_bits"] = self.group_of_timestep, self.group_bits
        if self.group_error is not None:
            values["group_error"] = self.group_error
        return values

    def take_ranges(self, values: Mapping[str, torch.Tensor]) -> None:
        """values: of ranges() of another one."""
        device = self.log_scale.device
        for name in ("log_scale", "zero_point"):
            value, wanted = values[name].to(device), getattr(self, name).requires_grad
            setattr(self, name, nn.Parameter(value, requires_grad=wanted))
        self.group_of_timestep = values["group_of_timestep"].to(device)
        self.group_bits = values["group_bits"].to(device)
        error = values.get("group_error")
        self.group_error = None if error is None else error.to(device)

    def _tops(self) -> torch.Tensor:
        """The highest codes, (G,)."""
        return (2.0**self.group_bits) - 1

    def _unit(self) -> torch.Tensor:
        """Of log_scale, (G,)."""
        return 2.0 ** (self.bits - self.group_bits)

    def _integral_zero_point(self) -> torch.Tensor:
        zero_point = self.zero_point + self.shared_zero_point
        return round_ste(zero_point.clamp(min=0).clamp(max=self._tops()))

    def current_scale(self) -> torch.Tensor:
        """(G,)"""
        return ((self.log_scale + self.shared_log_scale) * self._unit()).exp()

    def _quantize(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        shape = () if group.dim() == 0 else (-1,) + (1,) * (x.dim() - 1)
        scale = self.current_scale()[group].reshape(shape)
        zero_point = self._integral_zero_point()[group].reshape(shape)
        top = self._tops()[group].reshape(shape)
        return _LearnedFakeQuantize.apply(x, scale, zero_point, top)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return x
        index = torch.as_tensor(self.context.index, device=x.device)
        if self.logits is None:
            return self._quantize(x, self.group_of_timestep[index])
        weights = torch.softmax(self.logits[index] / self.temperature, dim=-1)  # (..., G)
        best, group = weights.topk(min(2, self.groups), dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        shape = () if index.dim() == 0 else (-1,) + (1,) * (x.dim() - 1)
        parts = (
            best[..., i].reshape(shape) * self._quantize(x, group[..., i])
            for i in range(best.shape[-1])
        )
        return cast(torch.Tensor, sum(parts))  # never the 0 of an empty sum

    def deploy(self) -> ActivationQuantizer:
        """The quantizer with its scales and integral zero points fixed."""
        scale = self.current_scale().clamp(min=SMALLEST_SCALE)
        return ActivationQuantizer(
            self.context,
            scale,
            self._integral_zero_point().round(),
            self.group_of_timestep,
            self.group_bits.tolist(),
        )


def scale_groups(quantizers: list[LearnedQuantizer], lr: float) -> list[dict]:
    """Optimizer groups of the quantizers' log-scales; lr as in rate_of_scale."""
    by_bits: dict[int, list[nn.Parameter]] = {}
    for q in quantizers:
        by_bits.setdefault(q.bits, []).append(q.log_scale)
        if q.groups > 1:
            by_bits[q.bits].append(q.shared_log_scale)
    return [{"params": v, "lr": rate_of_scale(lr, bits)} for bits, v in sorted(by_bits.items())]

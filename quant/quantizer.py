"""Uniform quantizers.

    q = clamp(round(x / s) + z, 0, 2^b - 1),    x_hat = s (q - z)

Legend: B batch, G groups of timesteps, S calibrated timesteps (bins), O output channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from quant.context import TimestepContext

SMALLEST_SCALE = 1e-8


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, top: int | torch.Tensor
) -> torch.Tensor:
    """Quantize and dequantize; scale, zero_point and top = 2^b - 1 broadcast against x.

    The clamp works on q - z, which saves adding and removing z. Where every sample has its own
    scale, on a CPU the passes go sample by sample, so that a sample stays in the cache between
    them; the result is the same bit by bit.
    """
    inverse, low, high = scale.reciprocal(), -zero_point, top - zero_point
    rows = _rows(x)
    if rows is None:
        return torch.clamp(torch.mul(x, inverse).round_(), low, high).mul_(scale)
    out = torch.empty_like(x)
    parts = zip(
        rows, _rows(out), *(_per_row(v, len(x)) for v in (inverse, low, high, scale)), strict=True
    )
    for row, out_row, i, a, b, s in parts:
        torch.mul(row, i, out=out_row).round_().clamp_(a, b).mul_(s)
    return out


SMALL = 12000  # values per sample, below which one pass over the batch is quicker


def _rows(x: torch.Tensor) -> torch.Tensor | None:
    """x (B, ...) as a view (B, N) in the order of its memory; None where rows do not pay."""
    if x.device.type != "cpu" or x.dim() < 2 or x.numel() < SMALL * len(x):
        return None
    if x.is_contiguous():
        return x.view(len(x), -1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(len(x), -1)
    return None


def _per_row(value: torch.Tensor, count: int) -> list[float]:
    """A scalar or (B, 1, ...) tensor as `count` floats."""
    values = value.flatten().tolist()
    return values * count if len(values) == 1 else values


Number = float | torch.Tensor
# What x is multiplied by, 1 / scale; scale, or None; lowest and highest q - z.
Step = tuple[Number, Number | None, Number, Number]


def fake_quantize_shared(
    x: torch.Tensor, step: Step, channel_dim: int = -1, inplace: bool = False
) -> torch.Tensor:
    """fake_quantize of a batch that shares its timestep, the same bit by bit, but for factors.

    step: numbers, 0-d tensors, which multiply sooner than numbers, or a tensor for each channel,
    shaped to broadcast against the end of x, where two quantizers share the channels or factors of
    the channels are in the first, rounded once; without a scale the result is q - z. inplace: x may
    be overwritten.
    """
    if x.numel() <= BLOCK or x.device.type != "cpu" or x.dim() < 2:
        return _chain(x, step, x if inplace else None)
    out = x if inplace else torch.empty_like(x)
    for piece, target in zip(_pieces(x, channel_dim), _pieces(out, channel_dim), strict=True):
        _chain(piece, step, target)
    return out


def _chain(x: torch.Tensor, step: Step, out: torch.Tensor | None) -> torch.Tensor:
    multiplier, scale, low, high = step
    q = torch.mul(x, multiplier, out=out).round_().clamp_(low, high)
    return q if scale is None else q.mul_(scale)


BLOCK = 1 << 18  # values (1 MB) that stay in the cache from one pass to the next


def _pieces(x: torch.Tensor, channel_dim: int) -> Sequence[torch.Tensor]:
    """Views of about BLOCK values that cover x, whole in their channels."""
    count = -(-x.numel() // BLOCK)
    samples = min(count, len(x))
    inner = x.dim() - 2 if channel_dim == -1 else 2
    return [v for part in x.chunk(samples) for v in part.chunk(-(-count // samples), inner)]


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
        x_rows = _rows(x)
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
    bounds = zip(_per_row(low, len(x)), _per_row(high, len(x)), strict=True)
    for g, v, q, out, (a, b) in zip(*map(_rows, (grad, x, x_hat, grad_x)), bounds, strict=True):
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


def range_to_scale(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (float holding an integer) of the range [low, high] made to contain 0.

    symmetric: z is the middle code 2^(b-1) and the range is that of the larger side.
    Degenerate ranges get the smallest scale instead of zero.
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(high / (top // 2), -low / (top // 2 + 1)).clamp(min=SMALLEST_SCALE)
        return scale, torch.full_like(scale, top // 2 + 1)
    scale = ((high - low) / top).clamp(min=SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(0, top)


def rate_of_scale(lr: float, bits: int) -> float:
    """Learning rate of a log-scale. lr is that of 4 bits: each bit more halves the change of the
    range that moves an outer value by one code."""
    return lr * 2.0 ** (4 - bits)


class ActivationQuantizer(nn.Module):
    """Deployed per-tensor activation quantizer: G scales, chosen by the timestep's group.

    bits: of its codes; group_bits (G,): of each group, where some have fewer (precision.py).
    Buffers: scale float32 (G,), zero_point int32 (G,), group_bits uint8 (G,), group_of_bin uint8
    (S,).
    """

    def __init__(
        self,
        context: TimestepContext,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_of_bin: torch.Tensor,
        bits: int,
        group_bits: torch.Tensor | None = None,
    ):
        super().__init__()
        self.context, self.bits = context, bits
        if group_bits is None:
            group_bits = torch.full(zero_point.shape, bits, device=zero_point.device)
        self.register_buffer("group_bits", group_bits.to(torch.uint8))
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        self.register_buffer("group_of_bin", group_of_bin.to(torch.uint8))
        self._groups = [int(g) for g in self.group_of_bin]  # look-ups without a tensor per call
        self._forget()

    def _forget(self) -> None:
        """What is made from the buffers, per group: see step, and the step without a scale."""
        self._steps: list[tuple[float, float, int, int]] | None = None
        self._shared: list[Step] = []

    def step(self, index: int) -> tuple[float, float, int, int]:
        """1 / scale, scale, and the lowest and highest code minus z, of a bin of timesteps."""
        if self._steps is None:
            tops = [2**bits - 1 for bits in self.group_bits.tolist()]
            inverse = self.scale.reciprocal().tolist()  # rounded to float32 as in fake_quantize
            zero_points = self.zero_point.tolist()
            highest = [top - z for top, z in zip(tops, zero_points, strict=True)]
            ends = [-z for z in zero_points], highest
            self._steps = list(zip(inverse, self.scale.tolist(), *ends, strict=True))
            inverses = self.scale.reciprocal()  # 0-d tensors multiply sooner than numbers
            self._shared = [(v, None, *k) for v, *k in zip(inverses, *ends, strict=True)]
        return self._steps[self._groups[index]]

    def _apply(self, fn: Callable, recurse: bool = True) -> "ActivationQuantizer":
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    def current(self, dims: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, zero point and highest code of the current timestep: 0-d, or (B, 1, ...) of
        `dims` axes."""
        bins = self.context.bins
        one = isinstance(bins, int)
        group = self._groups[bins] if one else self.group_of_bin[bins].long()
        shape = () if one else (-1,) + (1,) * (dims - 1)
        top = 2 ** self.group_bits[group].int() - 1
        return tuple(v.view(shape) for v in (self.scale[group], self.zero_point[group], top))

    def shared(
        self, x: torch.Tensor, index: int, inplace: bool = False
    ) -> tuple[torch.Tensor, float]:
        """For a bin of timesteps, two whose product is the quantized x: q - z and the scale."""
        scale = self.step(index)[1]
        step = self._shared[self._groups[index]]
        return fake_quantize_shared(x, step, inplace=inplace), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bins = self.context.bins
        if isinstance(bins, int):
            return fake_quantize_shared(x, self.step(bins))
        scale, zero_point, top = self.current(x.dim())
        return fake_quantize(x, scale, zero_point.to(x.dtype), top.to(x.dtype))


class LearnedQuantizer(nn.Module):
    """Activation quantizer under calibration: learnable log-scale and zero point per group.

    During the search (search.py) every calibrated timestep also holds a softmax over the groups,
    and the output is the mixture of the two likeliest quantizers.
    """

    def __init__(self, context: TimestepContext, bits: int, symmetric: bool, unsigned: bool):
        super().__init__()
        self.context, self.bits = context, bits
        self.symmetric, self.unsigned = symmetric, unsigned
        self.enabled = True
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=not (symmetric or unsigned))
        self.register_buffer("group_of_bin", torch.zeros(len(context.timesteps), dtype=torch.long))
        self.register_buffer("group_bits", None)  # (G,) where some have fewer (precision.py)
        # Error of each bin under each group's range, relative to the bin's best; until the search.
        self.register_buffer("group_error", None)  # (S, G)
        self.logits: nn.Parameter | None = None  # (S, G) during the search
        self.temperature = 1.0

    @property
    def groups(self) -> int:
        return len(self.log_scale)

    def set_ranges(self, low: torch.Tensor, high: torch.Tensor, group_of_bin: torch.Tensor) -> None:
        """low, high (G,): ranges of the groups; group_of_bin (S,): the group of each bin."""
        scale, zero_point = range_to_scale(low, high, self.bits, self.symmetric)
        if self.unsigned:
            zero_point = torch.zeros_like(zero_point)
        device = self.log_scale.device
        self.log_scale = nn.Parameter(scale.float().log().to(device))
        self.zero_point = nn.Parameter(
            zero_point.float().to(device), requires_grad=self.zero_point.requires_grad
        )
        self.group_of_bin = group_of_bin.long().to(device)

    def _integral_zero_point(self) -> torch.Tensor:
        return round_ste(self.zero_point.clamp(0, 2**self.bits - 1))

    def _quantize(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        shape = () if group.dim() == 0 else (-1,) + (1,) * (x.dim() - 1)
        scale = self.log_scale.exp()[group].reshape(shape)
        zero_point = self._integral_zero_point()[group].reshape(shape)
        top: int | torch.Tensor = 2**self.bits - 1
        if self.group_bits is not None:
            top = (2 ** self.group_bits[group].to(x.dtype) - 1).reshape(shape)
        return _LearnedFakeQuantize.apply(x, scale, zero_point, top)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return x
        bins = torch.as_tensor(self.context.bins, device=x.device)
        if self.logits is None:
            return self._quantize(x, self.group_of_bin[bins])
        weights = torch.softmax(self.logits[bins] / self.temperature, dim=-1)  # (..., G)
        best, group = weights.topk(min(2, self.groups), dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        shape = () if bins.dim() == 0 else (-1,) + (1,) * (x.dim() - 1)
        return sum(
            best[..., i].reshape(shape) * self._quantize(x, group[..., i])
            for i in range(best.shape[-1])
        )

    def deploy(self) -> ActivationQuantizer:
        scale = self.log_scale.exp().clamp(min=SMALLEST_SCALE)
        return ActivationQuantizer(
            self.context,
            scale,
            self._integral_zero_point().round(),
            self.group_of_bin,
            self.bits,
            self.group_bits,
        )


def scale_groups(quantizers: list[LearnedQuantizer], lr: float) -> list[dict]:
    """Optimizer groups of the quantizers' log-scales; lr as in rate_of_scale."""
    by_bits: dict[int, list[nn.Parameter]] = {}
    for q in quantizers:
        by_bits.setdefault(q.bits, []).append(q.log_scale)
    return [{"params": v, "lr": rate_of_scale(lr, bits)} for bits, v in sorted(by_bits.items())]

"""Uniform quantizers.

    q = clamp(round(x / s) + z, 0, 2^b - 1),    x_hat = s (q - z)

Legend: B batch, G groups of timesteps, S calibrated timesteps (bins), O output channels.
"""

import torch
from torch import nn

from quant.context import TimestepContext

SMALLEST_SCALE = 1e-8


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, top: int
) -> torch.Tensor:
    """Quantize and dequantize; scale and zero_point broadcast against x, top = 2^b - 1.

    Three passes over one new buffer: the clamp works on q - z, which saves adding and removing z.
    """
    q = torch.mul(x, scale.reciprocal()).round_()
    return torch.clamp(q, -zero_point, top - zero_point).mul_(scale)


class _LearnedFakeQuantize(torch.autograd.Function):
    """fake_quantize with straight-through gradients for x, LSQ gradients for scale and zero_point.

    Nothing but x is kept for the backward pass. Inside the range the gradient of the scale is
    round(x/s) - x/s, outside it is the clamped integer (Esser et al. 2020); the gradient of the
    zero point is -s where x is clipped (Bhalgat et al. 2020).
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, top):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.top = top
        return fake_quantize(x, scale, zero_point, top)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        v = torch.mul(x, scale.reciprocal())
        rounded = v.round()
        q = torch.clamp(rounded, -zero_point, ctx.top - zero_point)
        inside = q == rounded
        grad_x = grad * inside
        grad_scale = _sum_like(q.sub_(v.mul_(inside)).mul_(grad), scale)
        grad_zero = _sum_like((grad - grad_x).mul_(scale).neg_(), zero_point)
        return grad_x, grad_scale, grad_zero, None


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


class ActivationQuantizer(nn.Module):
    """Deployed per-tensor activation quantizer: G scales, chosen by the timestep's group.

    Buffers: scale float32 (G,), zero_point int32 (G,), group_of_bin uint8 (S,).
    """

    def __init__(
        self,
        context: TimestepContext,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_of_bin: torch.Tensor,
        bits: int,
    ):
        super().__init__()
        self.context, self.bits = context, bits
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        self.register_buffer("group_of_bin", group_of_bin.to(torch.uint8))
        self._groups = [int(g) for g in self.group_of_bin]  # look-ups without a tensor per call

    def current(self, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the current timestep: 0-d, or (B, 1, ...) of `dims` axes."""
        bins = self.context.bins
        if isinstance(bins, int):
            group = self._groups[bins]
            return self.scale[group], self.zero_point[group]
        group = self.group_of_bin[bins].long()
        shape = (-1,) + (1,) * (dims - 1)
        return self.scale[group].view(shape), self.zero_point[group].view(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero_point = self.current(x.dim())
        return fake_quantize(x, scale, zero_point.to(x.dtype), 2**self.bits - 1)


class LearnedQuantizer(nn.Module):
    """Activation quantizer under calibration: learnable log-scale and zero point per group.

    With `start_search` every calibrated timestep also holds a softmax over the groups, and the
    output is the mixture of the two likeliest quantizers (see grouping.py).
    """

    def __init__(self, context: TimestepContext, bits: int, symmetric: bool, unsigned: bool):
        super().__init__()
        self.context, self.bits = context, bits
        self.symmetric, self.unsigned = symmetric, unsigned
        self.enabled = True
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=not (symmetric or unsigned))
        self.register_buffer("group_of_bin", torch.zeros(len(context.timesteps), dtype=torch.long))
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
        return _LearnedFakeQuantize.apply(x, scale, zero_point, 2**self.bits - 1)

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
        )

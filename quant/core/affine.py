"""The affine quantization that everything here shares, and its one definition.

    q = clamp(round(x / s) + z, 0, 2^b - 1),    x_hat = s (q - z)

with scale s, zero point z and b bits (docs/method.md, section 1). The clamp works on q - z, which
saves adding and removing z. Weights are divided by their scale, activations multiplied by its
reciprocal, which is faster; the two round differently in rare cases, so each operand keeps to one.

Legend: B batch, O output channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

SMALLEST_SCALE = 1e-8


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, top: int | torch.Tensor
) -> torch.Tensor:
    """Quantize and dequantize x (B, ...); scale, zero_point and top = 2^b - 1 broadcast against it.

    On a CPU large samples are computed one by one, so that a sample stays in the cache between the
    passes; the result is the same bit by bit.
    """
    inverse, low, high = scale.reciprocal(), -zero_point, top - zero_point
    rows = sample_rows(x)
    if rows is None:
        return torch.clamp(torch.mul(x, inverse).round_(), low, high).mul_(scale)
    out = torch.empty_like(x)
    out_rows = sample_rows(out)
    assert out_rows is not None  # out has the layout of x
    parts = zip(
        rows,
        out_rows,
        *(numbers_per_sample(v, len(x)) for v in (inverse, low, high, scale)),
        strict=True,
    )
    for row, out_row, i, a, b, s in parts:
        torch.mul(row, i, out=out_row).round_().clamp_(a, b).mul_(s)
    return out


SAMPLE_BY_SAMPLE = 12000  # values per sample; below, one pass over the batch is faster


def sample_rows(x: torch.Tensor) -> torch.Tensor | None:
    """x (B, ...) as a view (B, N) in the order of its memory; None where rows do not pay."""
    if x.device.type != "cpu" or x.dim() < 2 or x.numel() < SAMPLE_BY_SAMPLE * len(x):
        return None
    if x.is_contiguous():
        return x.view(len(x), -1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(len(x), -1)
    return None


def numbers_per_sample(value: torch.Tensor, count: int) -> list[float]:
    """A scalar or (B, 1, ...) tensor as `count` floats."""
    values = value.flatten().tolist()
    return values * count if len(values) == 1 else values


Number = float | torch.Tensor


class QuantizerStep(NamedTuple):
    """A quantizer at one timestep, as every kernel takes it, from PyTorch to C++.

    inverse: what x is multiplied by, 1 / scale; low, high: lowest and highest q - z.
    """

    inverse: float
    scale: float
    low: float
    high: float

    @property
    def zero_point(self) -> int:
        """The code of 0."""
        return int(-self.low)

    @property
    def top(self) -> int:
        """The highest code, 2^b - 1."""
        return int(self.high - self.low)


class BroadcastStep(NamedTuple):
    """A QuantizerStep whose values may be numbers, 0-d tensors or tensors of one value a channel.

    inverse: may hold the factors of the channels as well; scale: None where the result stays q - z;
    low, high: both numbers or both tensors.
    """

    inverse: Number
    scale: Number | None
    low: Number
    high: Number


def fake_quantize_shared(
    x: torch.Tensor,
    step: QuantizerStep | BroadcastStep,
    channel_dim: int = -1,
    inplace: bool = False,
) -> torch.Tensor:
    """fake_quantize of a batch x (B, ...) that shares its timestep; without a scale, q - z.

    step: of numbers, or of 0-d tensors, which multiply faster. Where two quantizers share the
    channels, or the inverse holds factors of the channels, its values are tensors that broadcast
    against the end of x. The result is that of fake_quantize bit by bit, except with factors: they
    are multiplied into the inverse, and so x is rounded once less. inplace: x may be overwritten.
    """
    if x.numel() <= CACHED_VALUES or x.device.type != "cpu" or x.dim() < 2:
        return _chain(x, step, x if inplace else None)
    out = x if inplace else torch.empty_like(x)
    for piece, target in zip(_pieces(x, channel_dim), _pieces(out, channel_dim), strict=True):
        _chain(piece, step, target)
    return out


def _chain(
    x: torch.Tensor, step: QuantizerStep | BroadcastStep, out: torch.Tensor | None
) -> torch.Tensor:
    inverse, scale, low, high = step
    # PyTorch declares clamp_ for two numbers and for two tensors, not for "two of either kind".
    q = torch.mul(x, inverse, out=out).round_().clamp_(low, high)  # type: ignore[arg-type]
    return q if scale is None else q.mul_(scale)


CACHED_VALUES = 1 << 18  # values (1 MB) that stay in the cache from one pass to the next


def _pieces(x: torch.Tensor, channel_dim: int) -> Sequence[torch.Tensor]:
    """Views of about CACHED_VALUES values that cover x, whole in their channels."""
    count = -(-x.numel() // CACHED_VALUES)
    samples = min(count, len(x))
    inner = x.dim() - 2 if channel_dim == -1 else 2
    return [v for part in x.chunk(samples) for v in part.chunk(-(-count // samples), inner)]


def range_to_scale(
    low: torch.Tensor, high: torch.Tensor, bits: int | torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (float holding an integer) of the range [low, high] made to contain 0.

    bits: one number, or one for each range. symmetric: z is the middle code 2^(b-1) and the range
    is that of the larger side.
    Degenerate ranges get the smallest scale instead of zero.
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(high / (top // 2), -low / (top // 2 + 1)).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale) + (top // 2 + 1)
    scale = ((high - low) / top).clamp(min=SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(min=0).clamp(max=top)


def per_channel(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(O,) -> (O, 1, ...) to broadcast against the weight."""
    return value.view(-1, *(1,) * (weight.dim() - 1))


def round_to_nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> torch.Tensor:
    """Integer codes 0..2^b-1 as floats, shaped like the weight."""
    q = (weight / per_channel(scale, weight)).round_().add_(per_channel(zero_point, weight))
    return q.clamp_(0, 2**bits - 1)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """s (q - z), float32, from codes of any dtype."""
    return (q.float() - per_channel(zero_point, q)) * per_channel(scale, q)

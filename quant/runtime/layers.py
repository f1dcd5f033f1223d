"""Deployed layers: integer buffers, run as integers in floating point ("fake" quantization).

A layer computes y = conv(Q(x), W_hat) + b with the per-tensor activation quantizer of the current
timestep. A layer behind a skip concatenation has two of them, one for each part of its input.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...models.protocols import ModuleList
from ..core.affine import BroadcastStep, dequantize, fake_quantize_shared
from ..core.context import Timestep, TimestepContext
from ..core.operation import Operation, quantize_input, relative_to_row, scale_channels
from .derived import KeepsDerived
from .quantizer import ActivationQuantizer


class SharedStep(NamedTuple):
    """What a deployed layer needs for a batch that shares its timestep.

    step: quantizes the input, factors of the channels included: to q - z where the layer has one
    quantizer, to the dequantized input where it has two. scale: of the output. factor: the same as
    a 0-d tensor, which multiplies faster than a number, or None for 1. bias: divided by the scale.
    """

    step: BroadcastStep
    scale: float
    factor: torch.Tensor | None
    bias: torch.Tensor | None


class QuantLayer(KeepsDerived):
    """A deployed layer: nothing but plain buffers.

    qweight uint8 (O, I, ...) codes 0..2^bits-1, w_scale float32 (O,), w_zero_point uint8 (O,),
    bias float32 (O,) or None; `inputs` are ActivationQuantizers; channel_scale float32 (C,), exact
    in float16, multiplies the input channels before they are quantized, or None.
    """

    qweight: torch.Tensor
    w_scale: torch.Tensor
    w_zero_point: torch.Tensor
    bias: torch.Tensor | None
    channel_scale: torch.Tensor | None

    def __init__(
        self,
        op: Operation,
        qweight: torch.Tensor,
        w_scale: torch.Tensor,
        w_zero_point: torch.Tensor,
        bias: torch.Tensor | None,
        bits: int,
        inputs: list[ActivationQuantizer],
        split: int,
        channel_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        self.op, self.bits, self.split = op, bits, split
        self.register_buffer("channel_scale", channel_scale)
        self.register_buffer("qweight", qweight)
        self.register_buffer("w_scale", w_scale.float())
        self.register_buffer("w_zero_point", w_zero_point)
        self.register_buffer("bias", bias)
        self.inputs: ModuleList[ActivationQuantizer] = ModuleList(inputs)
        self._quantizers = tuple(self.inputs)  # a look-up in a ModuleList takes longer
        self._weight: torch.Tensor | None = None  # dequantized once, not part of the state
        self._steps: dict[tuple[int, ...], SharedStep] = {}  # likewise, see _step

    def contents(self) -> tuple[Any, ...]:
        """What __init__ takes, for a layer of another class with the same buffers."""
        return (
            *(self.op, self.qweight, self.w_scale, self.w_zero_point, self.bias),
            *(self.bits, list(self.inputs), self.split, self.channel_scale),
        )

    @property
    def in_features(self) -> int:
        """Input features of a linear layer, which pipelines of diffusers ask for."""
        return self.op.in_features

    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32 (O, I, ...)."""
        if self._weight is None:
            weight = dequantize(self.qweight, self.w_scale, self.w_zero_point)
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            self._weight = weight
        return self._weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._output(x)

    def after_norm_silu(
        self, norm: nn.Module, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer of silu(norm(x)), + plus. x (B, C, H, W)."""
        return self._output(F.silu(norm(x), inplace=True), plus, inplace=True)

    def _output(
        self, x: torch.Tensor, plus: torch.Tensor | None = None, inplace: bool = False
    ) -> torch.Tensor:
        """The layer of x, + plus; x may be overwritten if inplace.

        With a common timestep the activation's scale multiplies the output, together with the
        addition of plus, and not the input:  plus + s (conv(q - z, w) + b / s). A hook on the first
        quantizer wants to see quantizers called: then they are.
        """
        first = self._quantizers[0] if self._quantizers else None
        if (
            first is None
            or not isinstance(index := first.context.index, int)
            or first._forward_pre_hooks
        ):
            out = self.op(self.quantized_input(x), self.weight(), self.bias)
            return out if plus is None else out + plus
        op = self.op
        step, scale, factor, bias = self._step(index, x.shape[op.channel_dim])
        q = fake_quantize_shared(x, step, op.channel_dim, inplace)
        out = op(q, self.weight(), bias)
        if plus is not None:
            return torch.add(plus, out, alpha=scale, out=out)
        return out if factor is None else out.mul_(factor)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """x quantized and dequantized."""
        if not len(self.inputs):
            return x
        x = scale_channels(x, self.channel_scale, self.op.channel_dim)
        return quantize_input(x, self.inputs, self.split, self.op.channel_dim)

    def _step(self, index: int, channels: int) -> SharedStep:
        """What the layer needs at the calibrated timestep `index`; computed once for each choice of
        its quantizers' groups, of which there are much fewer."""
        groups = tuple([q.group(index) for q in self._quantizers])
        known = self._steps.get(groups)
        if known is not None:
            return known
        device, factors = self.qweight.device, self.channel_scale
        steps = [q.step(index) for q in self.inputs]
        if self.split:
            second = torch.arange(channels, device=device) >= self.split
            values = [torch.where(second, float(b), float(a)) for a, b in zip(*steps, strict=True)]
            if factors is not None:
                values[0] = values[0] * factors
            known = SharedStep(BroadcastStep(*map(self.op.beside, values)), 1.0, None, self.bias)
        else:  # a multiplication by a tensor starts faster than one by a number
            inverse, scale, low, high = steps[0]
            multiplier = torch.full((), inverse, device=device)  # filled there: no copy, no wait
            if factors is not None:
                multiplier = self.op.beside(factors * multiplier)
            factor = torch.full((), scale, device=device)
            bias = None if self.bias is None else self.bias / scale
            known = SharedStep(BroadcastStep(multiplier, None, low, high), scale, factor, bias)
        self._steps[groups] = known
        return known

    def _forget(self) -> None:
        self._weight = None
        self._steps.clear()


class TimestepLayer(nn.Module):
    """A layer whose value depends on the timestep alone: computed once per timestep and kept.

    Wraps a QuantLayer (or, under calibration, a CalibLayer). Its input is never quantized, so that
    the kept value is exact for the stored weights, whatever the schedule. A mixed batch is computed
    afresh.
    """

    keeps_values = True  # false while the weights still learn

    def __init__(self, context: TimestepContext, layer: nn.Module):
        super().__init__()
        self.context, self.layer = context, layer
        self._values: dict[Timestep, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, E) -> (B, O)
        t = self.context.t
        if t is None:
            return self.layer(x)
        if not self.keeps_values:
            return self.layer(x[:1]).expand(x.shape[0], -1)
        value = self._values.get(t)
        if value is None or value.device != x.device:
            # One row: linear layers are not bitwise independent of the batch size.
            value = self._values[t] = self.layer(x[:1])
        return value.expand(x.shape[0], -1)


def attention_product(
    left: nn.Module,
    right: nn.Module,
    by_row: bool,
    index: int | torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The product of both operands, each quantized by its quantizer; see QuantMatMul.

    operands: (B*h, N, K) and (B*h, K, M); a batch of mixed timesteps has an index for each sample.
    """
    a, b = operands
    samples = None if isinstance(index, int) else len(index)  # of a mixed batch
    if samples is not None:
        a, b = (value.unflatten(0, (samples, -1)) for value in (a, b))
    a, top = relative_to_row(a) if by_row else (a, None)
    out = torch.matmul(left(a), right(b))
    out = out if top is None else out * top
    return out if samples is None else out.flatten(0, 1)


class QuantMatMul(nn.Module):
    """A matrix product of attention with both operands quantized, (B*h, N, K) @ (B*h, K, M).

    The h heads of a sample lie beside each other. In a batch of mixed timesteps its scales belong
    to the sample, hence to all of its heads.

    by_row: the left operand, probabilities, is quantized relative to the largest value of each row,
    which multiplies the row of the product afterwards. That is softmax quantized before it is
    normalised: exp(s - max s) always reaches 1, while a probability among K = 256 keys can be as
    small as one code of a scale for all rows. The integer product stays as it is.
    """

    def __init__(self, left: ActivationQuantizer, right: ActivationQuantizer, by_row: bool = False):
        super().__init__()
        self.left, self.right, self.by_row = left, right, by_row

    def left_operand(
        self, left: torch.Tensor, inplace: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the left quantizer sees, and the factor (B, N, 1) of the product's rows. inplace:
        left may be overwritten."""
        return relative_to_row(left, inplace) if self.by_row else (left, None)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        index = self.left.context.index
        if isinstance(index, int) and self._scales_after():
            return self._scaled_after(left, right, index)
        return attention_product(self.left, self.right, self.by_row, index, (left, right))

    def _scales_after(self) -> bool:
        """Whether scales may multiply the product: no hook wants to see the quantizers called."""
        return not self.left._forward_pre_hooks

    def after_softmax(
        self, scores: torch.Tensor, scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scores * scale) @ right."""
        index = self.left.context.index
        probabilities = torch.softmax(scores if scale == 1.0 else scores * scale, dim=-1)
        if isinstance(index, int) and self._scales_after():
            return self._scaled_after(probabilities, right, index, inplace=True)
        return self(probabilities, right)

    def _scaled_after(
        self, left: torch.Tensor, right: torch.Tensor, index: int, inplace: bool = False
    ) -> torch.Tensor:
        """The product with one common timestep, whose scales multiply it. inplace: left may be
        overwritten."""
        left, top = self.left_operand(left, inplace)
        q, scale = self.left.shared(left, index, inplace=inplace or self.by_row)
        k, right_scale = self.right.shared(right, index)
        nothing = q.new_empty(1)  # multiplied by beta = 0
        out = torch.baddbmm(nothing, q, k, beta=0, alpha=scale * right_scale)
        return out if top is None else out.mul_(top)

"""Fake quantization on the tensor cores of a card, exactly: integers in TF32.

    named = use_tensor_cores(model)     # in place; {name: why this layer stays in float32}

TF32 keeps 11 significant bits of an operand. It rounds a dequantized weight, but holds the integers
of a layer, q - z of its input and of its weight, as they are; their products are added in float32,
which is exact as long as no partial sum reaches 2^24. The scales multiply the output:

    y = s_x s_w[o] (sum_k w (q - z)) + b

as many launches as with dequantized weights. Where that bound does not hold, a layer stays as it
is. Products of attention multiply integers anyway: they use TF32 where they are so short that the
bound holds for any codes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core.affine import fake_quantize_shared, per_channel
from ..runtime.denoiser import QuantDenoiser, replace_module
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer

EXACT_SUM = 2**24  # below, float32 holds every integer
EXACT_OPERAND = 2**11  # TF32: up to here


class IntegerProductLayer(QuantLayer):
    """A QuantLayer of one input that multiplies integers, with TF32 allowed; replaces one without
    `float32_reason`. A batch of mixed timesteps, or a hook on its quantizer, is as before."""

    def __init__(self, layer: QuantLayer):
        super().__init__(*layer.contents())
        self._integers: torch.Tensor | None = None  # likewise not part of the state
        self._scales: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def integers(self) -> torch.Tensor:
        """The weight's codes - zero point, float32 (O, I, ...)."""
        if self._integers is None:
            weight = integer_weight(self)
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            self._integers = weight
        return self._integers

    def _output(
        self, x: torch.Tensor, plus: torch.Tensor | None = None, inplace: bool = False
    ) -> torch.Tensor:
        first = self._quantizers[0]
        index = first.context.index
        if not isinstance(index, int) or first._forward_pre_hooks:
            with allow_tf32(False):
                return super()._output(x, plus, inplace)
        step = self._step(index, x.shape[self.op.channel_dim]).step
        q = fake_quantize_shared(x, step, self.op.channel_dim, inplace)
        scale, bias = self._scales_of(index)
        with allow_tf32(True):
            sums = self.op(q, self.integers(), bias)
        return sums.mul_(scale) if plus is None else torch.addcmul(plus, sums, scale)

    def _scales_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s_x s_w beside the output's channels, and the bias divided by it. Kept."""
        group = self._quantizers[0].group(index)
        known = self._scales.get(group)
        if known is None:
            scale = self.w_scale * self._quantizers[0].step(index).scale
            bias = None if self.bias is None else self.bias / scale
            known = self._scales[group] = self.op.beside(scale), bias
        return known

    def _forget(self) -> None:
        super()._forget()
        self._integers, self._scales = None, {}


class IntegerProductMatMul(QuantMatMul):
    """A QuantMatMul with TF32 allowed where no sum can reach 2^24: over 257 products of 8-bit codes
    at most. A batch of mixed timesteps is as before."""

    def __init__(self, product: QuantMatMul):
        super().__init__(product.left, product.right, product.by_row)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        with allow_tf32(False):
            return super().forward(left, right)

    def _scaled_after(
        self, left: torch.Tensor, right: torch.Tensor, index: int, inplace: bool = False
    ) -> torch.Tensor:
        largest = [max(-s.low, s.high) for s in (self.left.step(index), self.right.step(index))]
        exact = max(largest) <= EXACT_OPERAND
        exact = exact and left.shape[-1] * largest[0] * largest[1] < EXACT_SUM
        with allow_tf32(exact):
            return super()._scaled_after(left, right, index, inplace)


def use_tensor_cores(model: QuantDenoiser) -> dict[str, str]:
    """Replaces, in place, the layers of a deployed model that are exact in TF32, and the products
    of attention, which look at their lengths. The other layers -> why not; those of the timestep
    are not listed, which run in float32 once per timestep."""
    named = {}
    for name, module in list(model.denoiser.named_modules()):
        if isinstance(module, QuantMatMul):
            replace_module(model.denoiser, name, IntegerProductMatMul(module))
        if not isinstance(module, QuantLayer):
            continue
        if isinstance(model.denoiser.get_submodule(name.rpartition(".")[0]), TimestepLayer):
            continue
        reason = float32_reason(module)
        if reason is None:
            replace_module(model.denoiser, name, IntegerProductLayer(module))
        else:
            named[name] = reason
    return named


def float32_reason(layer: QuantLayer) -> str | None:
    """Why a layer is not exact in TF32."""
    if len(layer.inputs) != 1:
        return "its inputs have two scales" if layer.inputs else "its input is not quantized"
    indices = range(len(layer.inputs[0].group_of_timestep))
    steps = {layer.inputs[0].step(i) for i in indices}
    if max(max(-step.low, step.high) for step in steps) > EXACT_OPERAND:
        return f"its input has {layer.inputs[0].bits} bits"
    total = max(largest_sum(layer, step.low, step.high) for step in steps)
    return f"a sum could reach {total}" if total >= EXACT_SUM else None


def largest_sum(layer: QuantLayer, low: float, high: float) -> int:
    """What the sums of a layer, and the parts of them in any order, cannot exceed, for an input
    between low and high, which have 0 between them."""
    weight = integer_weight(layer).flatten(1).double()
    positive, negative = weight.clamp(min=0).sum(1), -weight.clamp(max=0).sum(1)
    above, below = positive * high - negative * low, negative * high - positive * low
    return int(torch.maximum(above, below).max())


def integer_weight(layer: QuantLayer) -> torch.Tensor:
    """Codes - zero point, float32, shaped like the weight."""
    return layer.qweight.float() - per_channel(layer.w_zero_point, layer.qweight)


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Whether convolutions and matrix products use TF32 in this block, on devices that have it."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before

"""Layers that execute on oneDNN's int8 operators (x86 CPU), through stock PyTorch.

    y = s_x s_w[o] * (sum q_w (q_x - z_x)) + b        q_x uint8, q_w int8, the sum in int32

The activation's scale and zero point are arguments of each call, so that one integer weight serves
all groups of timesteps. The results equal those of layers.py up to float rounding.

Without AVX512-VNNI the kernels add two products at a time in 16 bits and saturate. Since
2 * 255 * 64 < 2^15, weights within -64..64 (all up to 6 bits) are exact there as well; others go as
a sum of two.

Legend: B batch, C/O in/out channels, G groups of timesteps.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...models.protocols import ModuleList
from ..core.affine import QuantizerStep, dequantize, per_channel
from ..core.operation import Operation, scale_channels
from ..runtime.derived import KeepsDerived
from ..runtime.layers import QuantLayer, QuantMatMul
from ..runtime.quantizer import ActivationQuantizer
from .native import Compiled, pixel_stride
from .prepared import BlockedWeight

LARGEST_KEPT_WEIGHT = 1 << 18  # values (1 MB) of a weight up to which a float copy is kept
LARGEST_UNSATURATED = 64  # largest |q_w| of which two products with 0..255 fit 16 bits
ROUNDING_OFFSET = (
    12582912.0  # 1.5 * 2^23: adding it rounds to even and leaves the integer in the low bits
)


def shifted_codes(x: torch.Tensor, step: QuantizerStep) -> torch.Tensor:
    """int32 in the layout of x, whose low 16 bits are clamp(round(x / s) + z, 0, top) - z.

    Two passes fewer than rounding and converting one by one, and the same result bit by bit.
    """
    low, high = ROUNDING_OFFSET + step.low, ROUNDING_OFFSET + step.high
    q = torch.mul(x, step.inverse).add_(ROUNDING_OFFSET).clamp_(low, high)
    return q.view(torch.int32)


class CodeQuantizer(ActivationQuantizer):
    """An ActivationQuantizer that can also give the codes themselves, for one shared timestep."""

    def __init__(self, quantizer: ActivationQuantizer):
        super().__init__(
            quantizer.context,
            quantizer.scale,
            quantizer.zero_point,
            quantizer.group_of_timestep,
            quantizer.group_bits,
        )

    def codes(self, x: torch.Tensor, index: int) -> list[tuple[torch.Tensor, float, int]]:
        """uint8 codes shaped like x, their scale and their zero point, for a calibrated timestep.

        More than 8 bits give two, of the low and the high byte: s (q - z) is the sum of both.
        """
        step = self.step(index)
        scale, zero_point = step.scale, step.zero_point
        q = shifted_codes(x, step)
        if step.top < 256:
            return [(q.to(torch.uint8).add_(zero_point), scale, zero_point)]
        q.add_(zero_point)
        low, high = q.to(torch.uint8), q.bitwise_right_shift_(8).to(torch.uint8)
        return [(low, scale, zero_point & 255), (high, scale * 256, zero_point >> 8)]


class IntegerWeight(nn.Module):
    """One int8 weight: plain, or in oneDNN's packed form for one input shape, never both.

    Buffers: codes int8 (O, C, kh, kw) or (O, C), empty while packed; scale float32 (O,).
    The packed form can be neither saved nor copied: state_dict, pickle, deepcopy, `.to` and
    load_state_dict restore the plain one first, and the next call packs again.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor
    geometry: list[Any]  # of a convolution: stride, padding, dilation, groups

    def __init__(self, op: Operation, codes: torch.Tensor, scale: torch.Tensor, vnni: bool):
        super().__init__()
        self.op, self.vnni = op, vnni
        self.in_channels = codes.shape[1] * (op.groups if op.is_conv else 1)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int32), persistent=False)
        if op.is_conv:
            self.geometry = [pair(v) for v in (op.stride, op.padding, op.dilation)] + [op.groups]
            if op.kind == "Conv1d":  # a unit height
                self.geometry[1][0] = 0
        self._packed: list[torch.Tensor] = []  # the summands of the weight
        self._shape: tuple[int, ...] | None = None

    def unpack(self) -> None:
        """Back to the plain form."""
        if self._packed:
            codes = cast(torch.Tensor, sum(packed.to_dense() for packed in self._packed))
            self.codes = codes.contiguous() if self.op.is_conv else codes.t().contiguous()
            self._packed, self._shape = [], None

    def _pack(self, shape: tuple[int, ...]) -> None:
        self.unpack()
        for codes in self._summands():
            if self.op.is_conv:
                packed = torch.ops.onednn.qconv_prepack(
                    codes, self.scale, 1.0, 0, *self.geometry, list(shape)
                )
            else:
                packed = torch.ops.onednn.qlinear_prepack(codes, list(shape))
            self._packed.append(packed)
        self.codes, self._shape = self.codes.new_empty(0), shape

    def _summands(self) -> list[torch.Tensor]:
        """The codes as one tensor, or as the sum of two that cannot saturate."""
        codes = self.codes.contiguous()
        if self.vnni or (
            codes.amin() >= -LARGEST_UNSATURATED and codes.amax() <= LARGEST_UNSATURATED
        ):
            return [codes]
        half = codes >> 1
        return [half, codes - half]

    def forward(
        self, q: torch.Tensor, scale: float, zero_point: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """q: uint8 input of the layer, (B, C, H, W) or (..., C) -> float32."""
        if q.shape != self._shape:
            self._pack(q.shape)
        out = self._product(self._packed[0], q, scale, zero_point, bias)
        for packed in self._packed[1:]:
            out.add_(self._product(packed, q, scale, zero_point, None))
        return out

    def _product(
        self,
        packed: torch.Tensor,
        q: torch.Tensor,
        scale: float,
        zero_point: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        given = (q, scale, zero_point, packed, self.scale, self.zeros, bias)
        if self.op.is_conv:
            return torch.ops.onednn.qconv_pointwise(
                *given, *self.geometry, 1.0, 0, torch.float32, "none", [], ""
            )
        return torch.ops.onednn.qlinear_pointwise(*given, 1.0, 0, torch.float32, "none", [], "")

    def _apply(self, fn: Callable, recurse: bool = True) -> "IntegerWeight":
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return super().__getstate__()


def pair(value: int | str | tuple[int, ...]) -> list[int]:
    """A stride, dilation or padding as one of two dimensions. A height that it lacks is 1, which
    the caller corrects for a padding.

    Raises ValueError for a padding by name, which selection.py leaves simulated."""
    if isinstance(value, str):
        raise ValueError(f"padding '{value}' is not a number of pixels")
    values = [value] if isinstance(value, int) else list(value)
    return values if len(values) == 2 else [1, *values]


class Int8Layer(KeepsDerived):
    """A convolution or linear layer in integers; replaces a QuantLayer. vnni: may rely on
    AVX512-VNNI.

    Behind a skip concatenation there are two quantizers and two weights, one for each part of the
    input channels; the two products are added in floating point. compiled, or None, quantizes the
    inputs of convolutions to 8 bits in one pass.
    """

    bias: torch.Tensor | None
    channel_scale: torch.Tensor | None
    weights: "ModuleList[IntegerWeight | BlockedWeight]"

    def __init__(self, layer: QuantLayer, vnni: bool = True, compiled: Compiled | None = None):
        super().__init__()
        self.compiled = compiled
        self.op, self.split, self.bits = layer.op, layer.split, layer.bits
        self.inputs: ModuleList[CodeQuantizer] = ModuleList(CodeQuantizer(q) for q in layer.inputs)
        codes = integer_codes(layer)
        if self.op.kind == "Conv1d":
            codes = codes.unsqueeze(2)
        parts = [codes[:, : self.split], codes[:, self.split :]] if self.split else [codes]
        self.vnni = vnni
        self.weights = ModuleList(self._weight(p, layer.w_scale) for p in parts)
        self.register_buffer("bias", layer.bias)
        self.register_buffer("channel_scale", layer.channel_scale)
        self._factors: list[torch.Tensor] | None = None  # of each part's channels, see factors

    def _weight(self, codes: torch.Tensor, scale: torch.Tensor) -> IntegerWeight | BlockedWeight:
        """The weight of one part of the input channels; codes int8 (O, C, ...), those of a Conv1d
        with a unit height."""
        return IntegerWeight(self.op, codes, scale, self.vnni)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = self.inputs[0].context.index
        if isinstance(index, int):
            return self._shared(x, index)
        rows = [(index == b).nonzero().flatten() for b in index.unique()]  # of a mixed batch
        parts = [self._shared(x[r], int(index[r[0]])) for r in rows]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def after_norm_silu(
        self, norm: nn.GroupNorm, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer of silu(norm(x)), + plus. x (B, C, H, W)."""
        first, compiled = self.inputs[0], self.compiled
        index = first.context.index
        whole = not self.split and self.op.kind == "Conv2d" and first.bits <= 8
        if whole and isinstance(index, int) and compiled is not None:
            if pixel_stride(x) == x.shape[1]:
                return self._of_norm(compiled, norm, x, index, plus)
        out = self(F.silu(norm(x), inplace=True))
        return out if plus is None else out + plus

    def _of_norm(
        self,
        compiled: Compiled,
        norm: nn.GroupNorm,
        x: torch.Tensor,
        index: int,
        plus: torch.Tensor | None,
    ) -> torch.Tensor:
        (factors,), quantizer = self.factors(), self.inputs[0]
        (codes,) = compiled.norm_silu_codes(x, norm, factors, quantizer.step(index))
        out = self.weights[0](*codes, self.bias)
        return out if plus is None else out.add_(plus)

    def factors(self) -> list[torch.Tensor]:
        """float32 (C,) of each part of the input channels: channel_scale, or ones. Kept."""
        if self._factors is None:
            first = self.inputs[0].scale
            counts = [weight.in_channels for weight in self.weights]
            scale = (
                first.new_ones(sum(counts)) if self.channel_scale is None else self.channel_scale
            )
            self._factors = [part.contiguous() for part in scale.split(counts)]
        return self._factors

    def _forget(self) -> None:
        """What was made of the buffers, which are about to change."""
        self._factors = None

    def _codes(
        self, x: torch.Tensor, part: int, index: int
    ) -> list[tuple[torch.Tensor, float, int]]:
        """See CodeQuantizer.codes. x: a part of the input channels, not yet scaled."""
        quantizer, compiled = self.inputs[part], self.compiled
        one_pass = self.op.is_conv and quantizer.bits <= 8
        if one_pass and compiled is not None and pixel_stride(x) is not None:
            return compiled.codes(x, self.factors()[part], quantizer.step(index))
        if self.channel_scale is not None:
            x = scale_channels(x, self.factors()[part], self.op.channel_dim)
        return quantizer.codes(x, index)

    def _shared(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """All rows share one calibrated timestep."""
        if self.op.kind == "Conv1d":
            return self._product(x.unsqueeze(2), index).squeeze(2)
        return self._product(x, index)

    def _product(self, x: torch.Tensor, index: int) -> torch.Tensor:
        parts = [x]
        if self.split:
            dim = self.op.channel_dim
            parts = x.split([self.split, x.shape[dim] - self.split], dim=dim)
        out: Any = None  # a tensor from the first product on
        for i, (part, weight) in enumerate(zip(parts, self.weights, strict=True)):
            for codes in self._codes(part, i, index):
                if out is None:
                    out = weight(*codes, self.bias)
                else:
                    out.add_(weight(*codes, None))
        return out


class Int8MatMul(QuantMatMul):
    """A matrix product of attention in integers, (B, N, K) @ (B, K, M); replaces a QuantMatMul.

    Both operands are int8, codes - z, where that fits (the right one must, see `fits_int8`); else
    the left one is uint8 codes, and z times the right's column sums is subtracted. One matrix after
    the other, so that all but the result stays in the cache. Mixed batches are left to the
    fake quantization.
    """

    def __init__(self, product: QuantMatMul):
        left, right = CodeQuantizer(product.left), CodeQuantizer(product.right)
        super().__init__(left, right, product.by_row)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        index = self.left.context.index
        if not isinstance(index, int):
            return super().forward(left, right)
        return self._shared(left, right, index)

    def _scales_after(self) -> bool:
        return False  # of the fake product alone

    def _shared(self, left: torch.Tensor, right: torch.Tensor, index: int) -> torch.Tensor:
        """All rows share one calibrated timestep."""
        left, factor = self.left_operand(left)
        step, right_step = self.left.step(index), self.right.step(index)
        z, scale = step.zero_point, step.scale * right_step.scale
        k = shifted_codes(right, right_step).to(torch.int8)
        out = torch.empty(*left.shape[:-1], right.shape[-1])
        total = torch.empty(out.shape[1:], dtype=torch.int32)
        signed = z <= 128 and step.high <= 127
        for i, result in enumerate(out):
            q = shifted_codes(left[i], step)
            q = q.to(torch.int8) if signed else q.to(torch.uint8).add_(z)
            torch._int_mm(q, k[i], out=total)
            if z and not signed:
                total.sub_(k[i].sum(0, dtype=torch.int32), alpha=z)
            torch.mul(total, scale, out=result)
        return out if factor is None else out.mul_(factor)


def fits_int8(quantizer: ActivationQuantizer) -> bool:
    """Whether codes - z lies within -128..127 for every group."""
    z = quantizer.zero_point
    return bool((z <= 128).all() and (quantizer.tops - z <= 127).all())


class TransientLayer(QuantLayer):
    """A layer of the timestep alone: a large one dequantizes its weight at each call.

    Such a layer runs once per timestep: the memory of a float copy costs more than the time.
    """

    def __init__(self, layer: QuantLayer):
        super().__init__(*layer.contents())

    def weight(self) -> torch.Tensor:
        if self.qweight.numel() <= LARGEST_KEPT_WEIGHT:
            return super().weight()
        return dequantize(self.qweight, self.w_scale, self.w_zero_point)


def integer_codes(layer: QuantLayer) -> torch.Tensor:
    """int8 codes - zero point, shaped like the weight; the difference may wrap, see weights_fit."""
    return (layer.qweight - per_channel(layer.w_zero_point, layer.qweight)).view(torch.int8)


def weights_fit(layer: QuantLayer) -> bool:
    """Whether codes - zero point fits int8: always below 8 bits, and at 8 bits with z = 128."""
    flat = layer.qweight.flatten(1)
    low = flat.amin(1).short() - layer.w_zero_point
    high = flat.amax(1).short() - layer.w_zero_point
    return bool((low >= -128).all() and (high <= 127).all())

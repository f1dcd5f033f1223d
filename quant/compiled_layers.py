"""Layers that execute on products.cpp: from float maps to float maps in two passes.

The first makes the codes, with their border, of the input or of silu(norm(input)); the second
multiplies and adds bias, residual and what else is added. Without a common timestep, and for
geometries that products.cpp does not have, they are the layers of int8_layers.py.
"""

import torch
from torch import nn

from quant.compiled import BlockedWeight, Compiled, Planes, pixel_stride
from quant.int8_layers import Int8Layer, Int8MatMul, pair
from quant.layers import Operation, QuantMatMul


class CompiledLayer(Int8Layer):
    """A convolution without groups and dilation, or a linear layer; replaces a QuantLayer."""

    @staticmethod
    def fits(op: Operation) -> bool:
        return not op.is_conv or (op.groups == 1 and set(op.dilation) == {1})

    def _weight(self, codes: torch.Tensor, scale: torch.Tensor) -> nn.Module:
        op = self.op
        if not op.is_conv:
            return BlockedWeight(codes[:, :, None, None], scale, [1, 1], [0, 0])
        padding = pair(op.padding)
        if op.kind == "Conv1d":  # a unit height
            padding[0] = 0
        return BlockedWeight(codes, scale, pair(op.stride), padding)

    def _one_pass(self, quantizer: nn.Module) -> bool:
        return True

    def _of_norm(
        self, norm: nn.GroupNorm, x: torch.Tensor, index: int, plus: torch.Tensor | None
    ) -> torch.Tensor:
        (factors,), (weight,), (quantizer,) = self.factors(), self.weights, self.inputs
        planes = self.compiled.norm_silu_codes(
            *(x, norm, factors, quantizer.code_step(index), quantizer.bits),
            *(weight.padding, weight.pitch),
        )
        return self._multiply(planes, 0, weight.empty_output(x), self.bias, _side_by_side(plus))

    def _product(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if self.op.is_conv:
            return self._of_map(x, index)
        rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, N)
        out = self._of_map(rows, index)
        return out.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)

    def _of_map(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """x (B, C, H, W) -> (B, O, H, W), channels_last."""
        if pixel_stride(x) is None:
            x = x.float().contiguous(memory_format=torch.channels_last)
        out, bias, plus = self.weights[0].empty_output(x), self.bias, None
        parts = x.split([weight.in_channels for weight in self.weights], dim=1)
        for i, (part, weight) in enumerate(zip(parts, self.weights, strict=True)):
            quantizer = self.inputs[i]
            planes = self.compiled.codes(
                *(part, self.factors()[i], quantizer.code_step(index), quantizer.bits),
                *(weight.padding, weight.pitch),
            )
            self._multiply(planes, i, out, bias, plus)
            bias, plus = None, out
        return out

    def _multiply(
        self,
        planes: Planes,
        part: int,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        plus: torch.Tensor | None,
    ) -> torch.Tensor:
        """out = the products of a part's planes + bias + plus."""
        for plane in planes:
            self.compiled.convolution(plane, self.weights[part], bias, plus, out)
            bias, plus = None, out
        return out


def _side_by_side(plus: torch.Tensor | None) -> torch.Tensor | None:
    """With its channels beside each other, as products.cpp reads it."""
    if plus is None or plus.shape[2:] == (1, 1):
        return plus if plus is None or plus.stride(1) == 1 else plus.contiguous()
    return plus.contiguous(memory_format=torch.channels_last)


class CompiledMatMul(Int8MatMul):
    """A matrix product of attention, both operands quantized on the way; replaces a QuantMatMul."""

    def __init__(self, product: QuantMatMul, compiled: Compiled):
        super().__init__(product)
        self.compiled = compiled

    def after_softmax(
        self, scores: torch.Tensor, score_scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scores * score_scale) @ right."""
        index = self.left.context.bins
        if isinstance(index, int):
            return self._shared(scores, right, index, score_scale)
        return self(torch.softmax(scores * score_scale, dim=-1), right)

    def _shared(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        index: int,
        score_scale: float | None = None,
    ) -> torch.Tensor:
        steps = self.left.code_step(index), self.right.code_step(index)
        bits = self.left.bits, self.right.bits
        return self.compiled.matrix_product(left, right, *steps, bits, self.by_row, score_scale)

"""Layers that execute on cpp/layer.cpp: from float maps to float maps in one call.

It makes the codes, with their border, of the input or of silu(norm(input)), and multiplies and adds
bias, residual and what else is added. Without a common timestep, and for geometries that
products.cpp does not have, they are the layers of int8_layers.py.
"""

import ctypes
import math
from typing import Any

import torch
from torch import nn

from ...models.protocols import ModuleList, is_exact_between_layers
from ..core.affine import QuantizerStep
from ..core.operation import Operation
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer
from .native import Compiled, pixel_stride
from .onednn import Int8Layer, Int8MatMul, pair
from .prepared import BlockedWeight, PartStep, PreparedLayer, part_step


class CompiledLayer(Int8Layer):
    """A convolution without groups and dilation, or a linear layer; replaces a QuantLayer.

    What a call needs beside its tensors is prepared once per shape and per calibrated timestep, and
    kept, so that little is left for Python to do: a small layer takes some ten microseconds.
    """

    compiled: Compiled
    weights: "ModuleList[BlockedWeight]"

    def __init__(self, layer: QuantLayer, vnni: bool, compiled: Compiled):
        super().__init__(layer, vnni, compiled)
        self._quantizers = tuple(self.inputs)  # a look-up in a ModuleList takes longer
        self._prepared: dict[tuple[int, ...], PreparedLayer] = {}
        self._steps: dict[int, ctypes.Array[PartStep]] = {}

    @staticmethod
    def fits(op: Operation) -> bool:
        """Whether the compiled code has this operation: no groups, no dilation."""
        return not op.is_conv or (op.groups == 1 and set(op.dilation) == {1})

    def _weight(self, codes: torch.Tensor, scale: torch.Tensor) -> BlockedWeight:
        op = self.op
        if not op.is_conv:
            return BlockedWeight(
                codes[:, :, None, None], scale, [1, 1], [0, 0], self.compiled.depth
            )
        padding = pair(op.padding)
        if op.kind == "Conv1d":  # a unit height
            padding[0] = 0
        return BlockedWeight(codes, scale, pair(op.stride), padding, self.compiled.depth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = self._quantizers[0].context.index
        if isinstance(index, int) and self.op.kind == "Conv2d":
            return self._of_map(x, index)
        return super().forward(x)

    def after_norm_silu(
        self, norm: nn.GroupNorm, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        index = self._quantizers[0].context.index
        if isinstance(index, int) and not self.split and stride_of(x) == x.shape[1]:
            return self._of_map(x, index, norm, plus)
        return super().after_norm_silu(norm, x, plus)

    def _product(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if self.op.is_conv:
            return self._of_map(x, index)
        x = x.float().contiguous()
        prepared = self._prepared.get(x.shape)
        if prepared is None:
            rows = math.prod(x.shape[:-1])
            prepared = self._prepare(x.shape, (1, x.shape[-1], 1, rows))
        out = torch.empty(*x.shape[:-1], prepared.output[1])
        if out.numel():
            self.compiled.layer(prepared, self._step_of, index, x, x.shape[-1], None, None, out)
        return out

    def _of_map(
        self,
        x: torch.Tensor,
        index: int,
        norm: nn.GroupNorm | None = None,
        plus: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, C, H, W) -> (B, O, H, W), channels_last."""
        stride = stride_of(x)
        if stride is None:
            x = x.float().contiguous(memory_format=torch.channels_last)
            stride = x.shape[1]
        prepared = self._prepared.get(x.shape) or self._prepare(x.shape, x.shape)
        if plus is not None:
            plus = side_by_side(plus, prepared.output)
        out = torch.empty(prepared.output, memory_format=torch.channels_last)
        self.compiled.layer(prepared, self._step_of, index, x, stride, norm, plus, out)
        return out

    def _prepare(self, key: tuple[int, ...], shape: tuple[int, ...]) -> PreparedLayer:
        """Prepares calls with inputs of this shape (B, C, H, W), and keeps the result under `key`.

        Raises ValueError where the layer has other channels.
        """
        channels = sum(weight.in_channels for weight in self.weights)
        if shape[1] != channels:
            raise ValueError(f"the input has {shape[1]} channels, the layer {channels}")
        planes = 2 if any(q.bits > 8 for q in self._quantizers) else 1
        made = PreparedLayer(shape, list(self.weights), self.factors(), self.bias, planes)
        self._prepared[key] = made
        return made

    def _step_of(self, index: int) -> "ctypes.Array[PartStep]":
        known = self._steps.get(index)
        if known is None:
            steps = [part_step(q.step(index)) for q in self._quantizers]
            known = self._steps[index] = (PartStep * len(steps))(*steps)
        return known

    def _forget(self) -> None:
        super()._forget()
        self._prepared, self._steps = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_prepared": {}, "_steps": {}}


def stride_of(x: torch.Tensor) -> int | None:
    """pixel_stride(x), faster where all channels lie beside each other."""
    last = x.dtype is torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    return x.shape[1] if last and x.device.type == "cpu" and x.numel() else pixel_stride(x)


def side_by_side(plus: torch.Tensor, output: tuple[int, ...]) -> torch.Tensor:
    """What is added to an output, (B, O, H, W) or (B, O, 1, 1), as layer.cpp reads it: float32 with
    its channels beside each other."""
    if plus.shape[2:] == (1, 1):
        plus = plus.float().expand(output[0], output[1], 1, 1)
        return plus if plus.stride(1) == 1 else plus.contiguous()
    if plus.shape == output and stride_of(plus) == output[1]:
        return plus
    return plus.float().expand(output).contiguous(memory_format=torch.channels_last)


class CompiledMatMul(Int8MatMul):
    """A matrix product of attention, both operands quantized on the way; replaces a QuantMatMul."""

    def __init__(self, product: QuantMatMul, compiled: Compiled):
        super().__init__(product)
        self.compiled = compiled

    def after_softmax(
        self, scores: torch.Tensor, score_scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scores * score_scale) @ right."""
        index = self.left.context.index
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
        return self.compiled.matrix_product(
            left, right, self._steps_of, index, self.by_row, score_scale
        )

    def _steps_of(self, index: int) -> tuple[QuantizerStep, QuantizerStep]:
        return self.left.step(index), self.right.step(index)


class CompiledNorm(nn.GroupNorm):
    """A GroupNorm whose samples depend neither on the batch nor on the threads."""

    def __init__(self, norm: nn.GroupNorm, compiled: Compiled):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias, self.compiled = norm.weight, norm.bias, compiled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 4 and x.shape[1] == self.num_channels and stride_of(x) == x.shape[1]:
            return self.compiled.group_norm(x, self)
        return super().forward(x)


def layers_are_independent(denoiser: nn.Module) -> bool:
    """Whether a sample's output is the same to the bit in any batch: all layers are of this file,
    and the denoiser declares `exact_between_layers`, that it does nothing else with samples that
    could round in more than one way."""
    own = (CompiledLayer, CompiledMatMul, CompiledNorm, TimestepLayer)

    def alone(module: nn.Module) -> bool:
        return isinstance(module, own) or (
            not module._parameters and not module._buffers and all(map(alone, module.children()))
        )

    return is_exact_between_layers(denoiser) and alone(denoiser)

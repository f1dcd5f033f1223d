"""Weights and layers in the form that the compiled code reads, see cpp/layer.cpp and
cpp/float_layer.cpp."""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..core.affine import QuantizerStep

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int32


class BlockedWeight(nn.Module):
    """int8 codes in the order that products.cpp reads. Geometry in pixels, (vertical, horizontal).

    Buffers: codes int8 (O / 16, planes, kh kw * C / 4 * 16 * 4), filled up with zeros; sums int32
    (O,) of an output's codes; scale float32 (O,); depth int64 (), see tiles.h. There are two planes
    where AVX2 alone cannot multiply the codes exactly: codes = 16 * first + second.
    """

    codes: torch.Tensor
    depth: torch.Tensor
    sums: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        stride: list[int],
        padding: list[int],
        depth_of: Callable[[torch.Tensor], int],
    ):
        """codes int8 (O, C, kh, kw). depth_of: Compiled.depth."""
        super().__init__()
        outputs, channels, *kernel = codes.shape
        self.kernel, self.stride, self.padding = tuple(kernel), tuple(stride), tuple(padding)
        self.in_channels, self.pitch = channels, -(-channels // 4) * 4
        taps, blocks = kernel[0] * kernel[1], -(-outputs // 16)
        blocked = codes.new_zeros(blocks, taps, self.pitch // 4, 16, 4)
        for block, part in zip(blocked, codes.flatten(2).split(16), strict=True):  # little memory
            rows = F.pad(part.transpose(1, 2), (0, self.pitch - channels))  # (16, taps, pitch)
            block[:, :, : len(part)] = rows.unflatten(2, (-1, 4)).permute(1, 2, 0, 3)
        blocked = blocked.view(blocks, 1, kernel[0], -1, 16, 4)  # the columns of a row together
        depth = depth_of(blocked)
        if depth == 0:
            high = blocked.short().add_(8).bitwise_right_shift_(4).to(torch.int8)  # -8..8
            blocked = torch.cat((high, blocked - 16 * high), 1)
            depth = depth_of(blocked)
        self.register_buffer("codes", blocked.flatten(2))
        self.register_buffer("depth", torch.tensor(depth))
        self.register_buffer("sums", codes.flatten(1).sum(1, dtype=torch.int32))
        self.register_buffer("scale", scale)

    def output_size(self, height: int, width: int) -> list[int]:
        """Height and width of the output; height, width: of the input without its border."""
        return [
            (size + 2 * self.padding[i] - self.kernel[i]) // self.stride[i] + 1
            for i, size in enumerate((height, width))
        ]


class PartStep(ctypes.Structure):
    """The quantizer of a part of a layer's input, at a timestep; see layer.cpp."""

    _fields_ = (("inverse", _FLOAT), ("scale", _FLOAT), ("zero_point", _INT), ("top", _INT))


def part_step(step: QuantizerStep) -> PartStep:
    """The step as the compiled code takes it."""
    return PartStep(step.inverse, step.scale, step.zero_point, step.top)


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("channels", "pitch")),
        *((name, _POINTER) for name in ("factors", "codes", "sums", "scale")),
        *((name, _LONG) for name in ("planes", "depth")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *(("parts", _LONG), ("part", _Part * 2), ("size", _LONG * 7), ("shape", _LONG * 11)),
        ("bias", _POINTER),
    )


class PreparedLayer:
    """What products of a layer need for inputs of one shape. Keeps the tensors that it points to.

    output: its shape (B, O, H, W).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        weights: list[BlockedWeight],
        factors: list[torch.Tensor],
        bias: torch.Tensor | None,
        planes: int,
    ):
        """shape: of the input (B, C, H, W). A weight and the channels' factors for each part of the
        channels; planes: maps of codes, of one byte each, that an input has at most."""
        (batch, _, height, width), first = shape, weights[0]
        border_y, border_x = first.padding
        size = first.output_size(height, width)
        outputs = len(first.scale)
        inside = (height + 2 * border_y, width + 2 * border_x)
        parts = [
            _Part(
                *(weight.in_channels, weight.pitch),
                *(v.data_ptr() for v in (factor, weight.codes, weight.sums, weight.scale)),
                *(weight.codes.shape[1], int(weight.depth)),
            )
            for weight, factor in zip(weights, factors, strict=True)
        ]
        self._kept = [(w.codes, w.sums, w.scale) for w in weights], factors, bias
        self._structure = _Layer(
            len(parts),
            (_Part * 2)(*parts),
            (_LONG * 7)(batch, height, width, 0, border_y, border_x, 0),
            (_LONG * 11)(batch, *inside, 0, *size, outputs, *first.kernel, *first.stride),
            None if bias is None else bias.data_ptr(),
        )
        self.address = ctypes.addressof(self._structure)
        self.output = (batch, outputs, *size)
        self.scratch = planes * batch * inside[0] * inside[1] * max(w.pitch for w in weights)


class _FloatLayer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias")),
        *(("size", _LONG * 7), ("shape", _LONG * 11)),
    )


class PreparedFloatLayer:
    """What a convolution in float32 needs for inputs of one shape. Keeps the tensors that it points
    to. output: its shape (B, O, H, W)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: int,
        geometry: tuple[list[int], list[int], list[int]],
    ):
        """shape: of the input (B, C, H, W); weight in the order of float_layer.cpp; geometry:
        kernel, stride and padding, each vertical and horizontal."""
        batch, channels, height, width = shape
        kernel, stride, border = geometry
        inside = height + 2 * border[0], width + 2 * border[1]
        size = [(inside[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
        self._kept = weight, bias
        self._structure = _FloatLayer(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            (_LONG * 7)(batch, height, width, channels, *border, channels),
            (_LONG * 11)(batch, *inside, channels, *size, outputs, *kernel, *stride),
        )
        self.address = ctypes.addressof(self._structure)
        self.output = (batch, outputs, *size)
        self.scratch = batch * inside[0] * inside[1] * channels

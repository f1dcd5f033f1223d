"""Layers under calibration: float weights whose rounding and activation scales learn.

`deploy()` turns each into its integer form of quant/runtime/layers.py. Both compute
y = conv(Q(x), W_hat) + b with the per-tensor activation quantizer of the current timestep.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ...models.protocols import ModuleList
from ..core.operation import Operation, quantize_input, relative_to_row, scale_channels
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer, attention_product
from .quantizer import LearnedQuantizer
from .weights import WeightQuantizer


class CalibLayer(nn.Module):
    """A convolution or linear layer under calibration.

    weight stays float; `weight_quantizer` and `inputs` (0 to 2 LearnedQuantizers) hold what is
    learned. Without inputs the activations stay in floating point. channel_scale (C,) multiplies
    the input channels before they are quantized (equivalent.py), or is None. made_weight: the
    quantized weight of the coming calls, where it is made already, or None.
    """

    channel_scale: torch.Tensor | None
    made_weight: torch.Tensor | None = None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Conv1d | nn.Linear,
        weight_quantizer: WeightQuantizer,
        inputs: Sequence[LearnedQuantizer],
        split: int,
    ):
        super().__init__()
        self.op = Operation(layer)
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.weight_quantizer = weight_quantizer
        self.inputs: ModuleList[LearnedQuantizer] = ModuleList(inputs)
        self.split = split
        self.register_buffer("channel_scale", None)

    @property
    def quantizer(self) -> WeightQuantizer:
        """weight_quantizer, by the name that most callers use."""
        return self.weight_quantizer

    def set_channel_scale(
        self, channel_scale: torch.Tensor, weight: torch.Tensor, quantizer: WeightQuantizer
    ) -> None:
        """weight: already divided by channel_scale; quantizer: of that weight."""
        self.channel_scale = channel_scale
        self.weight.data.copy_(weight)
        self.weight_quantizer = quantizer

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """x scaled, quantized and dequantized, with gradients; x itself without quantizers."""
        if not len(self.inputs):
            return x
        x = scale_channels(x, self.channel_scale, self.op.channel_dim)
        return quantize_input(x, self.inputs, self.split, self.op.channel_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, made = self.quantized_input(x), self.made_weight
        weight = self.weight_quantizer(self.weight) if made is None else made
        return self.op(x, weight, self.bias)

    def deploy(self) -> QuantLayer:
        """The layer with integer codes."""
        quantizer = self.quantizer
        with torch.no_grad():
            codes = quantizer.codes(self.weight).round().to(torch.uint8)
        return QuantLayer(
            self.op,
            codes,
            quantizer.current_scale().detach(),
            quantizer.zero_point.to(torch.uint8),
            None if self.bias is None else self.bias.detach(),
            quantizer.bits,
            [q.deploy() for q in self.inputs],
            self.split,
            self.channel_scale,
        )


class CalibTimestepLayer(TimestepLayer):
    """A TimestepLayer around a CalibLayer: its weights may still learn, so no value is kept."""

    layer: CalibLayer
    keeps_values = False

    def deploy(self) -> TimestepLayer:
        """The layer with integer codes, which keeps its values."""
        return TimestepLayer(self.context, self.layer.deploy())


class CalibMatMul(nn.Module):
    """A matrix product of attention under calibration; by_row: see QuantMatMul."""

    def __init__(self, left: LearnedQuantizer, right: LearnedQuantizer, by_row: bool = False):
        super().__init__()
        self.left, self.right, self.by_row = left, right, by_row

    def left_operand(self, left: torch.Tensor) -> torch.Tensor:
        """The left operand as its quantizer gets it, (B, N, K)."""
        return relative_to_row(left)[0] if self.by_row else left

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        index = self.left.context.index
        return attention_product(self.left, self.right, self.by_row, index, (left, right))

    def deploy(self) -> QuantMatMul:
        """The product with its quantizers fixed."""
        return QuantMatMul(self.left.deploy(), self.right.deploy(), self.by_row)

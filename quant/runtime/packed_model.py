"""A deployed model out of the tensors and the layer table of a quantized file (packed_file.py)."""

from typing import Any

import torch
from torch import nn

from ..core.context import TimestepContext
from ..core.operation import LAYER_TYPES, Operation
from .correction import OutputCorrection
from .denoiser import QuantDenoiser, replace_module
from .layers import QuantLayer, QuantMatMul, TimestepLayer
from .packing import unpack
from .quantizer import ActivationQuantizer


class ModelBuilder:
    """Rebuilds a deployed model row by row of the layer table, checking every value."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], context: TimestepContext, denoiser: nn.Module
    ):
        self.tensors, self.context, self.denoiser = tensors, context, denoiser
        # Values taken so far of the tensors that hold all layers one after the other: of channels,
        # biases, activation quantizers and channel scales.
        self.channel = self.bias = self.row = self.scaled = 0
        scale = self._get("activations.scale", torch.float32)
        self._check(scale.dim() == 2, "the activation scales' shape")
        zero_point = self._get("activations.zero_point", torch.int32)
        self._check(zero_point.shape == scale.shape, "the activation zero points' shape")
        self._check(bool((torch.isfinite(scale) & (scale > 0)).all()), "an activation scale <= 0")
        w_scale = self._get("layers.w_scale", torch.float32)
        self._check(w_scale.dim() == 1, "the weight scales' shape")
        w_zero_point = self._get("layers.w_zero_point", torch.uint8)
        self._check(w_zero_point.shape == w_scale.shape, "the weight zero points' shape")
        self._check(self._get("layers.bias", torch.float32).dim() == 1, "the biases' shape")
        self._check(bool((torch.isfinite(w_scale) & (w_scale > 0)).all()), "a weight scale <= 0")
        channel_scale = self._get("layers.channel_scale", torch.float16)
        self._check(channel_scale.dim() == 1, "the channel scales' shape")
        self._check(bool((channel_scale > 0).all()), "a channel scale <= 0")
        group = self._get("activations.group", torch.uint8)
        self._check(group.shape == (len(scale), len(context.timesteps)), "the group table's shape")
        self._check(not group.numel() or int(group.max()) < scale.shape[1], "a group out of range")

    @staticmethod
    def _check(good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"damaged: {what}")

    def _get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.tensors:
            raise ValueError(f"tensor {name} is missing")
        value = self.tensors[name]
        self._check(value.dtype == dtype, f"{name} is {value.dtype}, not {dtype}")
        if dtype.is_floating_point:
            self._check(bool(torch.isfinite(value).all()), f"{name} is not finite")
        return value

    def _take(self, name: str, dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
        part = self._get(name, dtype)[start : start + count]
        self._check(len(part) == count, f"{name} is too short")
        return part.clone()

    def _quantizer(self, bits: int | list[int]) -> ActivationQuantizer:
        """bits: of an operand, see packed_file.layer_table."""
        scale = self.tensors["activations.scale"]
        each = [bits] * scale.shape[1] if isinstance(bits, int) else bits
        good = isinstance(each, list) and 0 < len(each) <= scale.shape[1]
        good = good and all(isinstance(b, int) and 2 <= b <= 16 for b in each)
        self._check(good, f"{bits} activation bits")
        row, self.row = self.row, self.row + 1
        scale = scale[row, : len(each)].clone()
        zero_point = self._get("activations.zero_point", torch.int32)[row, : len(each)].clone()
        group = self.tensors["activations.group"][row].clone()
        self._check(int(group.max()) < len(each), "a group out of range")
        quantizer = ActivationQuantizer(self.context, scale, zero_point, group, each)
        good = bool((zero_point >= 0).all() and (zero_point <= quantizer.tops).all())
        self._check(good, "an activation zero point out of range")
        return quantizer

    def _layer(self, entry: dict[str, Any], layer: nn.Module) -> QuantLayer:
        name, bits, shape = entry["name"], entry["bits"], entry["shape"]
        if not isinstance(layer, LAYER_TYPES):
            raise ValueError(f"damaged: {name} is not a convolution or linear layer")
        self._check(list(layer.weight.shape) == shape, f"{name} has shape {shape}")
        self._check(isinstance(bits, int) and 2 <= bits <= 8, f"{name} has {bits} bits")
        split, inputs = int(entry["split"]), entry["inputs"]
        self._check(len(inputs) in ((2,) if split else (0, 1)), f"{name} has {len(inputs)} inputs")
        self._check(0 <= split < layer.weight.shape[1], f"{name} is split at {split}")
        if entry["time"]:
            self._check(isinstance(layer, nn.Linear) and not inputs, f"{name} is no time layer")
        out = shape[0]
        codes = unpack(self._get(f"{name}.qweight", torch.uint8), bits, layer.weight.numel())
        zero_point = self._take("layers.w_zero_point", torch.uint8, self.channel, out)
        self._check(int(zero_point.max()) < 2**bits, f"{name} has a zero point out of range")
        scale = self._take("layers.w_scale", torch.float32, self.channel, out)
        self.channel += out
        bias = None
        self._check((layer.bias is not None) == bool(entry["bias"]), f"the bias of {name}")
        if entry["bias"]:
            bias = self._take("layers.bias", torch.float32, self.bias, out)
            self.bias += out
        channel_scale = None
        if entry["scaled"]:
            self._check(bool(inputs), f"{name} scales channels that it does not quantize")
            given = self._take("layers.channel_scale", torch.float16, self.scaled, shape[1])
            channel_scale = given.float()
            self.scaled += shape[1]
        return QuantLayer(
            Operation(layer),
            codes.view(shape),
            scale,
            zero_point,
            bias,
            bits,
            [self._quantizer(b) for b in inputs],
            split,
            channel_scale,
        )

    def build(self, table: list[dict[str, Any]]) -> QuantDenoiser:
        """The model of a table of layers. Raises ValueError where the file does not fit it."""
        rest = dict(self.denoiser.state_dict())
        for entry in table:
            name = entry["name"]
            original = self.denoiser.get_submodule(name)
            if entry["kind"] == "matmul":
                self._check(not original.state_dict(), f"{name} is not a matrix product")
                left, right = entry["inputs"]
                # Of earlier versions, whose codes of probabilities could be logarithmic.
                self._check(not entry.get("log2"), f"{name} has logarithmic codes")
                replacement: nn.Module = QuantMatMul(
                    self._quantizer(left), self._quantizer(right), bool(entry["by_row"])
                )
            else:
                replacement = self._layer(entry, original)
                if entry["time"]:
                    replacement = TimestepLayer(self.context, replacement)
            for key in list(rest):
                if key.startswith(f"{name}."):
                    del rest[key]
            replace_module(self.denoiser, name, replacement)
        self._check(self.row == len(self.tensors["activations.scale"]), "unused activation rows")
        self._check(self.channel == len(self.tensors["layers.w_scale"]), "unused weight scales")
        self._check(self.bias == len(self.tensors["layers.bias"]), "unused biases")
        unused = self.scaled != len(self.tensors["layers.channel_scale"])
        self._check(not unused, "unused channel scales")
        for name, target in rest.items():  # copies: a view would keep the whole file in memory
            value = self._get(f"float.{name}", torch.float32).clone()
            self._check(value.shape == target.shape, f"{name} has shape {tuple(value.shape)}")
            parent, _, child = name.rpartition(".")
            owner = self.denoiser.get_submodule(parent)
            if child in owner._parameters:
                setattr(owner, child, nn.Parameter(value, requires_grad=False))
            else:
                owner._buffers[child] = value
        model = QuantDenoiser(self.denoiser, self.context)
        correction = {
            k.removeprefix("correction."): v.clone()
            for k, v in self.tensors.items()
            if k.startswith("correction.")
        }
        if correction:
            for name in correction:
                self._get(f"correction.{name}", torch.float32)
            model.correction = OutputCorrection.from_state(self.context, correction)
        return model.eval().requires_grad_(False)

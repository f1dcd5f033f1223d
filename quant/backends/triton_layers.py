"""Layers that execute on CUDA in integers (triton_launch.py), and a denoiser that runs them.

    model = to_triton(load_quantized(path, denoiser)).to("cuda")
    model.simulated                                     # {name: reason} of what was left as it is

They compute what layers.py computes, up to float rounding. The current timestep is a number on the
device, so that all launches of a call are the same at every timestep: the denoiser records them
once for each shape of its input, as a CUDA graph, and plays them again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...models.protocols import ModuleList
from ..runtime.denoiser import QuantDenoiser, replace_module
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer
from ..runtime.packing import pack
from ..runtime.quantizer import ActivationQuantizer
from . import triton_launch as kernels
from .graphs import Graphs, is_tensor
from .onednn import integer_codes, weights_fit


class CurrentTimestep(nn.Module):
    """The index of the current calibrated timestep, where the kernels can read it: int32 (1,).
    One for all layers of a denoiser."""

    index: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(1, dtype=torch.int32), persistent=False)


class StepTables(nn.Module):
    """An activation quantizer as tables over the calibrated timesteps, see kernels.Steps."""

    inverse: torch.Tensor
    zero_point: torch.Tensor
    top: torch.Tensor
    scale: torch.Tensor
    plane_zero: torch.Tensor

    def __init__(self, quantizer: ActivationQuantizer, current: CurrentTimestep):
        super().__init__()
        self.current = current
        groups = quantizer.group_of_timestep.long()
        zero_point, scale = quantizer.zero_point[groups], quantizer.scale[groups]
        self.register_buffer("inverse", quantizer.scale.reciprocal()[groups])
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("top", quantizer.tops[groups])
        wide = quantizer.bits > 8
        self.register_buffer("scale", torch.stack([scale, scale * 256] if wide else [scale]))
        planes = [zero_point & 255, zero_point >> 8] if wide else [zero_point]
        self.register_buffer("plane_zero", torch.stack(planes))

    def steps(self) -> kernels.Steps:
        """What the kernels read: the tables and the index of the current timestep."""
        whole = self.inverse, self.zero_point, self.top
        return kernels.Steps(self.current.index, *whole, self.scale, self.plane_zero)


class LayerPart(nn.Module):
    """One part of a layer's input channels: its quantizer and its integer weight.

    Buffers: codes int8 (O, kh kw C), or uint8 (O, kh kw C / 2) packed with zero_point uint8 (O,);
    sum int32 (O,); scale float32 (O,); factors float32 (C,) or None.
    """

    codes: torch.Tensor
    zero_point: torch.Tensor | None
    sum: torch.Tensor
    scale: torch.Tensor
    factors: torch.Tensor | None

    def __init__(
        self, layer: QuantLayer, channels: slice, quantizer: ActivationQuantizer, packed: bool,
        current: CurrentTimestep,
    ):  # fmt: skip
        super().__init__()
        self.tables = StepTables(quantizer, current)
        integers = _rows(integer_codes(layer)[:, channels])
        self.size = integers.shape[1], integers.shape[2]
        packed = packed and layer.bits == 4 and integers.shape[3] % 2 == 0
        # Two dimensions: Module.to(memory_format=channels_last) would reorder four.
        integers = integers.flatten(1)
        self.register_buffer("sum", integers.sum(1, dtype=torch.int32))
        if packed:
            rows = _rows(layer.qweight[:, channels]).flatten(1)
            integers = pack(rows, 4).view(len(rows), -1).to(rows.device)
        self.register_buffer("codes", integers)
        self.register_buffer("zero_point", layer.w_zero_point if packed else None)
        self.register_buffer("scale", layer.w_scale)
        factors = layer.channel_scale
        self.register_buffer("factors", None if factors is None else factors[channels].contiguous())

    def product(self, codes: torch.Tensor, dtype: torch.dtype, **given: Any) -> torch.Tensor:
        """The product with the planes of one map, see kernels.product."""
        weight = kernels.Weight(self.codes, self.zero_point, self.sum, self.scale, self.size)
        steps, out = self.tables.steps(), None
        for plane, values in enumerate(codes):
            out = kernels.product(values, weight, steps, plane, dtype, **given)
            given |= {"plus": out, "bias": None}
        assert out is not None
        return out


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """(O, C), (O, C, k) or (O, C, kh, kw) -> (O, kh, kw, C), contiguous."""
    if weight.dim() < 4:
        weight = weight.unflatten(1, (-1, 1)) if weight.dim() == 3 else weight[:, :, None, None]
    return weight.permute(0, 2, 3, 1).contiguous()


class TritonLayer(nn.Module):
    """A convolution or linear layer in integers; replaces a QuantLayer that has no `obstacle`.

    packed: weights of 4 bits stay packed, two in a byte, and are unpacked by the kernel. Behind a
    skip concatenation there are two parts, added in floating point, as are the two products of
    codes of more than 8 bits. What comes out has the type of the input.
    """

    bias: torch.Tensor | None
    parts: "ModuleList[LayerPart]"

    def __init__(self, layer: QuantLayer, current: CurrentTimestep, packed: bool = False):
        super().__init__()
        op = self.op = layer.op
        self.split = layer.split
        self.padding = [0, 0, *op.padding][-2:] if op.is_conv else [0, 0]
        self.stride = op.stride[0] if op.is_conv else 1
        ends = [0, layer.split, None] if layer.split else [0, None]
        channels = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        self.parts = ModuleList(
            LayerPart(layer, where, quantizer, packed, current)
            for where, quantizer in zip(channels, layer.inputs, strict=True)
        )
        self.register_buffer("bias", layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.op.kind == "Conv2d":
            return self._of_map(x)
        if self.op.kind == "Conv1d":
            return self._of_map(x[:, :, None]).squeeze(2)
        rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # a map with one row of pixels
        return self._of_map(rows).squeeze(2).squeeze(0).t().unflatten(0, x.shape[:-1])

    def after_norm_silu(
        self, norm: nn.Module, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer of silu(norm(x)), + plus. x (B, C, H, W)."""
        if isinstance(norm, nn.GroupNorm) and norm.affine and not self.split:
            return self._of_map(x, norm, plus)
        return self._of_map(F.silu(norm(x), inplace=True), None, plus)

    def _of_map(
        self,
        x: torch.Tensor,
        norm: nn.GroupNorm | None = None,
        plus: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, C, H, W) -> (B, O, OH, OW), channels_last."""
        counts = [self.split, x.shape[1] - self.split] if self.split else [x.shape[1]]
        bias, border = self.bias, (self.padding[0], self.padding[1])
        for part, values in zip(self.parts, x.split(counts, 1), strict=True):
            codes = kernels.quantize_map(values, part.tables.steps(), part.factors, border, norm)
            plus = part.product(codes, x.dtype, bias=bias, plus=plus, stride=self.stride)
            bias = None
        assert plus is not None
        return plus


class TritonMatMul(nn.Module):
    """A matrix product of attention in integers, (B, N, K) @ (B, K, M); replaces a QuantMatMul that
    has no `obstacle`."""

    def __init__(self, product: QuantMatMul, current: CurrentTimestep):
        super().__init__()
        self.left, self.right = (StepTables(q, current) for q in (product.left, product.right))
        self.by_row = product.by_row

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        steps = self.left.steps(), self.right.steps()
        if not self.by_row:
            return kernels.attention_product(left, right, steps, left.dtype)
        top = left.amax(-1, keepdim=True)
        return kernels.attention_product(left / top, right, steps, left.dtype).mul_(top)

    def after_softmax(
        self, scores: torch.Tensor, scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scores * scale) @ right."""
        steps = self.left.steps(), self.right.steps()
        return kernels.attention_product(scores, right, steps, right.dtype, scale, self.by_row)


def obstacle(module: QuantLayer | QuantMatMul) -> str | None:
    """Why this layer cannot run on these kernels."""
    if isinstance(module, QuantMatMul):
        widest = max(module.left.bits, module.right.bits)
        return f"an operand of {widest} bits" if widest > 8 else None
    op = module.op
    if not len(module.inputs):
        return "its activations are not quantized"
    if op.is_conv and isinstance(op.padding, str):
        return f"padding '{op.padding}'"
    if op.is_conv and (op.groups != 1 or set(op.dilation) != {1} or len(set(op.stride)) != 1):
        return "a convolution with groups, dilation or two strides"
    if module.qweight[0].numel() > kernels.LARGEST_SUM:
        return f"sums of {module.qweight[0].numel()} products, which int32 might not hold"
    return None if weights_fit(module) else "8-bit weights with a zero point other than 128"


class TritonDenoiser(QuantDenoiser):
    """A QuantDenoiser of such layers.

    On CUDA, unless a layer is simulated, whose scale PyTorch would take from the host, it records a
    CUDA graph for each shape of its input and plays it again at every timestep; not where
    `records` is set to false. A batch of mixed timesteps, which no sampler makes, runs row by row.
    """

    def __init__(self, model: QuantDenoiser, current: CurrentTimestep, simulated: dict[str, str]):
        super().__init__(model.denoiser, model.context)
        self.correction = model.correction
        self.current, self.simulated = current, simulated
        self.graphs, self.records = Graphs(), True

    def keep_maps_in(self, dtype: torch.dtype) -> None:
        """What goes from layer to layer gets this type, and half of the memory with 16 bits; what
        comes in and goes out stays float32. Once, before the first call."""
        self.denoiser = MapsIn(self.denoiser, dtype)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor | float, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        t = torch.as_tensor(t)
        t = t.expand(len(x)) if t.ndim == 0 or len(t) != len(x) else t
        self.context.set(t, x.device)
        if isinstance(self.context.index, int):
            eps = self._shared(x, t, args, kwargs)
        else:
            eps = torch.cat([self._row(i, x, t, args, kwargs) for i in range(len(x))])
            self.context.set(t, x.device)
        return eps if self.correction is None else self.correction(eps)

    def _shared(self, x: torch.Tensor, t: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """All rows share one timestep, which the context knows."""
        self.current.index.fill_(self.context.index)
        if x.device.type != "cuda":
            return self.denoiser(x, t, *args, **kwargs)
        with torch.cuda.device(x.device):  # where Triton launches
            if self.simulated or not self.records:
                return self.denoiser(x, t.to(x.device, non_blocking=True), *args, **kwargs)
            computed = partial(_timesteps_computed, self.denoiser)
            return self.graphs.call(self.denoiser, (x, t, *args), kwargs, computed)

    def _row(
        self, i: int, x: torch.Tensor, t: torch.Tensor, args: tuple, kwargs: dict
    ) -> torch.Tensor:
        def of_row(value: Any) -> Any:
            return value[i : i + 1] if is_tensor(value) and len(value) == len(x) else value

        self.context.set(t[i : i + 1])
        rest = tuple(of_row(v) for v in args), {k: of_row(v) for k, v in kwargs.items()}
        return self._shared(of_row(x), of_row(t), *rest)

    def _apply(self, *args: Any, **kwargs: Any) -> QuantDenoiser:
        self.graphs.clear()  # the weights move
        return super()._apply(*args, **kwargs)


class MapsIn(nn.Module):
    """A denoiser of integer layers with maps of another type between them. Layers take any type
    and return that of their input; norms and what else has parameters are converted."""

    def __init__(self, denoiser: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype
        for module in denoiser.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.Conv1d | nn.Conv2d | nn.Linear):
                module.to(dtype)

    def forward(self, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rest = [self._converted(value) for value in args]
        named = {name: self._converted(value) for name, value in kwargs.items()}
        return self.denoiser(x.to(self.dtype), t, *rest, **named).float()

    def _converted(self, value: Any) -> Any:
        floating = is_tensor(value) and value.is_floating_point()
        return value.to(self.dtype) if floating else value


@contextmanager
def _timesteps_computed(denoiser: nn.Module) -> Iterator[None]:
    """Layers of the timestep compute their value instead of remembering it: in a graph it must
    follow from t."""
    layers = [m for m in denoiser.modules() if isinstance(m, TimestepLayer)]
    for layer in layers:
        layer.keeps_values = False
    try:
        yield
    finally:
        for layer in layers:
            del layer.keeps_values


def to_triton(model: QuantDenoiser, packed: bool = False) -> TritonDenoiser:
    """What can run in integers is replaced, in place; see TritonLayer for packed. The uint8 codes
    of replaced layers are freed."""
    current, simulated = CurrentTimestep(), {}
    for name, module in list(model.denoiser.named_modules()):
        if not isinstance(module, QuantLayer | QuantMatMul):
            continue
        if isinstance(model.denoiser.get_submodule(name.rpartition(".")[0]), TimestepLayer):
            continue  # in floating point by design
        reason = obstacle(module)
        if reason is not None:
            simulated[name] = reason
        elif isinstance(module, QuantMatMul):
            replace_module(model.denoiser, name, TritonMatMul(module, current))
        else:
            replace_module(model.denoiser, name, TritonLayer(module, current, packed))
    return TritonDenoiser(model, current, simulated).eval().requires_grad_(False)

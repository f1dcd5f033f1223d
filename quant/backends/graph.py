"""A deployed model as a graph of plain tensor operations, for exporters.

    graph = as_graph(load_quantized(path, denoiser))      # a module of its own
    output = graph(x, t, **named)                         # t (1,): one timestep of all samples

Each quantizer is one operator, tinydm::fake_quantize, whose scale and zero point are looked up by
the timestep; each weight is one, tinydm::dequantize, of its codes. An exporter translates the two
(QuantizeLinear and DequantizeLinear of ONNX). Quantizers of more than 8 bits are plain arithmetic:
no runtime multiplies such codes as integers, and OpenVINO leaves operators of 16 bits out. Values
are those of the fake backend up to float rounding.

Legend: B batch, S calibrated timesteps.
"""

import torch
from torch import nn

from ...models.protocols import ModuleList
from ..core.affine import dequantize, fake_quantize
from ..core.context import TimestepContext
from ..core.operation import Operation, quantize_input, relative_to_row, scale_channels
from ..core.settings import MOST_BITS
from ..runtime.correction import OutputCorrection
from ..runtime.denoiser import QuantDenoiser, replace_module
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer
from ..runtime.quantizer import ActivationQuantizer


@torch.library.custom_op("tinydm::fake_quantize", mutates_args=())
def fake_quantize_op(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """Quantize to all codes of uint8, the dtype of zero_point, and dequantize; both 0-d."""
    return fake_quantize(x, scale, zero_point.float(), 2**MOST_BITS - 1)


@fake_quantize_op.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tinydm::dequantize", mutates_args=())
def dequantize_op(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """Float weights (O, ...) of uint8 codes; scale and zero_point (O,)."""
    return dequantize(codes, scale, zero_point)


@dequantize_op.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


class _Step:
    """The row of the calibrated timestep that a call is for, which all quantizers look up.

    index: (1,) int64.
    """

    index: torch.Tensor


class GraphQuantizer(nn.Module):
    """An ActivationQuantizer whose numbers are tables (S,), or one value that all timesteps share.

    lowest, highest: of q - z. With fewer than 8 bits x is clamped to these codes first.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    def __init__(self, step: _Step, quantizer: ActivationQuantizer):
        super().__init__()
        groups = quantizer.group_of_timestep.long()
        one = bool((groups == groups[0]).all())
        rows = groups[:1] if one else groups
        self.step, self.shared = step, one
        bits = {quantizer.group_bits[g] for g in rows.tolist()}
        self.is_wide, self.is_clamped = max(bits) > MOST_BITS, min(bits) < MOST_BITS
        scale, zero_point = quantizer.scale[rows], quantizer.zero_point[rows]
        self.register_buffer("scale", scale)
        codes = zero_point if self.is_wide else zero_point.to(torch.uint8)
        self.register_buffer("zero_point", codes)
        self.register_buffer("lowest", -zero_point)
        self.register_buffer("highest", quantizer.tops[rows] - zero_point)

    def _current(self, table: torch.Tensor) -> torch.Tensor:
        return (table if self.shared else table.index_select(0, self.step.index)).reshape(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, lowest, highest = map(self._current, (self.scale, self.lowest, self.highest))
        if self.is_wide:
            codes = torch.round(x * scale.reciprocal())
            return torch.minimum(torch.maximum(codes, lowest), highest) * scale
        if self.is_clamped:
            x = torch.minimum(torch.maximum(x, lowest * scale), highest * scale)
        return torch.ops.tinydm.fake_quantize(x, scale, self._current(self.zero_point))


class GraphLayer(nn.Module):
    """A deployed layer whose weight is dequantized in the graph.

    A linear layer's codes stay (O, I): a runtime folds the transposition of its weight. Its input
    is made (rows, I), and its bias zero where it has none, so that exporters write a Gemm. Of a
    MatMul with these weights ONNX Runtime makes, by default, one that quantizes its input again.
    """

    codes: torch.Tensor
    w_scale: torch.Tensor
    w_zero_point: torch.Tensor
    bias: torch.Tensor | None
    channel_scale: torch.Tensor | None

    def __init__(self, step: _Step, layer: QuantLayer):
        super().__init__()
        self.op: Operation = layer.op
        self.bits, self.split = layer.bits, layer.split
        self.register_buffer("codes", layer.qweight)
        self.register_buffer("w_scale", layer.w_scale)
        self.register_buffer("w_zero_point", layer.w_zero_point)
        bias = layer.bias
        if bias is None and not self.op.is_conv:
            bias = torch.zeros_like(layer.w_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("channel_scale", layer.channel_scale)
        self.inputs: ModuleList[GraphQuantizer] = ModuleList(
            GraphQuantizer(step, q) for q in layer.inputs
        )

    @property
    def in_features(self) -> int:
        """Input features of a linear layer, which models of diffusers ask for."""
        return self.op.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.inputs):
            x = scale_channels(x, self.channel_scale, self.op.channel_dim)
            x = quantize_input(x, self.inputs, self.split, self.op.channel_dim)
        weight = torch.ops.tinydm.dequantize(self.codes, self.w_scale, self.w_zero_point)
        if self.op.is_conv or x.ndim == 2:
            return self.op(x, weight, self.bias)
        return self.op(x.flatten(0, -2), weight, self.bias).unflatten(0, x.shape[:-1])


class GraphMatMul(nn.Module):
    """A QuantMatMul that can be traced."""

    def __init__(self, step: _Step, product: QuantMatMul):
        super().__init__()
        self.left = GraphQuantizer(step, product.left)
        self.right = GraphQuantizer(step, product.right)
        self.by_row = product.by_row

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, top = relative_to_row(left) if self.by_row else (left, None)
        out = torch.matmul(self.left(left), self.right(right))
        return out if top is None else out * top


class GraphDenoiser(nn.Module):
    """output = graph(x (B, C, H, W), t (1,), **named): named are the denoiser's other tensors."""

    borders: torch.Tensor
    k: torch.Tensor | None
    mu: torch.Tensor | None

    def __init__(
        self,
        denoiser: nn.Module,
        step: _Step,
        context: TimestepContext,
        correction: OutputCorrection | None,
    ):
        super().__init__()
        self.denoiser, self.step = denoiser, step
        self.register_buffer("borders", context.borders.float())
        self.register_buffer("k", None if correction is None else correction.k)
        self.register_buffer("mu", None if correction is None else correction.mu)

    def forward(self, x: torch.Tensor, t: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        # As TimestepContext.nearest: a timestep on a border is the lower one's.
        self.step.index = (t.float() > self.borders).sum().reshape(1)
        # x.shape[0], since len(x) would be the number of samples of the example.
        output = self.denoiser(x, t.expand(x.shape[0]), **named)
        if self.k is None or self.mu is None:
            return output
        k, mu = (v.index_select(0, self.step.index)[:, :, None, None] for v in (self.k, self.mu))
        return (output - mu) / (1 + k)


def as_graph(model: QuantDenoiser) -> GraphDenoiser:
    """model: deployed, of the fake backend; its layers are replaced in place, so that it cannot be
    used any more. Raises ValueError for a layer of another backend."""
    step = _Step()
    for name, module in list(model.denoiser.named_modules()):
        inner = module.layer if isinstance(module, TimestepLayer) else module
        if type(inner) is QuantLayer:
            if name.endswith(".layer") and isinstance(_parent(model, name), TimestepLayer):
                continue
            replace_module(model.denoiser, name, GraphLayer(step, inner))
        elif type(inner) is QuantMatMul:
            replace_module(model.denoiser, name, GraphMatMul(step, inner))
        elif isinstance(inner, QuantLayer | QuantMatMul):
            raise ValueError(f"layer {name} is {type(inner).__name__}, of another backend")
    return GraphDenoiser(model.denoiser, step, model.context, model.correction).eval()


def _parent(model: QuantDenoiser, name: str) -> nn.Module:
    return model.denoiser.get_submodule(name.rpartition(".")[0])

"""Full precision in float32 on a processor, with --compile: the C++ of cpp/float_layer.cpp.

    model = to_fast_float(denoiser, compiled)     # the denoiser is changed as well

PyTorch's own operators bring a convolution's weights into another order at every call, take a slow
way where the map is small, and go through the memory for each norm, SiLU and sum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...models.protocols import roles_of
from ..runtime.denoiser import replace_module
from ..runtime.derived import KeepsDerived
from .native import Compiled
from .native_layers import CompiledNorm, side_by_side, stride_of
from .onednn import pair
from .prepared import PreparedFloatLayer
from .tapes import Taped

FEW = 16  # rows of a linear layer, up to which reading its weight takes longest
BLOCK = 16  # outputs whose weights lie side by side, see vectors.h


def to_fast_float(denoiser: nn.Module, compiled: Compiled) -> nn.Module:
    """Replaces, in place, the convolutions, linear layers, norms and softmax of a float32 denoiser
    on the CPU, and returns what plays its calls from recordings (tapes.py). The result equals the
    original up to float rounding, and cannot be trained."""
    products = roles_of(denoiser).matmuls
    for name in [name for name, _ in denoiser.named_modules()]:  # no list of what is replaced
        module = denoiser.get_submodule(name)
        if type(module) is nn.Conv2d and compiled.products and _fits(module):
            replace_module(denoiser, name, FloatConv(module, compiled))
        elif type(module) is nn.Linear and compiled.products and _is_here(module.weight):
            replace_module(denoiser, name, FloatLinear(module, compiled))
        elif type(module) is nn.GroupNorm and module.affine:
            replace_module(denoiser, name, CompiledNorm(module, compiled))
        elif products.get(name) == "values" and compiled.products:
            replace_module(denoiser, name, FloatMatMul(compiled))
    return Taped(denoiser, compiled) if compiled.products else denoiser


def _fits(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return plain and _is_here(conv.weight) and not isinstance(conv.padding, str)


def _is_here(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


class FloatConv(KeepsDerived):
    """A Conv2d in float32, without groups and dilation; replaces it. Output in channels_last, of
    which a sample depends neither on the batch nor on the threads.

    Buffers: weight float32 (O / 16, kh, kw * C * 16), the 16 outputs of a value beside each other,
    filled up with zeros; bias float32 (O,).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, conv: nn.Conv2d, compiled: Compiled):
        super().__init__()
        self.compiled, self.channels, self.outputs = compiled, conv.in_channels, conv.out_channels
        self.geometry = pair(conv.kernel_size), pair(conv.stride), pair(conv.padding)
        rows = F.pad(conv.weight.detach(), (*(0, 0) * 3, 0, -conv.out_channels % BLOCK))
        blocks = rows.unflatten(0, (-1, BLOCK)).permute(0, 3, 4, 2, 1)  # (O / 16, kh, kw, C, 16)
        self.register_buffer("weight", blocks.flatten(2))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self._prepared: dict[tuple[int, ...], PreparedFloatLayer] = {}  # by the input's shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._layer(x, None, None)

    def after_norm_silu(
        self, norm: nn.Module, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer of silu(norm(x)), + plus. x (B, C, H, W)."""
        if isinstance(norm, nn.GroupNorm) and norm.affine:
            return self._layer(x, norm, plus)
        return self._layer(F.silu(norm(x)), None, plus)

    def _layer(
        self, x: torch.Tensor, norm: nn.GroupNorm | None, plus: torch.Tensor | None
    ) -> torch.Tensor:
        """x (B, C, H, W) -> (B, O, H', W')."""
        stride = stride_of(x)
        if stride is None or (norm is not None and stride != x.shape[1]):
            x = x.float().contiguous(memory_format=torch.channels_last)
            stride = x.shape[1]
        prepared = self._prepared.get(x.shape) or self._prepare(x.shape)
        if plus is not None:
            plus = side_by_side(plus, prepared.output)
        out = torch.empty(prepared.output, memory_format=torch.channels_last)
        self.compiled.float_layer(prepared, x, stride, norm, plus, out)
        return out

    def _prepare(self, shape: tuple[int, ...]) -> PreparedFloatLayer:
        """Raises ValueError where the layer has other channels."""
        if shape[1] != self.channels:
            raise ValueError(f"the input has {shape[1]} channels, the layer {self.channels}")
        given = self.weight, self.bias, self.outputs, self.geometry
        made = self._prepared[shape] = PreparedFloatLayer(shape, *given)
        return made

    def _forget(self) -> None:
        self._prepared = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_prepared": {}}


class FloatLinear(nn.Linear):
    """A linear layer that is quick for few rows, as those of the time embedding are."""

    def __init__(self, linear: nn.Linear, compiled: Compiled):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.compiled = linear.weight, linear.bias, compiled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = [v for v in (x, self.weight, self.bias) if v is not None]
        fits = x.shape[-1] == self.in_features and 0 < x.numel() <= FEW * self.in_features
        if fits and all(_is_here(v) and v.is_contiguous() for v in tensors):
            return self.compiled.few_rows(x, self)
        return super().forward(x)


class FloatMatMul(nn.Module):
    """The second matrix product of attention, with the softmax before it in one pass."""

    def __init__(self, compiled: Compiled):
        super().__init__()
        self.compiled = compiled

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left, right)  # (B, N, K) @ (B, K, M) -> (B, N, M)

    def after_softmax(
        self, scores: torch.Tensor, scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scores * scale) @ right; scores are overwritten. scores (B, N, K), right
        (B, K, M)."""
        if scores.dtype != torch.float32 or not scores.is_contiguous():
            scores = scores.float().contiguous()
        return self(self.compiled.softmax_(scores, scale), right)

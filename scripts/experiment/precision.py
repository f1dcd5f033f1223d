"""--precision: how the layers of a denoiser that are not quantized compute.

    check_precision(name, device, backend)
    model = in_precision(model, name)

tf32: float32 whose matrix products keep 11 significant bits of their operands, on cards that have
it. bf16, fp16: convolutions, linear layers and the products of attention in half precision, norms
and softmax in float32 (torch.autocast). What goes in and comes out of the denoiser is float32 in
each, and so are the sampler and the first stage.

Quantized layers compute integers, which half precision would round. They keep float32, but for
those that are exact in TF32 (quant/backends/tensor_cores.py): `tf32` moves these to tensor cores.
Integer kernels for CUDA (--backend int8) take half precision for what lies between their layers.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ...quant.backends.tensor_cores import (
    IntegerProductLayer,
    IntegerProductMatMul,
    allow_tf32,
    use_tensor_cores,
)
from ...quant.runtime.denoiser import QuantDenoiser, replace_module
from ...quant.runtime.layers import QuantLayer, QuantMatMul
from ..common.errors import ConfigError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("float32", "tf32", *HALVES)
OLDEST_CARD = (8, 0)  # compute capability that has TF32 and bf16
HALVED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """--precision."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the layers that are not quantized (float32)",
    )


def check_precision(name: str, device: torch.device, backend: str = "fake") -> None:
    """Raises ConfigError where the device, or the backend of a quantized model, has no such
    precision."""
    reason = obstacle(name, device)
    if reason is not None:
        raise ConfigError(f"--precision {name}: {reason}; use --precision float32")
    if name != PRECISIONS[0] and backend != "fake":
        if device.type != "cuda":
            raise ConfigError(f"--precision {name}: needs full precision or --backend fake")
        if name not in HALVES:
            raise ConfigError(f"--precision {name}: --backend int8 takes bf16, fp16 or float32")


def obstacle(name: str, device: torch.device) -> str | None:
    """Why the device cannot compute in this precision."""
    if name == PRECISIONS[0]:
        return None
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if name == "fp16" or found >= OLDEST_CARD:
            return None
        return f"this card (compute capability {found[0]}.{found[1]}) has none; 8.0 and newer have"
    if name == "tf32":
        return "is of CUDA devices alone"
    known = torch.ops.mkldnn
    fits = (
        known._is_mkldnn_bf16_supported() if name == "bf16" else known._is_mkldnn_fp16_supported()
    )
    return None if fits else "this CPU has no instructions for it"


def in_precision(model: nn.Module, name: str) -> nn.Module:
    """The denoiser itself for float32, else a wrapper around it, whose layers change in place."""
    if name == PRECISIONS[0]:
        return model
    keep_maps_in = getattr(model, "keep_maps_in", None)  # of integer kernels for CUDA
    if keep_maps_in is None:
        return InPrecision(model, name)
    _keep_float32(model)
    keep_maps_in(HALVES[name])
    return model


class InPrecision(nn.Module):
    """Called like the denoiser that it wraps, in another precision; gives float32.

    float32_layers: quantized layers that stay in float32 -> why, for tf32.
    """

    def __init__(self, denoiser: nn.Module, name: str):
        super().__init__()
        self.denoiser, self.precision = denoiser, name
        self.float32_layers: dict[str, str] = {}
        if isinstance(denoiser, QuantDenoiser):
            if name == "tf32":
                self.float32_layers = use_tensor_cores(denoiser)
            _keep_float32(denoiser)
        if name in HALVES:
            for module in list(denoiser.modules()):
                if isinstance(module, HALVED):  # else autocast would convert them at each call
                    module.to(HALVES[name])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        half = HALVES.get(self.precision)
        autocast = nullcontext() if half is None else torch.autocast(x.device.type, half)
        with allow_tf32(half is None), autocast:
            return self.denoiser(x, *args, **kwargs).float()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what pipelines look for beside the call
            return getattr(super().__getattr__("denoiser"), name)


def precision_note(denoiser: object) -> str | None:
    """A line that names the quantized layers which are not exact in TF32."""
    kept: dict[str, str] = getattr(denoiser, "float32_layers", {})
    if not kept:
        return None
    names = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
    return f"note: layers that stay in float32, since TF32 would round their integers: {names}"


def _keep_float32(model: nn.Module) -> None:
    """Wraps, in place, the quantized layers that do not choose their precision themselves."""
    for name, module in list(model.denoiser.named_modules()):
        if isinstance(module, IntegerProductLayer | IntegerProductMatMul):
            continue
        if isinstance(module, QuantLayer):
            replace_module(model.denoiser, name, Float32Layer(module))
        elif isinstance(module, QuantMatMul):
            replace_module(model.denoiser, name, Float32MatMul(module))


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    with allow_tf32(False), torch.autocast(device.type, enabled=False):
        yield


class Float32Layer(nn.Module):
    """A quantized layer among others in another precision."""

    def __init__(self, layer: QuantLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _float32(x.device):
            return self.layer(x.float())

    def after_norm_silu(
        self, norm: nn.Module, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        with _float32(x.device):
            return self.layer.after_norm_silu(norm, x.float(), plus)


class Float32MatMul(nn.Module):
    """A quantized product of attention among layers in another precision."""

    def __init__(self, product: QuantMatMul):
        super().__init__()
        self.product = product

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        with _float32(left.device):
            return self.product(left.float(), right.float())

    def after_softmax(
        self, scores: torch.Tensor, scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        with _float32(scores.device):
            return self.product.after_softmax(scores.float(), scale, right.float())

"""The int8 backend: which layers of a deployed model run in integers, and why others do not.

    model = to_int8(load_quantized(path, denoiser))     # in place
    model.simulated                                     # {name: reason} of what was left as it is

On CUDA, layers of triton_layers.py do. What follows is about CPUs.

It computes what fake quantization computes, up to float rounding: activations are quantized once
per layer to uint8 with the scale of the current timestep, multiplied with one int8 weight, and come
back as float32 for norms, SiLU, softmax and residual sums. The products are those of cpp/ where
they are compiled, else oneDNN's.
"""

import importlib.util

import torch
from torch import nn

from ..runtime.denoiser import QuantDenoiser, replace_module
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer
from .native import Compiled
from .native_layers import CompiledLayer, CompiledMatMul, CompiledNorm, layers_are_independent
from .onednn import Int8Layer, Int8MatMul, TransientLayer, fits_int8, weights_fit
from .tapes import Tapes

OLDEST_CARD = (8, 0)  # compute capability: A100, RTX 30 and later
OPERATORS = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")


class Int8Error(RuntimeError):
    """The int8 backend cannot run here; the message says why, in one line."""


def int8_supported(device: str | torch.device = "cpu") -> str | None:
    """None, or the reason why there is no int8 execution on this device."""
    if torch.device(device).type == "cuda":
        return _cuda_obstacle(device)
    if torch.device(device).type != "cpu":
        return f"int8 kernels exist for x86 CPUs and CUDA, not for {torch.device(device).type}"
    if not all(hasattr(torch.ops.onednn, name) for name in OPERATORS):
        return "this PyTorch was built without oneDNN's int8 operators (x86 only)"
    if not torch.cpu._is_avx2_supported():
        return "this CPU lacks the AVX2 instructions"
    return None


def onednn_is_fast() -> bool:
    """Whether oneDNN's sums cannot saturate, so that one product per layer is enough."""
    return torch.cpu._is_vnni_supported()


def _cuda_obstacle(device: str | torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "this PyTorch came without Triton"
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CARD:
        wanted = ".".join(map(str, OLDEST_CARD))
        return f"this card has compute capability {found[0]}.{found[1]}, and int8 needs {wanted}"
    return None


def to_int8(
    model: QuantDenoiser,
    vnni: bool | None = None,
    compiled: Compiled | None = None,
    device: str | torch.device = "cpu",
) -> QuantDenoiser:
    """Replaces, in place, what can run in integers. model: deployed, on the CPU; device: where it
    will run.

    compiled: C++ for all of it but grouped and dilated convolutions, which oneDNN executes, as it
    does everything without. vnni: whether oneDNN may rely on AVX512-VNNI, by default where it is
    there. Without it, weights of 7 and 8 bits cost oneDNN two products each and attention stays
    simulated; the results are the same. What stays simulated is listed in model.simulated; layers
    of the timestep are not, which run in floating point by design, once per timestep. The uint8
    codes and float copies of replaced layers are freed as it goes. Raises Int8Error.
    """
    reason = int8_supported(device)
    if reason is not None:
        raise Int8Error(reason)
    if torch.device(device).type == "cuda":
        from .triton_layers import to_triton  # not every PyTorch comes with Triton

        return to_triton(model)
    vnni = onednn_is_fast() if vnni is None else vnni
    # Large layers first: what they leave behind in memory has room for the others.
    modules = sorted(model.denoiser.named_modules(), key=lambda item: -_size(item[1]))
    for name, module in modules:
        if isinstance(module, TimestepLayer):
            assert isinstance(module.layer, QuantLayer)  # not under calibration
            module.layer = TransientLayer(module.layer)
        elif _replaceable(model, name, module):
            reason = _obstacle(module, vnni, compiled)
            if reason is not None:
                model.simulated[name] = reason
                continue
            replace_module(model.denoiser, name, integer_module(module, vnni, compiled))
            _free(module)
        elif type(module) is nn.GroupNorm and module.affine:
            if compiled is not None and _products(compiled):
                replace_module(model.denoiser, name, CompiledNorm(module, compiled))
    if compiled is not None and compiled.products:
        model.caller = Tapes(model.denoiser, compiled, model.context)
    model.independent_rows = layers_are_independent(model.denoiser)
    return model.eval().requires_grad_(False)


def integer_module(
    module: QuantLayer | QuantMatMul, vnni: bool, compiled: Compiled | None = None
) -> nn.Module:
    """The integer form of a deployed module that has one; vnni, compiled: see `to_int8`."""
    products = compiled if _products(compiled) else None  # what multiplies
    if isinstance(module, QuantMatMul):
        return Int8MatMul(module) if products is None else CompiledMatMul(module, products)
    if products is not None and CompiledLayer.fits(module.op):
        return CompiledLayer(module, vnni, products)
    return Int8Layer(module, vnni, compiled)


def _products(compiled: Compiled | None) -> bool:
    return compiled is not None and compiled.products


def _replaceable(model: QuantDenoiser, name: str, module: nn.Module) -> bool:
    if isinstance(module, QuantMatMul):
        return not isinstance(module, Int8MatMul)
    parent = model.denoiser.get_submodule(name.rpartition(".")[0])
    return isinstance(module, QuantLayer) and not isinstance(parent, TimestepLayer)


def _obstacle(
    module: QuantLayer | QuantMatMul, vnni: bool, compiled: Compiled | None
) -> str | None:
    """Why this layer cannot, or should not, run in integers."""
    if isinstance(module, QuantMatMul):
        if not vnni and not _products(compiled):
            return "without AVX512-VNNI oneDNN's integer product is slower than the float one"
        if module.left.bits > 8:
            return f"its left operand has {module.left.bits} bits"
        return None if fits_int8(module.right) else "its right operand does not fit int8"
    if not len(module.inputs):
        return "its activations are not quantized"
    if module.qweight.device.type != "cpu":
        return f"it is on {module.qweight.device.type}"
    if module.op.is_conv and isinstance(module.op.padding, str):
        return f"padding '{module.op.padding}'"
    if module.split and module.op.is_conv and module.op.groups != 1:
        return "a grouped convolution behind a skip concatenation"
    return None if weights_fit(module) else "8-bit weights with a zero point other than 128"


def _size(module: nn.Module) -> int:
    return module.qweight.numel() if isinstance(module, QuantLayer) else 0


def _free(module: nn.Module) -> None:
    """Drops the big tensors of a replaced layer at once, whoever still refers to it."""
    if isinstance(module, QuantLayer):
        module.qweight, module._weight = module.qweight.new_empty(0), None

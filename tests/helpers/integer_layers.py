"""Deployed layers with given codes, and a small deployed network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.backends.build import CompileError
from tinydm.quant.backends.native import Compiled
from tinydm.quant.calibration.wrapping import BitPolicy, activation_quantizers, deploy, quantize
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.operation import Operation
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.layers import QuantLayer
from tinydm.quant.runtime.quantizer import ActivationQuantizer

TIMESTEPS = (0, 300, 600, 900)


def compiled_with(instructions: str) -> Compiled:
    """Skips where there is no compiler, or where it or the operating system lacks AMX."""
    try:
        made = Compiled(instructions)
    except CompileError as error:
        pytest.skip(f"not here: {error}")
    if instructions == "amx" and made.instructions == "avx512-vnni":
        pytest.skip("AMX is not known to the compiler, or not allowed to this process")
    assert made.instructions == instructions
    return made


def context() -> TimestepContext:
    return TimestepContext(TIMESTEPS, 1000)


def quantizer(at: TimestepContext, bits: int, zero_point: list[int] | None = None):
    """An activation quantizer of two groups with arbitrary scales, the second with a bit less."""
    top = 2**bits - 1
    zero = torch.randint(0, top + 1, (2,)) if zero_point is None else torch.tensor(zero_point)
    zero[1].clamp_(max=2 ** (bits - 1) - 1)
    scale = (torch.rand(2) + 0.5) * 6 / top
    return ActivationQuantizer(at, scale, zero, torch.tensor([0, 1, 1, 0]), [bits, bits - 1])


def quant_layer(
    at: TimestepContext,
    layer: nn.Module,
    bits: int = 4,
    act_bits: int = 8,
    split: int = 0,
    scaled: bool = False,
) -> QuantLayer:
    """Random codes with per-channel zero points: 128 at 8 bits, else anything."""
    codes = torch.randint(0, 2**bits, layer.weight.shape).to(torch.uint8)
    out = len(codes)
    zero = torch.full((out,), 128) if bits == 8 else torch.randint(0, 2**bits, (out,))
    inputs = [quantizer(at, act_bits) for _ in range(2 if split else 1)]
    return QuantLayer(
        Operation(layer),
        codes,
        torch.rand(out) * 0.1 + 0.01,
        zero.to(torch.uint8),
        layer.bias,
        bits,
        inputs,
        split,
        (torch.rand(layer.weight.shape[1]) + 0.5).half().float() if scaled else None,
    )


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def deployed(net: nn.Module, *call: torch.Tensor, **policy) -> QuantDenoiser:
    """A deployed model whose ranges come from one call of the network, in three groups."""
    at = TimestepContext(range(0, 1000, 50), 1000)
    model = quantize(net.eval(), at, BitPolicy(weight_scale="minmax", **policy))
    ranges, hooks = {}, []
    for name, q in activation_quantizers(model):
        q.enabled = False

        def see(_, args, name=name):
            ranges[name] = (args[0].min(), args[0].max())

        hooks.append(q.register_forward_pre_hook(see))
    model(*call)
    for hook in hooks:
        hook.remove()
    spread = torch.tensor([0.9, 1.0, 1.1])
    for name, q in activation_quantizers(model):
        q.enabled = True
        if name in ranges:
            low, high = ranges[name]
            of_groups = torch.tensor([q.bits, q.bits, q.bits - 1])
            q.set_ranges(low * spread, high * spread, torch.arange(20) % 3, of_groups)
    return deploy(model)


def small_unet(**policy) -> QuantDenoiser:
    """For images of 8 x 8, and larger ones."""
    levels = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
    net = DDIMUNet(ch=16, **levels, image_size=8, norm_groups=8)
    return deployed(net, torch.randn(4, 3, 8, 8), torch.full((4,), 500), **policy)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    peak = b.max() - b.min()
    return float(10 * torch.log10(peak**2 / F.mse_loss(a, b)))

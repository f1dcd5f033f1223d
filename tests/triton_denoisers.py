"""Whole denoisers on the integer kernels for CUDA; run as triton_cases.py is."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.integer_layers import context, deployed, quant_layer, quantizer
from tests.helpers.packed import small_model
from tests.helpers.tape import Tape
from tests.helpers.triton import DEVICE, nhwc
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.ldm_unet import LDMUNet
from tinydm.quant.backends import triton_launch as kernels
from tinydm.quant.backends.triton_layers import (
    CurrentTimestep,
    StepTables,
    TritonDenoiser,
    TritonLayer,
    TritonMatMul,
    _timesteps_computed,
    to_triton,
)
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.layers import QuantLayer, QuantMatMul
from tinydm.scripts.experiment.precision import in_precision

pytestmark = pytest.mark.usefixtures("inference")


def denoiser(kind: str, ends: int = 16) -> tuple[QuantDenoiser, tuple[torch.Tensor, ...]]:
    """A deployed network of every kind of layer, and what it is called with beside t. ends: bits of
    what its first and its last layer see."""
    shared = {"num_res_blocks": 1, "norm_groups": 4}
    if kind == "ddim":
        net: nn.Module = DDIMUNet(ch=8, ch_mult=(1, 2), attn_resolutions=(), image_size=8, **shared)
        call: tuple[torch.Tensor, ...] = (torch.randn(1, 3, 8, 8),)
    else:
        net = LDMUNet(
            in_channels=4,
            model_channels=8,
            out_channels=4,
            attention_resolutions=(),
            channel_mult=(1, 2),
            num_heads=2,
            use_spatial_transformer=True,
            context_dim=6,
            **shared,
        )
        call = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 6)
    x, *rest = call
    bits = {"weight": 4, "activation": 8, "first_last_activation": ends}
    fake = deployed(net, x, torch.full((1,), 500), *rest, **bits)
    fake = fake.to(DEVICE).to(memory_format=torch.channels_last)
    x = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    return fake, (x, *(v.to(DEVICE) for v in rest))


def integer_form(fake: QuantDenoiser) -> TritonDenoiser:
    new = to_triton(copy.deepcopy(fake))
    assert new.simulated == {}
    return new.to(DEVICE).to(memory_format=torch.channels_last)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root of the mean square difference, relative to b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize("kind", ["ddim", "ldm"])
def test_every_layer_of_a_denoiser(kind: str) -> None:
    """Each layer of a denoiser gets what its fake form gets."""
    fake, (x, *rest) = denoiser(kind)
    new = integer_form(fake)
    gaps: dict[str, float] = {}

    def compare(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            gaps[name] = relative(new.denoiser.get_submodule(name)(*args), out)

        return hook

    names = {
        n for n, m in new.denoiser.named_modules() if isinstance(m, TritonLayer | TritonMatMul)
    }
    for name in names:
        fake.denoiser.get_submodule(name).register_forward_hook(compare(name))
    t = torch.full((1,), 300, device=DEVICE)
    new.context.set(t)
    new.current.index.fill_(new.context.index)
    for module in fake.modules():  # hooks see `forward` alone
        if isinstance(module, QuantLayer):
            module.after_norm_silu = unfused(module)
        if isinstance(module, QuantMatMul):
            module.after_softmax = unfused_softmax(module)
    fake(x, t, *rest)
    assert set(gaps) == names and len(names) > 20
    assert max(gaps.values()) < 1e-6


def unfused(layer: nn.Module) -> Callable:
    return lambda norm, x, plus=None: layer(F.silu(norm(x))) + (0 if plus is None else plus)


def unfused_softmax(product: nn.Module) -> Callable:
    return lambda scores, scale, right: product(torch.softmax(scores * scale, -1), right)


@pytest.mark.parametrize(
    ("kind", "ends", "most"), [("ddim", 8, 1e-6), ("ldm", 8, 1e-6), ("ldm", 16, 2e-5)]
)
def test_denoiser(kind: str, ends: int, most: float) -> None:
    """Where a float that lies between two codes takes the other one, the two differ by more than
    rounding. Of 8 bits that is rare, and moves the result by a percent: hence not at every
    timestep. Of 16 bits, whose codes lie as close as roundings of their values, it happens at every
    other timestep, and moves the result by 1e-5."""
    fake, (x, *rest) = denoiser(kind, ends)
    new = integer_form(fake)
    gaps = []
    for timestep in (0, 300, 700):
        t = torch.full((1,), timestep, device=DEVICE)
        gaps.append(relative(new(x, t, *rest), fake(x, t, *rest)))
    assert sorted(gaps)[1] < most and max(gaps) < 0.03, gaps


def test_maps_in_half_precision() -> None:
    """Everything between layers has 16 bits; the result is that of float32 but for its rounding,
    which now and then takes another code."""
    fake, (x, *rest) = denoiser("ldm")
    new, half = integer_form(fake), in_precision(integer_form(fake), "fp16")
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        seen.update((args[0].dtype, out.dtype))

    for module in half.modules():
        if isinstance(module, TritonLayer):
            module.register_forward_hook(note)
    t = torch.full((1,), 300)
    out = half(x, t, *rest)
    assert seen == {torch.float16} and out.dtype is torch.float32
    assert 0 < relative(out, new(x, t, *rest)) < 0.05


def test_mixed_timesteps_run_row_by_row() -> None:
    fake = small_model().to(DEVICE)
    new = integer_form(fake)
    x, t = nhwc(2, 2, 4, 4), torch.tensor([3, 90], device=DEVICE)
    rows = [new(x[i : i + 1], t[i : i + 1]) for i in range(2)]
    assert torch.equal(new(x, t), torch.cat(rows)) and relative(torch.cat(rows), fake(x, t)) < 1e-3
    assert isinstance(new.context.index, torch.Tensor)  # as the correction of the output wants it


@pytest.mark.skipif(not kernels.INTERPRETED, reason="on a card there are CUDA graphs themselves")
def test_launches_recorded_at_one_timestep_serve_the_others() -> None:
    """As a CUDA graph does: the operations of one call, with the tensors that they read and wrote,
    carried out again after x, t and the index have changed."""
    fake, (x,) = denoiser("ddim")
    new = integer_form(fake)
    given, t = x.clone(), torch.full((1,), 300)
    tape = Tape()

    def set_timestep(timestep: int) -> None:
        t.fill_(timestep)
        new.context.set(t)
        new.current.index.fill_(new.context.index)

    set_timestep(300)
    with _timesteps_computed(new.denoiser), tape.recording():
        recorded = new.denoiser(given, t)
    first = recorded.clone()
    given.copy_(torch.randn_like(x))
    set_timestep(700)
    tape.play()
    assert relative(recorded, new(given, t)) < 1e-6 < relative(recorded, first)
    assert tape.launches > 50


@pytest.mark.skipif(kernels.INTERPRETED, reason="needs a card")
def test_a_graph_serves_all_timesteps() -> None:
    fake, (x, *rest) = denoiser("ldm")
    new = integer_form(fake)
    for timestep in (300, 700, 20):
        t = torch.full((1,), timestep, device=DEVICE)
        found = new(x, t, *rest)
        assert relative(found, new.denoiser(x, t, *rest)) < 1e-6
    assert len(new.graphs) == 1


def test_what_cannot_run_is_named_and_stays() -> None:
    at = context()
    net = nn.ModuleDict(
        {
            "groups": quant_layer(at, nn.Conv2d(8, 8, 3, groups=2)),
            "strides": quant_layer(at, nn.Conv2d(8, 8, 3, stride=(1, 2))),
            "named": quant_layer(at, nn.Conv2d(8, 8, 3, padding="same")),
            "long": quant_layer(at, nn.Linear(70000, 2)),
            "wide": QuantMatMul(quantizer(at, 16), quantizer(at, 8)),
            "good": quant_layer(at, nn.Conv2d(8, 8, 3)),
        }
    )
    model = to_triton(QuantDenoiser(net, at))
    assert set(model.simulated) == set(net) - {"good"}
    for name, word in (("groups", "groups"), ("named", "same"), ("long", "int32"), ("wide", "16")):
        assert word in model.simulated[name]
    assert isinstance(net["good"], TritonLayer) and isinstance(net["groups"], QuantLayer)


def test_a_map_that_is_too_large_is_refused() -> None:
    tables = StepTables(quantizer(context(), 8), CurrentTimestep())
    with pytest.raises(ValueError, match="micro_batch"):
        kernels.quantize_map(torch.empty(2, 2**15, 2**8, 2**8, device="meta"), tables.steps())

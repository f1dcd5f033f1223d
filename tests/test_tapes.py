"""Calls that are played from a recording, against the calls themselves: the same to the bit."""

import copy
import pickle
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.helpers.integer_layers import deployed, small_unet
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.ldm_unet import LDMUNet
from tinydm.quant.backends.build import COMPILERS, instructions_here
from tinydm.quant.backends.full_precision import to_fast_float
from tinydm.quant.backends.native import Compiled
from tinydm.quant.backends.recorder import Recorder
from tinydm.quant.backends.selection import to_int8
from tinydm.quant.backends.tapes import MOST_TAPES, Tape, Taped, Tapes

pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler here"),
    pytest.mark.skipif(not instructions_here(), reason="an x86 processor with AVX2 is needed"),
    pytest.mark.usefixtures("inference"),
]
Model = nn.Module
Call = Callable[[Model, int, int], torch.Tensor]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled()


def inputs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def of_pixels(model: Model, t: int, rows: int = 2) -> torch.Tensor:
    return model(inputs((rows, 3, 8, 8), t), torch.full((rows,), t))


def of_latents(model: Model, t: int, rows: int = 2) -> torch.Tensor:
    context = inputs((rows, 2, 6, 1), t + 1).flatten(2)
    return model(inputs((rows, 4, 8, 8), t), torch.full((rows,), t), context=context)


def full_unet() -> DDIMUNet:
    levels = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
    return DDIMUNet(ch=16, **levels, image_size=8, norm_groups=8).eval()


def latent_unet() -> LDMUNet:
    sizes = {"model_channels": 16, "num_res_blocks": 1, "attention_resolutions": [1, 2]}
    sizes |= {"in_channels": 4, "out_channels": 4, "channel_mult": [1, 2], "num_heads": 2}
    return LDMUNet(**sizes, norm_groups=8, use_spatial_transformer=True, context_dim=6).eval()


@pytest.fixture(scope="module", params=["pixels, int8", "latents, int8", "latents, float32"])
def made(request: pytest.FixtureRequest, compiled: Compiled) -> tuple[Model, Call]:
    """A model with compiled layers, quantized or not, and how it is called."""
    torch.manual_seed(0)
    pixels = "pixels" in request.param
    net, call = (full_unet(), of_pixels) if pixels else (latent_unet(), of_latents)
    with torch.inference_mode():
        for p in net.parameters():  # zero layers would hide what comes before them
            p.add_(0.05 * torch.randn_like(p))
        if "float32" in request.param:
            return to_fast_float(net, compiled), call
        example = [torch.randn(2, 3 if pixels else 4, 8, 8), torch.full((2,), 500)]
        example += [] if pixels else [torch.randn(2, 2, 6)]
        return to_int8(deployed(net, *example), None, compiled), call


@pytest.fixture
def kind(made: tuple[Model, Call]) -> tuple[Model, Tapes, Call]:
    model = copy.deepcopy(made[0])
    tapes = model.tapes if isinstance(model, Taped) else model.caller
    assert isinstance(tapes, Tapes)
    return model, tapes, made[1]


def directly(model: Model, tapes: Tapes, call: Call, t: int, rows: int = 2) -> torch.Tensor:
    """A call without a recording: the first one of its shape."""
    tapes.clear()
    return call(model, t, rows)


def tapes_of(tapes: Tapes) -> list[Tape]:
    return [v for v in tapes._tapes.values() if isinstance(v, Tape)]


def test_timesteps_and_batches(kind: tuple[Model, Tapes, Call]) -> None:
    """Any order of timesteps, calibrated or not, and of batch sizes."""
    model, tapes, call = kind
    asked = [(500, 2), (3, 2), (500, 1), (999, 2), (0, 1), (3, 2), (421, 1), (421, 2), (500, 2)]
    expected = [directly(model, tapes, call, *at) for at in asked]
    tapes.clear()
    found = [call(model, *at) for at in asked]
    assert len(tapes_of(tapes)) == 2
    kept = [out.clone() for out in found]
    call(model, 7, 2)
    for out, before, right in zip(found, kept, expected, strict=True):
        assert torch.equal(out, right) and torch.equal(out, before)  # nobody writes it again


def test_memory_is_shared(compiled: Compiled) -> None:
    """What is not needed any more makes room."""

    def what(x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(50):
            y = (y + x).cos()
        return y

    tapes, x = Tapes(Odd(what), compiled, None), torch.randn(4, 256)
    for _ in range(3):
        assert torch.equal(tapes(x), what(x))
    (tape,) = tapes_of(tapes)
    assert tape._memory.numel() == 2 * x.nbytes


def test_threads_and_contexts_of_pytorch(kind: tuple[Model, Tapes, Call]) -> None:
    """A tape is for one number of threads, and plays with and without inference mode."""
    model, tapes, call = kind
    expected, before = directly(model, tapes, call, 300), torch.get_num_threads()
    call(model, 300, 2)
    with torch.inference_mode(False):
        assert torch.equal(call(model, 300, 2), expected)
    assert torch.equal(call(model, 300, 2), expected)
    try:
        torch.set_num_threads(before + 1)
        for _ in range(3):
            torch.testing.assert_close(call(model, 300, 2), expected, rtol=1e-5, atol=1e-6)
        assert len(tapes_of(tapes)) == 2
    finally:
        torch.set_num_threads(before)


def test_a_hook_sees_every_call(kind: tuple[Model, Tapes, Call]) -> None:
    model, tapes, call = kind
    for t in (1, 2, 3):
        call(model, t, 2)
    name = "conv_in" if call is of_pixels else "input_blocks.0.0"
    layer = tapes.denoiser.get_submodule(name)
    seen: list[nn.Module] = []
    handle = layer.register_forward_hook(lambda module, *_: seen.append(module))
    call(model, 4, 2)
    assert len(seen) == 1
    handle.remove()
    call(model, 4, 2)
    assert len(seen) == 1


@pytest.mark.slow
def test_other_weights(kind: tuple[Model, Tapes, Call]) -> None:
    """Loaded or moved weights, a copy, and what is read again."""
    model, tapes, call = kind
    expected = [call(model, 400, 2) for _ in range(3)]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for right in expected:
            assert torch.equal(call(other, 400, 2), right)
    state = {k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert not tapes_of(tapes)
    changed = [call(model, 400, 2) for _ in range(3)]
    assert not torch.equal(changed[0], expected[0])
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    model.to(memory_format=torch.channels_last)
    assert not tapes_of(tapes)


def test_mixed_timesteps_are_called() -> None:
    model = to_int8(small_unet(), None, Compiled())
    x, t = inputs((2, 3, 8, 8), 0), torch.tensor([100, 900])
    expected = model(x, t)
    for _ in range(3):
        assert torch.equal(model(x, t), expected)
    assert isinstance(model.caller, Tapes) and not tapes_of(model.caller)


class Odd(nn.Module):
    """What no recording could play: `what` of x."""

    def __init__(self, what: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.what(x)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x.mean()),
        lambda x: x[x > 0],
        lambda x: x + torch.rand_like(x),
        lambda x: torch.cat([x] * 4),
    ],
    ids=["a branch", "a number", "a mask", "noise", "too large"],
)
def test_what_is_not_recorded(
    what: Callable, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinydm.quant.backends.recorder.MOST_BYTES", 8000)
    tapes = Tapes(Odd(what), compiled, None)
    for seed in range(4):
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        expected = what(x)
        torch.manual_seed(seed)
        assert torch.equal(tapes(x), expected)
    assert not tapes_of(tapes)


def test_operators_of_pytorch(compiled: Compiled) -> None:
    """With and without a form that writes into a given tensor, in place, views, several results."""

    def what(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.pad(x, (1, 2)).add_(1).relu_()
        low, high = y.aminmax(dim=1)
        z = torch.stack([y, y.flip(1)]).transpose(0, 1).reshape(len(x), -1)
        z[:, 0] = high
        values, _ = z.sort(dim=1)
        return torch.nn.functional.layer_norm(values, values.shape[1:]) + low[:, None]

    tapes = Tapes(Odd(what), compiled, None)
    for seed in range(4):
        x = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(tapes(x), what(x))
    assert len(tapes_of(tapes)) == 1


def test_copies_of_maps(compiled: Compiled) -> None:
    """Maps that PyTorch only copies, in any layout, and what looks like that."""
    pad, resize = torch.nn.functional.pad, torch.nn.functional.interpolate

    def what(x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x[:, :2] + 1], 1)
        wide = torch.cat([wide, 2 * wide]) + torch.cat([wide, wide.contiguous()])
        twice = resize(resize(wide, scale_factor=2.0), size=(20, 24))
        around = [pad(twice, (1, 2, 3, 1), value=0.5), pad(twice, (1, 2, 2, 2), mode="reflect")]
        around += [pad(twice, (-1, 4, 0, 4)), pad(twice, (2, 1, 0, 4), "constant", 2.0)]
        around += [resize(x, scale_factor=2.1).mean() + resize(wide, size=(9, 11)).mean() + twice]
        return torch.cat([v.double().flatten() for v in around]).exp()

    tapes = Tapes(Odd(what), compiled, None)
    for seed in range(4):
        x = inputs((2, 3, 5, 6), seed)
        assert torch.equal(tapes(x), what(x))
    (tape,) = tapes_of(tapes)
    assert sum(step.compiled for step in tape._steps) == 2 + 2 + 2 * 4 + 2


def test_constants_are_computed_once(compiled: Compiled) -> None:
    """Unless somebody writes them again."""

    def what(x: torch.Tensor) -> torch.Tensor:
        once = torch.arange(4.0).sqrt()
        written = torch.zeros(4)
        before = written + 1
        written.add_(once).add_(x)
        compiled.softmax_(once, 0.5)
        return torch.stack([x * torch.arange(4).cos(), once, before, written])

    tapes = Tapes(Odd(what), compiled, None)
    for seed in range(4):
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(tapes(x), what(x))
    (tape,) = tapes_of(tapes)
    assert len(tape._steps) == 8  # of 11: without arange, arange and cos


def test_few_shapes_are_kept(compiled: Compiled) -> None:
    tapes = Tapes(Odd(torch.exp), compiled, None)
    for rows in range(1, 2 * MOST_TAPES):
        for _ in range(3):
            assert torch.equal(tapes(torch.ones(rows)), torch.ones(rows).exp())
    assert len(tapes_of(tapes)) == MOST_TAPES


def test_simulated_layers_are_called(compiled: Compiled) -> None:
    """A layer that stays in floating point takes numbers of its timestep from Python."""
    model = to_int8(small_unet(), None, compiled)
    layers = dict(small_unet().denoiser.named_modules())
    model.denoiser.conv_out = layers["conv_out"]
    expected = [of_pixels(model, t) for t in (100, 600)]
    for _ in range(3):
        assert torch.equal(of_pixels(model, 600), expected[1])
    assert isinstance(model.caller, Tapes) and not tapes_of(model.caller)


def test_no_compiler_is_imported() -> None:
    """PyTorch would import its own at the first recording, which takes seconds."""
    assert not hasattr(Recorder.__torch_dispatch__, "__wrapped__")

"""The int8 backend against fake quantization: layers, networks, state and limits."""

import argparse
import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.helpers.integer_layers import (
    TIMESTEPS,
    compiled_with,
    context,
    deployed,
    psnr,
    quant_layer,
    quantizer,
    same,
    small_unet,
)
from tinydm.models.ldm_unet import LDMUNet
from tinydm.quant.backends import selection as int8
from tinydm.quant.backends.build import instructions_here
from tinydm.quant.backends.native import Compiled
from tinydm.quant.backends.onednn import Int8Layer, Int8MatMul
from tinydm.quant.backends.selection import (
    Int8Error,
    int8_supported,
    integer_module,
    onednn_is_fast,
    to_int8,
)
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.layers import QuantLayer, QuantMatMul
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.assembly import select_backend
from tinydm.scripts.experiment.backend import add_backend, read_backend, slow_backend

REASON = int8_supported()
pytestmark = pytest.mark.usefixtures("inference")


@dataclass(frozen=True)
class Kind:
    """A way to execute: by oneDNN, with or without AVX512-VNNI, or by compiled code."""

    vnni: bool
    compiled: Compiled | None

    @property
    def attention(self) -> bool:
        """Whether the products of attention run in integers."""
        return self.vnni or self.compiled is not None

    def module(self, quantized: nn.Module) -> nn.Module:
        return integer_module(quantized, self.vnni, self.compiled)

    def network(self, model: QuantDenoiser) -> QuantDenoiser:
        return to_int8(model, self.vnni, self.compiled)


@pytest.fixture(scope="module", params=["vnni", "no vnni", *instructions_here()])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every kind that this processor has."""
    if REASON is not None:
        pytest.skip(f"no int8 execution here: {REASON}")
    if request.param == "vnni" and not onednn_is_fast():
        pytest.skip("oneDNN needs AVX512-VNNI")
    compiled = compiled_with(request.param) if request.param in instructions_here() else None
    return Kind(request.param == "vnni", compiled)


def check_layer(layer: nn.Module, x: torch.Tensor, kind: Kind, **kwargs) -> None:
    """Equal at every group of timesteps, and for a batch that mixes them."""
    at = context()
    fake = quant_layer(at, layer, **kwargs)
    exact = kind.module(copy.deepcopy(fake))
    for q in exact.inputs:
        q.context = at
    for t in TIMESTEPS:
        at.set(torch.full((len(x),), t))
        same(exact(x), fake(x))
    at.set(torch.tensor(TIMESTEPS * len(x))[: len(x)])
    same(exact(x), fake(x))


CONVOLUTIONS = [
    dict(c=3, o=8, k=3, padding=1),
    dict(c=16, o=16, k=3, padding=1, split=8),
    dict(c=24, o=8, k=1, split=7, bias=False),
    dict(c=8, o=3, k=3, stride=2),
    dict(c=8, o=8, k=3, stride=2, padding=2, dilation=2),
    dict(c=8, o=12, k=3, padding=1, groups=4),
    dict(c=6, o=6, k=5, padding=(2, 1), groups=6, bias=False),
    dict(c=8, o=5, k=(3, 1), stride=(1, 2), padding=(1, 0)),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution(shape, kind: Kind):
    shape = dict(shape)
    c, split = shape.pop("c"), shape.pop("split", 0)
    layer = nn.Conv2d(c, shape.pop("o"), shape.pop("k"), **shape)
    x = 2 * torch.randn(3, c, 9, 11)
    check_layer(layer, x.contiguous(memory_format=torch.channels_last), kind, split=split)
    check_layer(layer, x, kind, split=split, bits=8)
    check_layer(layer, x.expand(3, -1, -1, -1)[:, :, ::2], kind, split=split, bits=3)
    if layer.groups == 1:  # others are never scaled
        check_layer(layer, x, kind, split=split, scaled=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_and_activation_bits(bits, kind: Kind):
    layer, x = nn.Conv2d(8, 8, 3, padding=1), 2 * torch.randn(2, 8, 6, 6)
    for act_bits in (bits, 8, 8 + bits):
        check_layer(layer, x, kind, bits=bits, act_bits=act_bits)


@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (2, 3, 4, 12)], ids=str)
def test_linear(shape, kind: Kind):
    x = 2 * torch.randn(shape)
    check_layer(nn.Linear(12, 20), x, kind, bits=8)
    check_layer(nn.Linear(12, 7, bias=False), x, kind, split=5)
    check_layer(nn.Linear(12, 7), x, kind, act_bits=16)
    check_layer(nn.Linear(12, 7), x, kind, split=5, scaled=True)


def test_conv1d(kind: Kind):
    x = 2 * torch.randn(3, 8, 10)
    check_layer(nn.Conv1d(8, 24, 1), x, kind)
    check_layer(nn.Conv1d(8, 24, 1), x.transpose(1, 2).contiguous().transpose(1, 2), kind, split=3)
    check_layer(nn.Conv1d(8, 6, 3, stride=2, padding=2, dilation=2, groups=2), x, kind, bits=8)
    check_layer(nn.Conv1d(8, 6, 3, padding=1), x, kind, scaled=True)


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("layer", [nn.Conv2d(64, 4, 3, padding=1), nn.Linear(64, 4)], ids=str)
def test_largest_sums_do_not_saturate(layer: nn.Module, code: int, kind: Kind):
    """Weights of -128 or 127 against activations at the end of their range."""
    at = context()
    fake = quant_layer(at, layer, bits=8)
    fake.qweight[:] = code
    x = torch.full((2, 64) if isinstance(layer, nn.Linear) else (2, 64, 5, 5), 1e3)
    for t in TIMESTEPS:
        at.set(torch.full((2,), t))
        same(kind.module(copy.deepcopy(fake))(x), fake(x))


def test_padding_is_the_zero_point(kind: Kind):
    """Zero padding must mean x = 0, whatever its code."""
    at = context()
    fake = quant_layer(at, nn.Conv2d(4, 4, 3, padding=1))
    at.set(torch.tensor([300]))
    same(
        kind.module(fake)(torch.zeros(1, 4, 5, 5)),
        fake.bias.view(1, -1, 1, 1).expand(1, 4, 5, 5).contiguous(),
    )


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("left_zero", [[0, 0], [128, 128], [3, 200]], ids=str)
def test_matrix_product(left_zero: list[int], by_row: bool, kind: Kind):
    at = context()
    fake = QuantMatMul(quantizer(at, 8, left_zero), quantizer(at, 8, [128, 128]), by_row)
    exact = kind.module(fake) if kind.attention else Int8MatMul(fake)
    left, right = 2 * torch.randn(4, 6, 10), 2 * torch.randn(4, 10, 7)
    if by_row:
        left = torch.softmax(left, -1)
    for t in TIMESTEPS:
        at.set(torch.full((4,), t))
        same(exact(left, right), fake(left, right))
        strided = left.transpose(1, 2).contiguous().transpose(1, 2)
        same(exact(strided, right.transpose(1, 2).contiguous().transpose(1, 2)), fake(left, right))
    at.set(torch.tensor(TIMESTEPS))
    same(exact(left, right), fake(left, right))


@pytest.mark.parametrize("by_row", [False, True])
def test_a_product_behind_softmax_is_the_same_product(by_row: bool):
    """In integers there as well, and the fake one up to rounding."""
    if REASON:
        pytest.skip(REASON)
    at = context()
    fake = QuantMatMul(quantizer(at, 8, [0, 0]), quantizer(at, 8, [128, 128]), by_row)
    scores, right = 9 * torch.randn(4, 6, 10), 2 * torch.randn(4, 10, 7)
    for t in (torch.full((4,), 300), torch.tensor(TIMESTEPS)):
        at.set(t)
        for product in (fake, Int8MatMul(fake)):
            expected = product(torch.softmax(scores * 0.3, -1), right)
            given = product.after_softmax(scores, 0.3, right)
            if product is fake:
                same(given, expected)
            else:
                assert torch.equal(given, expected)


def simulated(model: QuantDenoiser, kind: Kind) -> set[str]:
    """Names of the layers that stay simulated; those of attention are expected to if oneDNN has no
    VNNI."""
    products = {n for n, m in model.denoiser.named_modules() if type(m) is QuantMatMul}
    assert not products if kind.attention else products
    return model.simulated.keys() - products


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "by_row"), [(4, True), (8, False)])
def test_network(bits: int, by_row: bool, kind: Kind):
    """With scaled channels as well."""
    fake = small_unet(weight=bits, softmax_by_row=by_row)
    for layer in (m for m in fake.modules() if isinstance(m, QuantLayer) and len(m.inputs)):
        layer.channel_scale = (torch.rand(layer.qweight.shape[1]) + 0.5).half().float()
    exact = kind.network(copy.deepcopy(fake))
    assert simulated(exact, kind) == set()
    assert not any(m._weight is not None for m in exact.modules() if isinstance(m, QuantLayer))
    x = torch.randn(4, 3, 8, 8)
    for t in (0, 70, 500, 999):
        step = torch.full((4,), t)
        assert psnr(exact(x, step), fake(x, step)) >= 45
    mixed = torch.tensor([0, 70, 500, 999])
    assert psnr(exact(x, mixed), fake(x, mixed)) >= 45


@pytest.mark.slow
@pytest.mark.parametrize("transformer", [False, True])
def test_latent_network(transformer, kind: Kind):
    params = dict(in_channels=3, model_channels=16, out_channels=3, num_res_blocks=1, num_heads=2)
    params |= dict(attention_resolutions=[1, 2], channel_mult=[1, 2], norm_groups=8)
    if transformer:
        params |= dict(use_spatial_transformer=True, context_dim=12)
    net = LDMUNet(**params)
    call = [torch.randn(2, 3, 8, 8), torch.full((2,), 500)]
    if transformer:
        call.append(torch.randn(2, 3, 12))
    fake = deployed(net, *call)
    exact = kind.network(copy.deepcopy(fake))
    assert simulated(exact, kind) == set()
    assert psnr(exact(*call), fake(*call)) >= 45


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch(kind: Kind):
    model = kind.network(small_unet())
    x, t = torch.randn(5, 3, 8, 8), torch.full((5,), 300)
    assert psnr(model(x, t), torch.cat([model(row[None], t[:1]) for row in x])) >= 45


@pytest.mark.slow
def test_state_is_plain(kind: Kind):
    """No packed tensor in the state, before or after calls, and copies compute the same."""
    model = kind.network(small_unet())
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 300)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x, t)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.layout == torch.strided and torch.equal(value, before[name]), name
    model(x, t)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, t), expected)
    assert torch.equal(model.to(memory_format=torch.channels_last)(x, t), expected)
    other = kind.network(small_unet())
    other(x, torch.full((2,), 700))  # packs other weights
    other.load_state_dict(after)
    assert torch.equal(other(x, t), expected)


@pytest.mark.slow
def test_memory_is_one_byte_per_weight(kind: Kind):
    model = kind.network(small_unet())
    model(torch.randn(2, 3, 8, 8), torch.full((2,), 300))
    for layer in (m for m in model.modules() if isinstance(m, Int8Layer)):
        if kind.compiled is None:
            assert all(w.codes.numel() == 0 for w in layer.weights)  # only the packed form is kept
        assert all(b.dtype != torch.float32 or b.dim() == 1 for b in layer.buffers())


@pytest.mark.slow
def test_what_stays_simulated_is_listed(kind: Kind):
    model = small_unet()
    integers = list(kind.network(copy.deepcopy(model)).modules())
    assert any(isinstance(m, Int8Layer) for m in integers)
    assert any(isinstance(m, Int8MatMul) for m in integers) == kind.attention
    first, second = model.denoiser.conv_in, model.denoiser.conv_out
    parts = first.op, first.qweight, first.w_scale, first.w_zero_point, first.bias, first.bits
    model.denoiser.conv_in = QuantLayer(*parts, inputs=[], split=0)
    second.w_zero_point[0], second.qweight[0, 0, 0, 0] = 3, 255
    second._weight = None
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 300)
    expected = model(x, t)
    exact = kind.network(model)
    assert simulated(exact, kind) == {"conv_in", "conv_out"}
    assert "zero point" in exact.simulated["conv_out"]
    assert psnr(exact(x, t), expected) >= 45


def test_refusals(monkeypatch):
    """One line where there are no integer kernels."""
    model = nn.Identity()
    assert select_backend(model, "fake", "cuda") is model
    with pytest.raises(ConfigError, match="CUDA") as refusal:
        select_backend(model, "int8", "cuda")
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert "AVX2" in int8_supported() or "oneDNN" in int8_supported()
    with pytest.raises(ConfigError, match="int8: .* use --backend fake$"):
        select_backend(model, "int8")
    with pytest.raises(Int8Error):
        to_int8(model)
    monkeypatch.setattr(int8, "OPERATORS", ("no_such_operator",))
    assert "oneDNN" in int8_supported()


def test_options(monkeypatch, capsys):
    """int8-avx2 is an earlier name of int8; without VNNI, int8 says that it wants --compile."""
    parser = argparse.ArgumentParser()
    add_backend(parser)
    for name in ("int8", "int8-avx2"):
        assert parser.parse_args(["--backend", name]).backend == "int8"
    given = parser.parse_args(["--backend", "int8"])
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda fast=fast: fast)
        assert read_backend(given).name == "int8"
        assert ("needs --compile" in capsys.readouterr().out) == (not fast)
    assert slow_backend(parser.parse_args(["--backend", "int8", "--compile"])) is None
    assert slow_backend(parser.parse_args([])) is None

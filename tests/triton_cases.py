"""The integer kernels for CUDA: on a CPU under Triton's interpreter, on a card where there is one.

    TRITON_INTERPRET=1 python -m pytest tests/triton_cases.py
    python -m pytest tests/triton_cases.py             # where there is a card

tests/test_triton.py runs both, in processes of their own: Triton is interpreted in a whole process
or not at all.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton.runtime.interpreter import interpreter_builder

from tests.helpers.integer_layers import (
    TIMESTEPS,
    context,
    quant_layer,
    quantizer,
    same,
)
from tests.helpers.triton import DEVICE, LOOKS_FOR_OVERFLOWS, at_timestep, nhwc
from tinydm.quant.backends import triton_launch as kernels
from tinydm.quant.backends.onednn import CodeQuantizer
from tinydm.quant.backends.triton_layers import (
    CurrentTimestep,
    StepTables,
    TritonLayer,
    TritonMatMul,
)
from tinydm.quant.core.affine import per_channel
from tinydm.quant.runtime.layers import QuantLayer, QuantMatMul
from tinydm.quant.runtime.packing import pack, unpack

pytestmark = pytest.mark.usefixtures("inference")


def pair_of(fake: QuantLayer, packed: bool = False) -> tuple[TritonLayer, CurrentTimestep]:
    current = CurrentTimestep().to(DEVICE)
    return TritonLayer(fake, current, packed), current


def exact_sums(fake: QuantLayer, x: torch.Tensor, index: int) -> torch.Tensor:
    """sum w (q - z) of a layer of one part, from the codes as the file packs them, in integers."""
    packed = pack(fake.qweight, fake.bits)
    w = unpack(packed, fake.bits, fake.qweight.numel()).view(fake.qweight.shape)
    w = w.double() - per_channel(fake.w_zero_point.cpu().double(), w)
    step = fake.inputs[0].step(index)
    q = torch.mul(x.cpu(), step.inverse).round().clamp(step.low, step.high)
    return fake.op(q.double(), w, None).long()  # below 2^53: exact


def raw_sums(layer: TritonLayer, x: torch.Tensor) -> torch.Tensor:
    """The same from the kernels, of the first part and of an 8-bit input."""
    part = layer.parts[0]
    border = layer.padding[0], layer.padding[1]
    codes = kernels.quantize_map(x, part.tables.steps(), part.factors, border)
    return part.product(codes, torch.int32, stride=layer.stride).cpu().long()


# ---- codes ----


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_codes_are_those_of_fake_quantization(bits: int) -> None:
    at, current = context(), CurrentTimestep().to(DEVICE)
    q = quantizer(at, bits).to(DEVICE)
    tables = StepTables(q, current).to(DEVICE)
    maps = [nhwc(2, 20, 5, 6), nhwc(2, 20, 5, 6).contiguous(), nhwc(2, 31, 5, 6)[:, 4:24]]
    for x, t in zip(maps, TIMESTEPS, strict=False):
        index = at_timestep(current, at, t)
        found = kernels.quantize_map(x, tables.steps(), border=(1, 2)).permute(0, 1, 4, 2, 3)
        planes = CodeQuantizer(q).codes(x, index)
        assert len(found) == len(planes)
        for plane, (codes, _, zero) in zip(found.int() + 128, planes, strict=True):
            assert torch.equal(plane, F.pad(codes.int(), (2, 2, 1, 1), value=zero))


@pytest.mark.parametrize("shape", [(2, 32, 8, 8, 8), (1, 48, 8, 5, 7), (2, 12, 4, 9, 3)], ids=str)
def test_norm_silu_factors_and_codes_in_one(shape: tuple[int, ...]) -> None:
    """Another code than that of float64 only where a value lies between two."""
    b, c, groups, h, w = shape
    at, current = context(), CurrentTimestep().to(DEVICE)
    q = quantizer(at, 8).to(DEVICE)
    norm = nn.GroupNorm(groups, c, eps=1e-6)
    nn.init.normal_(norm.weight, 1, 0.3), nn.init.normal_(norm.bias, 0, 0.5)
    factors = torch.rand(c) + 0.5
    x = nhwc(b, c, h, w, scale=4) + 7  # far from zero, where squares lose digits
    index = at_timestep(current, at, 300)
    step = q.step(index)
    v = F.silu(copy.deepcopy(norm).double()(x.cpu().double()))
    v = v * (factors * torch.tensor(step.inverse)).double().view(-1, 1, 1)
    expected = v.round().clamp(step.low, step.high) + step.zero_point
    tables = StepTables(q, current)
    found = kernels.quantize_map(x, tables.steps(), factors.to(DEVICE), norm=norm.to(DEVICE))
    off = (found[0].permute(0, 3, 1, 2).cpu().int() + 128 - expected).abs()
    between = (v - v.floor() - 0.5).abs() < 1e-3
    assert off.max() <= 1 and not off[~between].any() and off.count_nonzero() < 3


# ---- sums ----

CONVOLUTIONS = [  # channels, outputs, kernel, stride, padding, height, width, batch
    (20, 11, 3, 1, 1, 6, 5, 2),
    (32, 40, 1, 1, 0, 4, 4, 3),
    (16, 24, 3, 2, 1, 7, 8, 2),
    (16, 24, 3, 2, 0, 9, 9, 1),  # DDIM's, padded at two sides before
    (3, 8, 3, 1, 1, 4, 4, 1),
    (6, 7, (3, 1), 1, (1, 0), 5, 3, 2),
    (5, 7, (2, 1), 1, 0, 5, 3, 2),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("bits", "packed"), [(4, False), (4, True), (8, False)])
def test_convolution(shape: tuple, bits: int, packed: bool) -> None:
    c, o, k, stride, padding, h, w, b = shape
    at = context()
    fake = quant_layer(at, nn.Conv2d(c, o, k, stride, padding), bits)
    x = nhwc(b, c, h, w)
    fake = fake.to(DEVICE)
    layer, current = pair_of(fake, packed)
    assert (layer.parts[0].zero_point is not None) == (packed and c % 2 == 0)
    for t in (300, 900) if bits == 4 and c == 20 else (300,):  # of both groups
        index = at_timestep(current, at, t)
        assert torch.equal(raw_sums(layer, x), exact_sums(fake, x, index))
        same(layer(x), fake(x))


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_that_do_not_fit(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 blocks of pixels, of outputs and of channels 2, the last of each not full."""
    tiles = {"BM": 16, "BN": 16, "BK": 32, "GROUP_M": 2}
    monkeypatch.setattr(kernels, "product_tiles", lambda *sizes: tiles)
    at = context()
    fake = quant_layer(at, nn.Conv2d(50, 35, 2)).to(DEVICE)
    layer, current = pair_of(fake, packed)
    x = nhwc(1, 50, 6, 8)
    index = at_timestep(current, at, 300)
    assert torch.equal(raw_sums(layer, x), exact_sums(fake, x, index))


def test_largest_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and weights at their ends, where int32 is used the most."""
    monkeypatch.setattr(interpreter_builder, "options", LOOKS_FOR_OVERFLOWS)
    at = context()
    fake = quant_layer(at, nn.Linear(4096, 3), 8)
    fake.qweight[0], fake.qweight[1], fake.qweight[2] = 0, 255, 128
    fake.inputs[0].zero_point.copy_(torch.tensor([0, 255]))
    fake = fake.to(DEVICE)
    layer, current = pair_of(fake)
    for t, x in ((0, torch.full((1, 4096), 1e6)), (300, torch.full((1, 4096), -1e6))):
        index = at_timestep(current, at, t)
        rows = x.to(DEVICE).view(1, 1, 1, -1).permute(0, 3, 1, 2)
        sums = raw_sums(layer, rows).view(1, -1)
        assert torch.equal(sums, exact_sums(fake, x, index))
        assert sums.abs().max() == 4096 * 255 * 128


@pytest.mark.parametrize("shape", [(33, 64), (2, 5, 50), (7, 13)], ids=str)
def test_linear_and_packed_weights_as_in_the_file(shape: tuple[int, ...]) -> None:
    """Both nibbles; an odd row stays int8, since it does not end with a byte."""
    at, inner = context(), shape[-1]
    fake = quant_layer(at, nn.Linear(inner, 24)).to(DEVICE)
    x = 2 * torch.randn(shape, device=DEVICE)
    (plain, current), (packed, packed_current) = pair_of(fake), pair_of(fake, True)
    if inner % 2 == 0:
        assert torch.equal(packed.parts[0].codes.cpu().flatten(), pack(fake.qweight, 4))
    index = at_timestep(current, at, 300)
    packed_current.index.fill_(index)
    assert torch.equal(plain(x), packed(x))
    rows = x.reshape(1, 1, -1, inner).permute(0, 3, 1, 2)
    for layer in (plain, packed):
        sums = raw_sums(layer, rows).squeeze(2).squeeze(0).t().reshape(*shape[:-1], -1)
        assert torch.equal(sums, exact_sums(fake, x, index))
    same(plain(x), fake(x))


OTHERS: list[tuple[nn.Module, tuple[int, ...], dict]] = [
    (nn.Conv1d(10, 6, 1), (2, 10, 7), {}),
    (nn.Conv1d(8, 6, 3, padding=1), (2, 8, 7), {"bits": 8}),
    (nn.Conv2d(24, 8, 1), (2, 24, 4, 3), {"split": 9}),
    (nn.Conv2d(24, 8, 1, bias=False), (2, 24, 4, 3), {"split": 8, "scaled": True}),
    (nn.Conv2d(16, 8, 3, padding=1), (2, 16, 4, 3), {"scaled": True}),
    (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 4, 4), {"act_bits": 16}),
    (nn.Linear(12, 7), (2, 3, 12), {"split": 5, "act_bits": 16, "bits": 8}),
]


@pytest.mark.parametrize(("module", "shape", "given"), OTHERS, ids=str)
def test_other_layers(module: nn.Module, shape: tuple[int, ...], given: dict) -> None:
    """Splits, factors of the channels, 16 bits as two products, one dimension."""
    at = context()
    fake = quant_layer(at, module, **given).to(DEVICE)
    layer, current = pair_of(fake, packed=True)
    x = 2 * torch.randn(shape, device=DEVICE)
    for t in TIMESTEPS[:2]:
        at_timestep(current, at, t)
        same(layer(x), fake(x))


def test_what_is_added_on_the_way() -> None:
    """A residual and a time embedding, after norm and SiLU or not; half precision."""
    at = context()
    fake = quant_layer(at, nn.Conv2d(16, 24, 3, padding=1)).to(DEVICE)
    layer, current = pair_of(fake)
    at_timestep(current, at, 600)
    norm, x = nn.GroupNorm(4, 16).to(DEVICE), nhwc(2, 16, 4, 5)
    for shape in ((2, 24, 4, 5), (2, 24, 1, 1), (1, 24, 1, 1)):
        plus = torch.randn(shape, device=DEVICE)
        same(layer.after_norm_silu(norm, x, plus), fake.after_norm_silu(norm, x, plus))
    out = layer(x.half())
    assert out.dtype is torch.float16 and out.is_contiguous(memory_format=torch.channels_last)
    assert (out.float() - fake(x.half().float())).abs().max() <= 2e-3 * out.abs().max()


# ---- attention ----


def operands(b: int, n: int, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = torch.randn(b, n, k), torch.randn(b, m, k)
    return left.to(DEVICE), right.transpose(1, 2).to(DEVICE)


@pytest.mark.parametrize("sizes", [(2, 9, 20, 7), (3, 70, 40, 33)], ids=str)
def test_attention_sums(sizes: tuple[int, ...]) -> None:
    at, current = context(), CurrentTimestep().to(DEVICE)
    fake = QuantMatMul(quantizer(at, 8), quantizer(at, 6)).to(DEVICE)
    layer = TritonMatMul(fake, current)
    left, right = operands(*sizes)
    index = at_timestep(current, at, 300)
    q, k = (
        torch.mul(v, s.inverse).round().clamp(s.low, s.high).double()
        for v, s in ((left, fake.left.step(index)), (right, fake.right.step(index)))
    )
    steps = layer.left.steps(), layer.right.steps()
    sums = kernels.attention_product(left, right, steps, torch.int32)
    assert torch.equal(sums.long(), (q @ k).long())
    same(layer(left, right), fake(left, right))


@pytest.mark.parametrize("by_row", [False, True])
def test_attention_after_softmax(by_row: bool) -> None:
    at, current = context(), CurrentTimestep().to(DEVICE)
    left = quantizer(at, 8, [0, 0])
    left.scale.fill_(1 / 255)
    fake = QuantMatMul(left, quantizer(at, 8), by_row).to(DEVICE)
    layer = TritonMatMul(fake, current)
    scores, right = operands(2, 21, 35, 8)
    at_timestep(current, at, 300)
    same(layer.after_softmax(scores, 0.7, right), fake.after_softmax(scores, 0.7, right))
    probabilities = torch.softmax(scores, -1)
    same(layer(probabilities, right), fake(probabilities, right))

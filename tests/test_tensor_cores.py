"""Fake quantization with integers as the operands of TF32: what a tensor core would round, and
which layers it would not compute exactly.

python -m pytest tests/test_tensor_cores.py
"""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.integer_layers import (
    TIMESTEPS,
    context,
    quant_layer,
    quantizer,
    same,
    small_unet,
)
from tests.helpers.tensor_cores import to_tf32
from tinydm.quant.backends.onednn import integer_codes
from tinydm.quant.backends.tensor_cores import (
    EXACT_SUM,
    IntegerProductLayer,
    allow_tf32,
    float32_reason,
    use_tensor_cores,
)
from tinydm.quant.runtime.layers import QuantLayer

pytestmark = pytest.mark.usefixtures("inference")


LAYERS = [
    (nn.Conv2d(64, 24, 3, padding=1), (2, 64, 6, 5)),
    (nn.Conv2d(24, 8, 1, bias=False), (2, 24, 4, 4)),
    (nn.Linear(320, 40), (2, 9, 320)),
    (nn.Conv1d(10, 6, 1), (2, 10, 7)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_loses_nothing(
    module: nn.Module, shape: tuple[int, ...], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With operands rounded to TF32 the sums are those of integers; dequantized weights are not."""
    at = context()
    fake = quant_layer(at, module, bits, scaled=True)
    assert float32_reason(fake) is None
    exact, x = IntegerProductLayer(fake), 2 * torch.randn(shape)
    bare, seen = fake.op._call, []

    def rounded(q, weight, bias, *geometry):
        seen.append((q.clone(), bare(to_tf32(q), to_tf32(weight), None, *geometry)))
        return bare(to_tf32(q), to_tf32(weight), bias, *geometry)

    for t in TIMESTEPS[:2]:
        at.set(torch.full((2,), t))
        expected = fake(x)
        monkeypatch.setattr(fake.op, "_call", rounded)
        same(exact(x), expected)
        q, sums = seen[-1]
        assert torch.equal(sums.double(), bare(q.double(), integer_codes(fake).double(), None,
                                               *fake.op._geometry))  # fmt: skip
        lossy = fake(x)
        assert (lossy - expected).abs().max() > 2e-5 * expected.abs().max()
        monkeypatch.setattr(fake.op, "_call", bare)
    at.set(torch.tensor(TIMESTEPS[:2]))
    assert torch.equal(exact(x), fake(x))  # mixed timesteps


def test_layers_that_could_round_stay() -> None:
    at = context()
    assert "16 bits" in (float32_reason(quant_layer(at, nn.Linear(8, 4), act_bits=16)) or "")
    assert "two scales" in (float32_reason(quant_layer(at, nn.Linear(8, 4), split=3)) or "")
    layer = quant_layer(at, nn.Linear(1000, 2), 8)
    layer.inputs[0] = quantizer(at, 8, [0, 0])  # q - z up to 255
    layer.qweight.fill_(128)
    layer.qweight[1, :514] = 0  # w = -128: 514 * 128 * 255 = 16776960
    assert float32_reason(layer) is None
    layer.qweight[1, 514] = 0
    assert str(515 * 128 * 255) in (float32_reason(layer) or "") and EXACT_SUM <= 515 * 128 * 255


def test_a_denoiser() -> None:
    fake = small_unet(weight=4, activation=8)
    exact = copy.deepcopy(fake)
    named = use_tensor_cores(exact)
    assert {"conv_in", "conv_out"} <= set(named)
    replaced = [m for m in exact.modules() if isinstance(m, IntegerProductLayer)]
    layers = [m for m in exact.modules() if isinstance(m, QuantLayer)]
    assert len(replaced) > 20 and len(layers) > len(replaced)
    assert list(exact.state_dict()) == list(fake.state_dict())
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    gaps = []
    for t in (100, 500, 900):
        a, b = (model(x, torch.full((2,), t)) for model in (exact, fake))
        gaps.append(float((a - b).square().mean() / b.square().mean()))
    assert sorted(gaps)[1] < 1e-3  # a value between two codes may take the other one


def test_tf32_is_allowed_inside_alone() -> None:
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        with allow_tf32(True):
            assert all(flag.allow_tf32 for flag in flags)
        assert not any(flag.allow_tf32 for flag in flags)
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value

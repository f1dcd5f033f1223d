"""Logarithmic codes of attention probabilities.

python -m pytest tests/test_quant_log2.py
"""

from pathlib import Path

import torch

from quant.context import TimestepContext
from quant.grouping import assign
from quant.int8 import fake_layers
from quant.layers import QuantMatMul
from quant.log2 import LearnedLog2Quantizer, Log2Quantizer, log2_quantize
from quant.model import BitPolicy
from quant.packed import load_quantized, to_bytes
from quant.statistics import Statistics
from tests.test_quant_packed import TIMESTEPS, meta, quantized
from tests.test_quant_quantizer import narrow_unet


def test_values_are_powers_of_two_of_the_scale() -> None:
    x = torch.rand(4, 50) ** 6
    x[0, 0] = 0.0
    x_hat = log2_quantize(x, torch.tensor(0.75), 15)
    codes = -torch.log2(x_hat / 0.75)
    assert torch.allclose(codes, codes.round(), atol=1e-5)
    assert codes.min() >= 0 and codes.max() <= 15
    inside = (x > 0.75 * 2.0**-15) & (x < 0.75)
    ratio = (x_hat / x)[inside]
    assert (ratio < 2**0.5 + 1e-4).all() and (ratio > 0.5**0.5 - 1e-4).all()


def test_the_scale_and_the_input_learn() -> None:
    quantizer = LearnedLog2Quantizer(TimestepContext([0, 9], 10), 4, False, True)
    values = torch.rand(2, 64) ** 4
    stats = Statistics(values, values.amin(1), values.amax(1), torch.ones(2))
    assign(quantizer, stats, 3, "kmeans", "mse")
    assert torch.isclose(quantizer.log_scale.exp(), values.max()).all()
    x = torch.rand(2, 3, 5, requires_grad=True)
    quantizer.context.set(torch.tensor([0, 9]))
    out = quantizer(x)
    out.sum().backward()
    assert quantizer.log_scale.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
    assert torch.allclose(quantizer.deploy()(x), out)


def test_log2_survives_the_file_and_stays_out_of_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = BitPolicy(weight=4, activation=8, softmax=4, log2_softmax=True)
    model = quantized(narrow_unet().eval(), policy, TIMESTEPS, 2)
    products = [m for m in model.modules() if isinstance(m, QuantMatMul)]
    assert any(isinstance(m.left, Log2Quantizer) for m in products)
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(to_bytes(model, {}))
    loaded = load_quantized(path, meta(narrow_unet))
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 12)
    assert torch.equal(loaded(x, t), model(x, t))
    assert "logarithmic" in " ".join(fake_layers(loaded).values())

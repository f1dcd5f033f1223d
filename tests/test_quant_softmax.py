"""Attention probabilities: logarithmic codes, and codes relative to each row's largest value.

python -m pytest tests/test_quant_softmax.py
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
from quant.quantizer import LearnedQuantizer
from quant.statistics import Statistics
from tests.packed import TIMESTEPS, meta, quantized
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
    x = (1.5 * torch.rand(2, 3, 5)).requires_grad_()  # the scale learns where it clips
    quantizer.context.set(torch.tensor([0, 9]))
    out = quantizer(x)
    out.sum().backward()
    assert quantizer.log_scale.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
    assert torch.allclose(quantizer.deploy()(x), out)


def test_log2_survives_the_file_and_stays_out_of_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = BitPolicy(weight=4, activation=8, softmax=4, softmax_codes="log2")
    model = quantized(narrow_unet().eval(), policy, TIMESTEPS, 2)
    products = [m for m in model.modules() if isinstance(m, QuantMatMul)]
    assert any(isinstance(m.left, Log2Quantizer) for m in products)
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(to_bytes(model, {}))
    loaded = load_quantized(path, meta(narrow_unet))
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 12)
    assert torch.equal(loaded(x, t), model(x, t))
    assert "logarithmic" in " ".join(fake_layers(loaded).values())


def test_rows_keep_small_probabilities_apart() -> None:
    """Diffuse attention over 256 keys: with one scale for all rows 8 bits hardly tell it apart."""
    context = TimestepContext([0], 1)
    scores = torch.randn(2, 64, 256)
    scores[:, :4] *= 12  # some rows are nearly one-hot and set the range
    left, right = torch.softmax(scores, -1), torch.randn(2, 256, 8)
    exact, errors = left @ right, []
    for by_row in (False, True):
        product = QuantMatMul(
            LearnedQuantizer(context, 8, False, True),
            LearnedQuantizer(context, 8, True, False),
            by_row,
        )
        seen = product.left_operand(left)[0]
        product.left.set_ranges(torch.zeros(1), seen.max()[None], torch.zeros(1))
        product.right.set_ranges(right.min()[None], right.max()[None], torch.zeros(1))
        errors.append(float((product(left, right) - exact).detach().square().mean()))
        deployed = product.deploy()
        assert torch.allclose(deployed(left, right), product(left, right), atol=1e-6)
    assert errors[1] < 0.3 * errors[0]


def test_codes_by_row_survive_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = BitPolicy(weight=4, activation=8, softmax_codes="row")
    model = quantized(narrow_unet().eval(), policy, TIMESTEPS, 2)
    assert [m.by_row for m in model.modules() if isinstance(m, QuantMatMul)].count(True) > 0
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(to_bytes(model, {}))
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 40)
    assert torch.equal(load_quantized(path, meta(narrow_unet))(x, t), model(x, t))

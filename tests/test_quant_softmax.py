"""Attention probabilities quantized relative to the largest of their row."""

from pathlib import Path

import torch

from tests.helpers.networks import narrow_unet
from tests.helpers.packed import TIMESTEPS, meta, quantized
from tinydm.quant.calibration.layers import CalibMatMul
from tinydm.quant.calibration.quantizer import LearnedQuantizer
from tinydm.quant.calibration.wrapping import BitPolicy
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.runtime.layers import QuantMatMul
from tinydm.quant.runtime.packed_file import load_quantized, to_bytes


def test_rows_keep_small_probabilities_apart() -> None:
    """Diffuse attention over 256 keys: with one scale for all rows 8 bits hardly tell it apart."""
    context = TimestepContext([0], 1)
    scores = torch.randn(2, 64, 256)
    scores[:, :4] *= 12  # some rows are nearly one-hot and set the range
    left, right = torch.softmax(scores, -1), torch.randn(2, 256, 8)
    exact, errors = left @ right, []
    for by_row in (False, True):
        product = CalibMatMul(
            LearnedQuantizer(context, 8, False, True),
            LearnedQuantizer(context, 8, True, False),
            by_row,
        )
        seen = product.left_operand(left)
        product.left.set_ranges(torch.zeros(1), seen.max()[None], torch.zeros(1))
        product.right.set_ranges(right.min()[None], right.max()[None], torch.zeros(1))
        errors.append(float((product(left, right) - exact).detach().square().mean()))
        deployed = product.deploy()
        assert torch.allclose(deployed(left, right), product(left, right), atol=1e-6)
    assert errors[1] < 0.3 * errors[0]


def test_codes_by_row_survive_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = BitPolicy(weight=4, activation=8, softmax_by_row=True)
    model = quantized(narrow_unet().eval(), policy, TIMESTEPS, 2)
    assert [m.by_row for m in model.modules() if isinstance(m, QuantMatMul)].count(True) > 0
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(to_bytes(model, {}))
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 40)
    assert torch.equal(load_quantized(path, meta(narrow_unet))(x, t), model(x, t))

"""Attention products of several heads in a batch of mixed timesteps, and over a single token."""

import pytest
import torch

from tinydm.quant.calibration.layers import CalibMatMul
from tinydm.quant.calibration.quantizer import LearnedQuantizer
from tinydm.quant.calibration.search import start
from tinydm.quant.core.context import TimestepContext

HEADS = 3


def product(context: TimestepContext) -> CalibMatMul:
    sides = [LearnedQuantizer(context, 8, symmetric=True, unsigned=False) for _ in range(2)]
    high = torch.tensor([1.0, 4.0])
    for side in sides:
        side.set_ranges(-high, high, torch.tensor([0, 1]))
    return CalibMatMul(*sides)


@pytest.mark.parametrize("deployed", [False, True])
def test_each_head_has_the_scales_of_its_sample(deployed: bool) -> None:
    context = TimestepContext([10, 20], 100)
    matmul = product(context)
    matmul = matmul.deploy() if deployed else matmul
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2 * HEADS, 5, 4, generator=generator)
    right = torch.randn(2 * HEADS, 4, 6, generator=generator)
    context.set(torch.tensor([10, 20]))
    mixed = matmul(left, right)
    assert mixed.shape == (2 * HEADS, 5, 6)
    for sample, t in enumerate((10, 20)):
        rows = slice(sample * HEADS, (sample + 1) * HEADS)
        context.set(torch.tensor([t]))
        assert torch.allclose(mixed[rows], matmul(left[rows], right[rows]), atol=1e-6)
    context.set(torch.tensor([20, 10]))
    assert not torch.allclose(mixed, matmul(left, right), atol=1e-3)


def test_the_search_starts_where_a_group_has_no_error() -> None:
    """The probabilities over one token are exactly 1, which every range may represent."""
    quantizer = product(TimestepContext([10, 20], 100)).left
    quantizer.group_error = torch.tensor([[0.0, 0.0], [0.0, 1e-3]])
    (logits,) = start([quantizer])
    assert torch.isfinite(logits).all()
    assert logits[0, 0] == logits[0, 1] and logits[1, 0] > logits[1, 1] + 3

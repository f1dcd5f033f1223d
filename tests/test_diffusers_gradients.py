"""Gradients of diffusers' denoisers that keep little: between blocks, and within attention."""

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention  # noqa: E402

from tests.helpers.pipelines import pixel_unet, small_dit, text_unet  # noqa: E402
from tinydm.models import diffusers_denoiser  # noqa: E402
from tinydm.models.diffusers_denoiser import DiffusersDenoiser, ProductAttention  # noqa: E402
from tinydm.quant.calibration.layers import CalibMatMul  # noqa: E402
from tinydm.quant.calibration.quantizer import LearnedQuantizer  # noqa: E402
from tinydm.quant.core.context import TimestepContext  # noqa: E402


@pytest.mark.parametrize("make", [pixel_unet, text_unet, small_dit])
def test_gradients_of_a_large_network_keep_little(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients, from the values between its blocks."""
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 500])
    named: dict[str, torch.Tensor] = {}
    if make is text_unet:
        named = {"encoder_hidden_states": torch.randn(2, 5, 8)}
    elif make is small_dit:
        named = {"class_labels": torch.tensor([1, 2])}
    kept: list[int] = []
    found = []
    for large in (1 << 28, 1):
        monkeypatch.setattr(diffusers_denoiser, "LARGE", large)
        torch.manual_seed(2)
        model = make(in_channels=4) if make is pixel_unet else make()
        denoiser = DiffusersDenoiser(model.eval())
        kept.append(0)

        def count(value: torch.Tensor) -> torch.Tensor:
            kept[-1] += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            denoiser(x, t, **named).square().mean().backward()
        found.append({n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None})
    assert kept[1] < 0.6 * kept[0]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("keys", [None, 5], ids=["self", "cross"])
def test_large_attention_learns_head_by_head(
    parts: int, keys: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same result and gradients up to rounding, those of the quantizers too; less is kept."""
    context = TimestepContext([1, 500], 1000)
    context.set(torch.tensor([500]))

    def quantizer(low: float, high: float) -> LearnedQuantizer:
        made = LearnedQuantizer(context, 8, symmetric=False, unsigned=low == 0)
        made.set_ranges(torch.tensor([low]), torch.tensor([high]), torch.zeros(2, dtype=torch.long))
        return made

    attention = Attention(12, cross_attention_dim=12, heads=4, dim_head=3)
    products = ProductAttention()
    attention.set_processor(products)
    products.scores = CalibMatMul(quantizer(-2, 2), quantizer(-2, 2))
    products.values = CalibMatMul(quantizer(0, 1), quantizer(-2, 2), by_row=True)
    x = torch.randn(1, 16, 12, requires_grad=True)
    given = (x,) if keys is None else (x, torch.randn(1, keys, 12))
    learned = {"x": x} | {n: p for n, p in attention.named_parameters() if p.requires_grad}
    made, kept = [], []
    for most in (1 << 24, 4 * 16 * (keys or 16) // parts):  # of 4 heads
        monkeypatch.setattr(diffusers_denoiser, "MANY_SCORES", most)
        kept.append(0)

        def count(value: torch.Tensor) -> torch.Tensor:
            kept[-1] += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            out = attention(*given)
        gradients = torch.autograd.grad(
            out.square().sum(), list(learned.values()), allow_unused=True
        )
        made.append(dict(zip(learned, gradients, strict=True)) | {"out": out})
        with torch.no_grad():
            assert torch.equal(attention(*given), made[0]["out"])  # by all heads at once
    assert kept[1] < kept[0]
    for name, value in made[0].items():
        assert (value is None) == (made[1][name] is None), name
        if value is not None:
            torch.testing.assert_close(value, made[1][name], rtol=1e-4, atol=1e-5, msg=name)

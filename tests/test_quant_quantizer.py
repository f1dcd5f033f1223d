"""Quantizers of activations: values, gradients, groups and timesteps, and the layers around them.

python -m pytest tests/test_quant_quantizer.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.networks import narrow_unet
from tinydm.quant.calibration.layers import CalibLayer
from tinydm.quant.calibration.quantizer import LearnedQuantizer, _LearnedFakeQuantize
from tinydm.quant.calibration.weights import WeightQuantizer
from tinydm.quant.calibration.wrapping import (
    BitPolicy,
    activation_quantizers,
    quantize,
    weight_layers,
)
from tinydm.quant.core.affine import fake_quantize, range_to_scale
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.operation import quantize_input
from tinydm.quant.runtime.quantizer import ActivationQuantizer

EDGE = st.floats(1e-4, 1e4)

FEW = settings(max_examples=60, deadline=None)
BITS = st.integers(2, 8)


# ---- one quantizer ----


@FEW
@given(BITS | st.just(16), EDGE, EDGE, st.booleans(), st.integers(0, 2**31))
def test_quantization_of_a_range(
    bits: int, low: float, high: float, symmetric: bool, seed: int
) -> None:
    scale, zero = range_to_scale(torch.tensor(-low), torch.tensor(high), bits, symmetric)
    top = 2**bits - 1
    assert scale > 0 and zero == zero.round() and 0 <= zero <= top
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(400, generator=generator) * 3 - 1.5) * max(low, high)
    x = torch.cat([x, torch.zeros(1), torch.tensor([-low, high])]).sort().values
    x_hat = fake_quantize(x, scale, zero, top)
    assert torch.equal(fake_quantize(x_hat, scale, zero, top), x_hat)  # idempotent
    assert (x_hat.diff() >= 0).all()  # monotone
    assert len(x_hat.unique()) <= 2**bits
    assert (x_hat[x == 0] == 0).all()  # zero is exact, padding needs it
    inside = (x >= -zero * scale) & (x <= (top - zero) * scale)
    assert inside.sum() >= 3
    assert ((x - x_hat)[inside].abs() <= scale * (0.5 + 3e-7 * 2**bits)).all()
    ends = torch.stack([-zero * scale, (top - zero) * scale])
    assert torch.allclose(x_hat[[0, -1]], x[[0, -1]].clamp(*ends), atol=float(scale) * 0.51)
    # The range that was asked for is covered, but for the half step that rounding z may cost.
    assert x.max() < high or ends[1] >= high - scale * 0.51
    assert x.min() > -low or ends[0] <= -low + scale * 0.51


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_degenerate_ranges_are_finite(bits: int, symmetric: bool) -> None:
    low, high = torch.tensor([0.0, -3.0, 2.0, 0.0]), torch.tensor([0.0, -1.0, 5.0, 1e-20])
    scale, zero = range_to_scale(low, high, bits, symmetric)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert ((zero >= 0) & (zero < 2**bits)).all()
    x_hat = fake_quantize(torch.zeros(4), scale, zero, 2**bits - 1)
    assert (x_hat == 0).all()
    assert fake_quantize(torch.tensor(-3.0), scale[1], zero[1], 2**bits - 1) <= -2.9
    assert fake_quantize(torch.tensor(5.0), scale[2], zero[2], 2**bits - 1) >= 4.9


# ---- gradients ----


def lsq(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    return _LearnedFakeQuantize.apply(x, scale, zero, top)


@FEW
@given(BITS, st.floats(0.01, 3.0), st.data())
def test_lsq_gradients_are_the_numerical_ones(bits: int, scale: float, data: st.DataObject) -> None:
    """Clipped: the derivative exists. Inside: that of x + s c, where c = round(x/s) - x/s is held,
    which is what a straight-through rounding differentiates."""
    top = 2**bits - 1
    z = data.draw(st.integers(0, top))
    steps = data.draw(st.lists(st.floats(-1.5 * top, 1.5 * top), min_size=1, max_size=20))
    v = torch.tensor(steps, dtype=torch.float64)
    # Away from the ties of rounding and the edges of the range, where no derivative exists.
    v = v[(v - v.floor() - 0.5).abs() > 1e-3]
    v = v[(v.round() + z != 0) & (v.round() + z != top)]
    clipped = (v.round() + z < 0) | (v.round() + z > top)
    x = (v * scale).requires_grad_(True)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(float(z), dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, len(v), dtype=torch.float64)
    (lsq(x, s, zero, top) * weights).sum().backward()

    h, fixed = 1e-6, v * scale
    held = torch.where(clipped, 0.0, v.round() - v)  # c

    def total(scale: float, zero: float) -> float:
        x_hat = torch.where(
            clipped, scale * torch.clamp(v.round(), -zero, top - zero), fixed + scale * held
        )
        return float((x_hat * weights).sum())

    by_scale = (total(scale + h, z) - total(scale - h, z)) / (2 * h)
    by_zero = (total(scale, z + h) - total(scale, z - h)) / (2 * h)
    assert float(s.grad) == pytest.approx(by_scale, rel=1e-4, abs=1e-4 * top)
    assert float(zero.grad) == pytest.approx(by_zero, rel=1e-4, abs=1e-4)
    assert torch.equal(x.grad, torch.where(clipped, 0.0, weights))


def test_clipped_values_have_the_true_derivatives() -> None:
    """Finite differences of the quantizer itself, where it is differentiable: beyond the range."""
    x = torch.tensor([-9.0, 7.0, 30.0], dtype=torch.float64)
    s, z, top, h = 0.25, 4.0, 15, 1e-6
    scale = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    lsq(x, scale, zero, top).sum().backward()

    def total(s: float, z: float) -> float:
        arguments = (torch.tensor(v, dtype=torch.float64) for v in (s, z))
        return float(fake_quantize(x, *arguments, top).sum())

    assert float(scale.grad) == pytest.approx((total(s + h, z) - total(s - h, z)) / (2 * h))
    assert float(zero.grad) == pytest.approx((total(s, z + h) - total(s, z - h)) / (2 * h))


def test_straight_through_gradient_is_the_slope_over_whole_steps() -> None:
    scale, zero, top = torch.tensor(0.1), torch.tensor(8.0), 15
    x = torch.linspace(-0.6, 0.5, 37, requires_grad=True)
    lsq(x, scale, zero, top).sum().backward()
    up, down = (fake_quantize(x.detach() + d * scale, scale, zero, top) for d in (1, -1))
    assert torch.allclose((up - down) / (2 * scale), x.grad, atol=1e-4)
    assert (x.grad == 1).all()
    beyond = torch.tensor([-2.0, 2.0], requires_grad=True)
    lsq(beyond, scale, zero, top).sum().backward()
    assert (beyond.grad == 0).all()


def test_gradients_of_a_mixed_batch_stay_with_their_sample() -> None:
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1).requires_grad_(True)
    zero = torch.full((3, 1, 1, 1), 8.0, requires_grad=True)
    lsq(x, scale, zero, 15).square().sum().backward()
    for i in range(3):
        own = scale.detach()[i, 0, 0, 0].clone().requires_grad_(True)
        own_zero = torch.tensor(8.0, requires_grad=True)
        lsq(x[i], own, own_zero, 15).square().sum().backward()
        assert torch.allclose(own.grad, scale.grad[i, 0, 0, 0], rtol=1e-5)
        assert torch.allclose(own_zero.grad, zero.grad[i, 0, 0, 0], rtol=1e-5)


def test_gradient_reaches_the_first_layer_through_a_second_quantized_one() -> None:
    """The released APQ-DM code rounds without a straight-through estimator: it is zero there."""
    torch.manual_seed(0)
    context = TimestepContext([5, 50], 100)
    layers = []
    for _ in range(3):
        linear = nn.Linear(6, 6)
        quantizer = LearnedQuantizer(context, 4, False, False)
        quantizer.set_ranges(
            torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
        )
        quantizer.logits = nn.Parameter(torch.zeros(2, 2))
        layers.append(CalibLayer(linear, WeightQuantizer(linear.weight, 4, "mse"), [quantizer], 0))
    first, *rest = layers
    context.set(torch.tensor([5, 50, 50, 5]))
    h = first(torch.randn(4, 6))
    for layer in rest:
        h = layer(h)
    h.square().sum().backward()
    quantizer = first.inputs[0]
    assert (quantizer.logits.grad.abs() > 1e-6).any(dim=1).all()  # of both timesteps
    assert (quantizer.log_scale.grad.abs() > 1e-6).all()
    assert (first.weight.grad is None) or torch.isfinite(first.weight.grad).all()


# ---- groups and timesteps ----


def grouped(context: TimestepContext, bits: int = 8) -> LearnedQuantizer:
    """One group a bin, with ranges that differ by factors."""
    quantizer = LearnedQuantizer(context, bits, False, False)
    bins = len(context.timesteps)
    high = 2.0 ** torch.arange(bins)
    quantizer.set_ranges(-high / 3, high, torch.arange(bins).flip(0))
    return quantizer


@FEW
@given(st.sets(st.integers(0, 99), min_size=1, max_size=12))
def test_every_timestep_finds_the_nearest_calibrated_one(timesteps: set[int]) -> None:
    context = TimestepContext(list(timesteps), 100)
    quantizer = grouped(context)
    deployed = quantizer.deploy()
    x = torch.linspace(-50, 50, 7)
    for t in range(100):
        context.set(torch.tensor([t, t]))
        chosen = context.timesteps[context.index]
        assert abs(chosen - t) == min(abs(c - t) for c in timesteps)
        group = len(timesteps) - 1 - context.index
        scale = quantizer.log_scale.exp()[group]
        assert deployed.current(1)[0] == scale
        assert torch.equal(deployed(x), quantizer(x).detach())
    for t in (-1, 100):
        with pytest.raises(ValueError, match="outside"):
            context.set(torch.tensor([5, t]))


@pytest.mark.parametrize("kind", ["learned", "deployed", "searching"])
@pytest.mark.parametrize("shape", [(4, 6, 6), (5, 3), (7,)])
def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(kind: str, shape: tuple) -> None:
    context = TimestepContext([0, 30, 60, 90], 100)
    quantizer = grouped(context, 4)
    if kind == "searching":
        g = torch.Generator().manual_seed(1)
        quantizer.logits = nn.Parameter(torch.randn(4, 4, generator=g))
    if kind == "deployed":
        quantizer = quantizer.deploy()
    t = torch.tensor([3, 99, 31, 58, 3, 0])
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(2)) * 4
    context.set(t)
    assert context.t is None
    together = quantizer(x)
    for i in range(len(t)):
        context.set(t[i : i + 1])
        assert context.t == int(t[i])
        alone = quantizer(x[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-6, atol=0)
        if kind != "searching":
            assert torch.equal(together[i : i + 1], alone)
    assert not torch.equal(together[0] / x[0], together[1] / x[1])  # the groups do differ


def test_a_searching_quantizer_mixes_its_two_likeliest_groups() -> None:
    context = TimestepContext([0], 10)
    quantizer = LearnedQuantizer(context, 4, False, False)
    quantizer.set_ranges(-torch.ones(3), torch.tensor([1.0, 4.0, 9.0]), torch.zeros(1))
    quantizer.logits = nn.Parameter(torch.tensor([[2.0, -5.0, 1.0]]))
    x = torch.linspace(-2, 8, 50)
    context.set(torch.tensor([0]))
    mixed = quantizer(x)
    quantizer.logits, parts = None, []
    for group in (0, 2):
        quantizer.group_of_timestep = torch.tensor([group])
        parts.append(quantizer(x))
    share = torch.sigmoid(torch.tensor(1.0))  # of group 0 against group 2
    assert torch.allclose(mixed, share * parts[0] + (1 - share) * parts[1], atol=1e-6)


# ---- layers ----


@pytest.mark.parametrize("dim", [1, -1])
def test_a_split_quantizer_is_two_separate_ones(dim: int) -> None:
    context = TimestepContext([0], 10)
    parts = []
    for high in (1.0, 20.0):
        quantizer = LearnedQuantizer(context, 4, False, False)
        quantizer.set_ranges(torch.tensor([-high]), torch.tensor([high]), torch.zeros(1))
        parts.append(quantizer.deploy())
    context.set(torch.tensor([0]))
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4) * 10
    if dim == -1:
        first, second = first.transpose(1, -1), second.transpose(1, -1)
    x = torch.cat([first, second], dim=dim)
    out = quantize_input(x, nn.ModuleList(parts), 3, dim)
    assert torch.equal(out, torch.cat([parts[0](first), parts[1](second)], dim=dim))
    assert not torch.equal(out, quantize_input(x, nn.ModuleList(parts[:1]), 3, dim))


def test_architecture_decides_which_inputs_are_split() -> None:
    unet = narrow_unet()
    split = unet.layer_roles().concat_split
    assert split
    for wanted in (True, False):
        model = quantize(unet, TimestepContext([0], 1000), BitPolicy(split_skip=wanted))
        for name, layer in weight_layers(model):
            short = name.removeprefix("denoiser.").removesuffix(".layer")
            assert layer.split == (split.get(short, 0) if wanted else 0)
            assert len(layer.inputs) in (0, 1 + bool(layer.split))


def test_softmax_is_unsigned_and_queries_keys_values_symmetric() -> None:
    model = quantize(narrow_unet(), TimestepContext([0], 1000), BitPolicy())
    products = {n: q for n, q in activation_quantizers(model) if ".scores." in n or ".values." in n}
    assert products
    for name, quantizer in products.items():
        quantizer.set_ranges(torch.tensor([-0.3]), torch.tensor([0.9]), torch.zeros(1))
        assert not quantizer.zero_point.requires_grad
        deployed = quantizer.deploy()
        assert isinstance(deployed, ActivationQuantizer)
        if name.endswith("values.left"):
            assert int(deployed.zero_point) == 0 and deployed(torch.zeros(1)) == 0
            assert deployed(torch.tensor(-0.3)) == 0
        else:
            assert int(deployed.zero_point) == 128

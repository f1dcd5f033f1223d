"""Second-order rounding and equivalent scaling, alone and on toys.

python -m pytest tests/test_quant_rounding.py
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.blocks import Block, block_model, block_states
from tests.helpers.networks import narrow_unet
from tests.helpers.packed import TIMESTEPS, meta, quantized
from tests.helpers.toy import Toy, eps_error, toy_model, toy_states
from tinydm.models.ops import after_norm_silu
from tinydm.models.roles import LayerRoles
from tinydm.quant.calibration import gptq
from tinydm.quant.calibration.equivalent import (
    candidate,
    scale_equivalently,
    scaled_layers,
    unscaled_weight,
)
from tinydm.quant.calibration.gptq import (
    DAMPINGS,
    Hessian,
    Rows,
    column_blocks,
    compensate,
    compensated_layers,
    input_rows,
    keeps_rows,
    passes_of,
    second_order_codes,
)
from tinydm.quant.calibration.grouping import assign
from tinydm.quant.calibration.layers import CalibLayer
from tinydm.quant.calibration.statistics import collect
from tinydm.quant.calibration.timesteps import all_steps, tuples_of_steps
from tinydm.quant.calibration.weights import WeightQuantizer
from tinydm.quant.calibration.wrapping import BitPolicy, activation_quantizers, deploy, quantize
from tinydm.quant.core import affine
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.operation import Operation, quantize_input, scale_channels
from tinydm.quant.runtime.layers import QuantLayer
from tinydm.quant.runtime.packed_file import load_quantized, to_bytes
from tinydm.quant.runtime.quantizer import ActivationQuantizer


def every_state(states, count: int | None = None) -> torch.Tensor:
    steps = all_steps(len(states.timesteps) * states.trajectories, len(states.timesteps))[:count]
    return tuples_of_steps(steps, states.trajectories, torch.Generator().manual_seed(0))


# ---- second-order rounding ----


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 200), st.integers(2, 4), st.integers(0, 1000))
def test_codes_lower_the_output_error(columns: int, bits: int, seed: int) -> None:
    """Correlated inputs, more than one block of columns among the cases."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 6, generator=g) @ torch.randn(6, columns, generator=g)
    top = 2**bits - 1
    weight = torch.randn(8, columns, generator=g) * top / 4
    low, high = torch.full((8, 1), -float(top // 2)), torch.full((8, 1), float(top - top // 2))
    codes = second_order_codes(weight, Hessian(x.T @ x), low, high, DAMPINGS[0])
    assert torch.equal(codes, codes.round())
    assert (codes >= low).all() and (codes <= high).all()
    nearest = torch.clamp(weight.round(), low, high)
    error = [float(((q - weight) @ x.T).square().sum()) for q in (codes, nearest)]
    assert error[0] <= error[1] * (1.2 if columns < 16 else 1.0)


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight = torch.randn(5, 150, generator=torch.Generator().manual_seed(3)) * 4
    low, high = torch.full((5, 1), -8.0), torch.full((5, 1), 7.0)
    for inputs in (Hessian(torch.eye(150)), Rows(torch.eye(150))):
        codes = second_order_codes(weight, inputs, low, high, DAMPINGS[0])
        assert torch.equal(codes, weight.round().clamp(-8, 7))


@pytest.mark.parametrize("damping", DAMPINGS)
def test_rows_stand_for_their_hessian(damping: float) -> None:
    """In float64, so that no value lies between two codes for one and not for the other."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(20, 300, generator=g, dtype=torch.float64).relu()
    weight = torch.randn(8, 300, generator=g, dtype=torch.float64) * 3
    rows, hessian = Rows(x), Hessian(x.T @ x)
    assert torch.allclose(rows.squares(), hessian.squares())
    assert rows.loss(weight) == pytest.approx(hessian.loss(weight))
    low, high = torch.full((8, 1), -8.0), torch.full((8, 1), 7.0)
    codes = [second_order_codes(weight, kept, low, high, damping) for kept in (rows, hessian)]
    assert torch.equal(*codes)
    assert not torch.equal(codes[0], weight.round().clamp(-8, 7))
    order = torch.arange(300)
    made = [kept.feedback(order, torch.tensor(damping))(128, 256) for kept in (rows, hessian)]
    later = torch.ones(256, 128).triu(-127).bool()  # row i passes on to the columns after it
    assert torch.allclose(made[0][later], made[1][later], atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2),
        nn.Conv1d(3, 5, 3, padding=1),
        nn.Linear(3, 5),
    ],
)
def test_rows_times_weight_are_outputs_of_the_layer(layer: nn.Module) -> None:
    shape = {nn.Conv2d: (2, 3, 10, 10), nn.Conv1d: (2, 3, 20)}.get(type(layer), (2, 7, 3))
    x = torch.randn(shape)
    quantizer = WeightQuantizer(layer.weight, 4, "minmax")
    rows = input_rows(CalibLayer(layer, quantizer, [], 0), x)
    made = rows @ layer.weight.flatten(1).T + layer.bias
    dim = -1 if isinstance(layer, nn.Linear) else 1
    everything = layer(x).transpose(dim, -1).reshape(-1, 5)
    for row in made[:: max(1, len(made) // 7)]:
        assert (everything - row).abs().amax(1).min() < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensation_beats_rounding_to_nearest(bits: int) -> None:
    denoiser = Block()
    states, fresh = block_states(denoiser, 32, 1), block_states(denoiser, 16, 2)
    model = block_model(denoiser, states, bits)
    before = eps_error(model, fresh)
    gains = compensate(model, states, *[every_state(states)] * 2, 16, 4.0)
    assert gains["conv"] < 0.9
    assert eps_error(model, fresh) < 0.9 * before  # on samples that it never saw
    codes = deploy(model).denoiser.conv.qweight
    assert int(codes.max()) < 2**bits
    for channel in codes.flatten(1):
        assert len(channel.unique()) <= 2**bits


def test_layers_of_the_timestep_are_rounded_for_the_whole_schedule() -> None:
    denoiser = TimedToy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 2, BitPolicy(weight=8, activation=8, time=3))
    t = torch.tensor(states.timesteps)

    def temporal_error() -> float:
        seen: dict[str, torch.Tensor] = {}
        for name, root in (("full", denoiser), ("quantized", model.denoiser)):
            handle = root.embed.register_forward_hook(
                lambda module, args, out, name=name: seen.update({name: out.detach()})
            )
            x, _, _, conditioning = states.gather(torch.stack([torch.arange(len(t))] * 2, 1))
            (denoiser if name == "full" else model)(x, t, **conditioning)
            handle.remove()
        return float((seen["full"] - seen["quantized"]).square().mean())

    before = temporal_error()
    gains = compensate(model, states, *[every_state(states)] * 2, 16, 4.0)
    assert gains["embed.layer"] < 1
    assert temporal_error() < 0.8 * before


def test_memory_is_bounded_by_blocks_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow blocks and one layer a pass still beat rounding to nearest."""
    monkeypatch.setattr(gptq, "WIDEST_HESSIAN", 40)
    denoiser = Toy()
    states, fresh = toy_states(denoiser), toy_states(denoiser, 6, seed=77)
    model = toy_model(denoiser, states, 2, BitPolicy(weight=4, activation=8))
    layers = compensated_layers(model)
    assert [b.stop - b.start for b in column_blocks(layers["second"])] == [36, 36, 36]
    assert [b.stop - b.start for b in column_blocks(layers["first"])] == [36]
    one = {
        name: 2 * 4 * sum((b.stop - b.start) ** 2 for b in column_blocks(layers[name]))
        for name in layers
    }
    assert len(passes_of(layers, 100, sum(one.values()))) == 1
    assert [list(run) for run in passes_of(layers, 100, 1)] == [[name] for name in layers]
    before = eps_error(model, fresh)
    gains = compensate(model, states, *[every_state(states)] * 2, 16, memory_gb=1e-9)
    assert list(gains) == list(layers) and max(gains.values()) <= 1
    assert eps_error(model, fresh) < before


@pytest.mark.parametrize("of_rows", [set(), {"first"}])
def test_a_pass_ends_with_the_last_of_its_layers(of_rows: set[str]) -> None:
    """Large models take many passes, whose samples need not go on to the end."""
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 2, BitPolicy(weight=4, activation=8))
    layers = compensated_layers(model)
    last: list[str] = []
    layers["second"].register_forward_hook(lambda *_: last.append("second"))
    given = (states, every_state(states), 16)
    alone = gptq._inputs(model, {"first": layers["first"]}, of_rows, *given)
    assert not last
    together = gptq._inputs(model, layers, of_rows, *given)
    for kept, same in zip(alone["first"], together["first"], strict=True):
        assert isinstance(kept, Rows if of_rows else Hessian)
        assert torch.equal(kept.value, same.value)


def test_few_samples_are_kept_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the codes that their H gives."""
    denoiser = Block()
    states = block_states(denoiser, 4, 1)
    made = []
    for columns_per_row in (1e-3, 1e9):
        monkeypatch.setattr(gptq, "COLUMNS_PER_ROW", columns_per_row)
        model = block_model(denoiser, states, 3)
        layers = compensated_layers(model)
        assert keeps_rows(layers["conv"], 4) == (columns_per_row < 1)
        gains = compensate(model, states, *[every_state(states)] * 2, 16, 4.0)
        made.append((gains["conv"], deploy(model).denoiser.conv.qweight))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-3)
    assert (made[0][1] == made[1][1]).float().mean() > 0.999


# ---- equivalent scaling ----


def test_scaled_layers_compute_the_same_in_floating_point() -> None:
    layer = nn.Conv2d(6, 4, 3, padding=1)
    x = torch.randn(2, 6, 8, 8) * torch.logspace(-1, 1, 6).view(1, -1, 1, 1)
    r = candidate(x.abs().amax((0, 2, 3)), layer.weight, 0.5)
    assert torch.equal(r, r.half().float())
    out = nn.functional.conv2d(
        scale_channels(x, r, 1), unscaled_weight(layer.weight, r), layer.bias, padding=1
    )
    assert torch.allclose(out, layer(x), atol=1e-4)
    assert (r[:-1] > r[1:]).float().mean() > 0.7  # large channels are scaled down


def test_a_silent_channel_and_a_zero_weight_stay_finite() -> None:
    weight = torch.zeros(4, 3, 1, 1)
    weight[:, 0] = 1
    r = candidate(torch.tensor([0.0, 5.0, 0.0]), weight, 0.5)
    assert torch.isfinite(r).all() and (r > 0).all()


class TimedToy(Toy):
    """Declares its layer of the timestep, with a wide embedding whose parts go together."""

    def __init__(self):
        super().__init__()
        self.widen = nn.Linear(2, 24)
        self.embed = nn.Linear(24, 12)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = nn.functional.silu(self.widen(torch.stack([t / 1000, torch.cos(t / 100)], 1)))
        h = self.norm(self.first(x)) + self.embed(wide)[:, :, None, None]
        return self.last(nn.functional.silu(self.second(h)))

    def layer_roles(self) -> LayerRoles:
        return LayerRoles(timestep_only=("widen", "embed"))


class Uneven(Toy):
    """Some channels of the second layer's input are thirty times as large as the others."""

    def __init__(self):
        super().__init__()
        self.norm.weight.data[::4] = 30.0
        self.second.weight.data[:, ::4] /= 30.0


def test_scaling_helps_uneven_channels_and_never_hurts_by_its_own_measure() -> None:
    denoiser = Uneven()
    states, fresh = toy_states(denoiser), toy_states(denoiser, 6, seed=9)
    policy = BitPolicy(weight=8, activation=4, first_last_activation=4)
    errors = []
    for scaled in (False, True):
        model = quantize(denoiser, toy_model(denoiser, states, 2, policy).context, policy)
        if scaled:
            relative = scale_equivalently(denoiser, model, states, every_state(states, 48), 16)
            assert set(relative) == set(scaled_layers(model))
            assert all(0 < v <= 1 for v in relative.values())
            assert relative["second"] < 0.7
        stats = collect(denoiser, model, states.by_timestep(states.trajectories, 8))
        for name, quantizer in activation_quantizers(model):
            assign(quantizer, stats[name], 2, "kmeans", "mse")
        errors.append(eps_error(model, fresh))
    assert errors[1] < 0.8 * errors[0]


def test_channel_scales_survive_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = narrow_unet().eval()
    model = quantized(denoiser, BitPolicy(weight=4, activation=8), TIMESTEPS, 2)
    layers = [m for m in model.modules() if hasattr(m, "qweight") and len(m.inputs)]
    for layer in layers[::2]:
        scale = torch.rand(layer.qweight.shape[1]) + 0.5
        layer.channel_scale = scale.half().float()
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(to_bytes(model, {}))
    loaded = load_quantized(path, meta(narrow_unet))
    x = torch.randn(2, 3, 16, 16)
    for t in (0, 12, 57):
        step = torch.full((2,), t)
        assert torch.equal(loaded(x, step), copy.deepcopy(model)(x, step))


def given_layer(kind: str, split: int, scaled: bool, context: TimestepContext) -> QuantLayer:
    """Of 16 channels, whose weight is the identity, so that the output is the quantized input."""
    layer = nn.Linear(16, 16, False) if kind == "linear" else nn.Conv2d(16, 16, 1, bias=False)
    inputs = []
    for _ in range(2 if split else 1):
        zero_point = torch.tensor([3, 120], dtype=torch.int32)
        scale = torch.rand(2) * 0.05 + 0.01
        inputs.append(ActivationQuantizer(context, scale, zero_point, torch.tensor([1, 0]), 8))
    codes = torch.eye(16, dtype=torch.uint8).view_as(layer.weight)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.uint8)
    # Powers of two, with which it does not matter whether x or 1 / scale is multiplied first.
    factors = 2.0 ** torch.randint(-2, 3, (16,)) if scaled else None
    return QuantLayer(Operation(layer), codes, ones, zeros, None, 2, inputs, split, factors)


@pytest.mark.parametrize("split", [0, 5])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["channels_last", "contiguous", "linear", "small"])
@pytest.mark.parametrize("block", [1000, 12000, 1 << 18])
def test_the_quick_way_to_quantize_an_input_is_exact(
    split: int, scaled: bool, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one timestep, in pieces of any size, and with one for each sample: the same bits."""
    monkeypatch.setattr(affine, "CACHED_VALUES", block)
    context = TimestepContext([0, 50], 100)
    side = 4 if kind == "small" else 24
    x = torch.randn((3, side * side, 16) if kind == "linear" else (3, 16, side, side))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    given, original = given_layer(kind, split, scaled, context), x.clone()
    context.set(torch.tensor([50, 50, 50]))
    quick, dim = given(x), given.op.channel_dim
    assert torch.equal(x, original)
    parts = quantize_input(scale_channels(x, given.channel_scale, dim), given.inputs, split, dim)
    assert torch.equal(quick, parts) and torch.equal(given.quantized_input(x), parts)
    context.index = torch.tensor([1, 1, 1])  # as a mixed batch
    assert torch.equal(given(x), quick)


@pytest.mark.parametrize("split", [0, 5])
def test_factors_of_the_channels_are_multiplied_into_the_scale(split: int) -> None:
    """Rounded otherwise than one after the other, so that a value on the edge may take the next
    code: never more, and seldom."""
    context = TimestepContext([0, 50], 100)
    given = given_layer("channels_last", split, False, context)
    given.channel_scale = torch.rand(16) + 0.5
    x = torch.randn(3, 16, 48, 48)
    context.set(torch.tensor([50, 50, 50]))
    apart = (given(x) - given.quantized_input(x)).abs()
    step = max(float(q.scale.max()) for q in given.inputs)
    assert apart.max() <= 1.001 * step and (apart > step / 1e3).float().mean() < 1e-3


@pytest.mark.parametrize("split", [0, 5])
@pytest.mark.parametrize("pixels", [1, 12])
@pytest.mark.parametrize("biased", [False, True])
def test_bias_and_addend_beside_a_scaled_output(split: int, pixels: int, biased: bool) -> None:
    """bias / s is in the product, plus is added with it: as in a mixed batch, up to rounding."""
    context = TimestepContext([0, 50], 100)
    given = given_layer("channels_last", split, True, context)
    given.qweight = torch.randint(4, (16, 16, 1, 1), dtype=torch.uint8)
    given.bias = torch.randn(16) if biased else None
    norm, x = nn.GroupNorm(4, 16).requires_grad_(False), torch.randn(3, 16, 12, 12)
    x = x.contiguous(memory_format=torch.channels_last)
    original, plus = x.clone(), torch.randn(3, 16, pixels, pixels)
    context.set(torch.tensor([0, 0, 0]))
    outputs = [given(x), *(after_norm_silu(given, norm, x, plus=p) for p in (None, plus))]
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in outputs)
    context.index = torch.tensor([0, 0, 0])
    slow = given(x), given(F.silu(norm(x))), given(F.silu(norm(x))) + plus
    for a, b in zip(outputs, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, original)

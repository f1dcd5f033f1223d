"""Learned rounding and end-to-end steps, on toys that train in a second.

python -m pytest tests/test_quant_reconstruct.py
"""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.blocks import FAST, Block, block_model, block_states, learn
from tests.helpers.networks import layers_of, narrow_unet
from tests.helpers.packed import meta, quantized
from tests.helpers.toy import STEPS, Toy, eps_error, toy_model, toy_states
from tinydm.models.samplers import ddim
from tinydm.models.schedule import alphas_cumprod, make_betas, sampling_timesteps
from tinydm.quant.calibration.end_to_end import EndToEnd, Plan, _balanced_root, _chances, _loss
from tinydm.quant.calibration.layers import CalibLayer
from tinydm.quant.calibration.prefix import Prefix
from tinydm.quant.calibration.reconstruct import _chunks, hold_out, unit_names
from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.calibration.timesteps import all_steps, tuples_of_steps
from tinydm.quant.calibration.weights import WeightQuantizer
from tinydm.quant.calibration.wrapping import (
    BitPolicy,
    deploy,
    quantize,
    weight_layers,
)
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.layers import TimestepLayer
from tinydm.quant.runtime.packed_file import load_quantized, to_bytes
from tinydm.quant.runtime.quantizer import quantizers_of

# ---- learned rounding ----


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_rounding_beats_nearest_and_ends_binary(bits: int) -> None:
    denoiser = Block()
    states, fresh = block_states(denoiser, 32, 1), block_states(denoiser, 16, 2)
    model = block_model(denoiser, states, bits)
    layer = model.denoiser.conv
    nearest = layer.weight_quantizer.codes(layer.weight.detach())
    start = eps_error(model, fresh)
    errors = learn(denoiser, model, states, settings=FAST)
    assert errors["conv"][1] < errors["conv"][0]
    assert eps_error(model, fresh) < 0.9 * start  # on samples that it never saw
    quantizer = layer.weight_quantizer
    codes = quantizer.codes(layer.weight.detach())
    assert not quantizer.soft
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() < 2**bits
    moved = (codes - nearest).abs()
    assert moved.max() == 1 and 0.01 < (moved > 0).float().mean() < 0.6
    deployed = deploy(model)
    assert torch.equal(deployed.denoiser.conv.qweight.float(), codes)
    assert eps_error(deployed, fresh) == pytest.approx(eps_error(model, fresh), rel=1e-3)
    assert all(torch.equal(v, Block().state_dict()[k]) for k, v in denoiser.state_dict().items())


def test_regulariser_drives_the_soft_rounding_to_its_ends() -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(weight, 3, "mse")
    quantizer.start_rounding(weight)
    optimizer = torch.optim.Adam([quantizer.alpha], lr=0.1)
    for i in range(150):
        optimizer.zero_grad()
        quantizer.regulariser(20 - 18 * i / 150).backward()
        optimizer.step()
    h = quantizer.h().detach()
    assert ((h < 0.01) | (h > 0.99)).float().mean() > 0.9
    soft = quantizer(weight).detach()
    quantizer.soft = False
    assert ((soft - quantizer(weight)).abs() < 0.02 * quantizer.scale[:, None]).float().mean() > 0.9


@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_unit_that_did_not_improve_keeps_its_start(learn_scales: bool) -> None:
    denoiser = Block()
    states = block_states(denoiser, 16, 1)
    model = block_model(denoiser, states, 8)
    state = copy.deepcopy(model.state_dict())
    wild = replace(FAST, iterations=4, lr_rounding=10.0, lr_scale=5.0, regulariser=0.0)
    errors = learn(denoiser, model, states, settings=wild, learn_scales=learn_scales)
    assert errors["conv"][0] == errors["conv"][1] > 0
    assert model.denoiser.conv.weight_quantizer.alpha is None
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(v, after[k]) for k, v in state.items())


def test_scales_stay_where_they_are_not_to_be_learned() -> None:
    denoiser = Block()
    states = block_states(denoiser, 16, 1)
    for wanted in (False, True):
        model = block_model(denoiser, states, 3)
        before = model.denoiser.conv.inputs[0].log_scale.detach().clone()
        learn(denoiser, model, states, learn_scales=wanted)
        assert torch.equal(model.denoiser.conv.inputs[0].log_scale, before) != wanted


def test_no_iterations_and_no_samples_change_nothing() -> None:
    denoiser = Block()
    states = block_states(denoiser, 1, 1)
    states = CalibrationStates(states.x[:1], states.eps[:1], states.timesteps[:1])
    model = block_model(denoiser, states, 4)
    assert learn(denoiser, model, states) == {"conv": (0.0, 0.0)}
    states = block_states(denoiser, 16, 1)
    still = replace(FAST, iterations=0)
    assert learn(denoiser, model, states, settings=still) == {"conv": (0.0, 0.0)}


def test_what_judges_is_of_other_trajectories_than_what_teaches() -> None:
    """Guided calls have two rows of the same noise, which are one trajectory."""
    x = torch.randn(2, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x[:, 4:8], x[:, 12:] = x[:, :4], x[:, 8:12]  # calls of 4 images, without and with the class
    states = CalibrationStates(x, x, [50, 0], {"y": torch.arange(16)})
    tuples = torch.cartesian_prod(torch.arange(2), torch.arange(16))
    order, judges = hold_out(states, tuples, 1 / 4, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == tuples.tolist()
    assert judges == 8  # 2 of 8 trajectories, 2 halves, 2 steps
    noise = [set(x[0, part[:, 1]].flatten(1)[:, 0].tolist()) for part in order.split([24, 8])]
    assert len(noise[0]) == 6 and len(noise[1]) == 2 and not noise[0] & noise[1]
    other, _ = hold_out(states, tuples, 1 / 4, torch.Generator().manual_seed(1))
    assert not torch.equal(order[-judges:], other[-judges:])
    assert hold_out(states, tuples, 0.0, torch.Generator())[1] == 0
    alone = tuples[tuples[:, 1] == 3]
    assert hold_out(states, alone, 1 / 8, torch.Generator())[1] == len(alone) == 2


def test_a_unit_is_judged_by_what_it_did_not_see() -> None:
    """The errors that are reported are those of the held-out trajectories, before and after."""
    denoiser = Block()
    states = block_states(denoiser, 16, 1)
    model = block_model(denoiser, states, 3)
    tuples = torch.cartesian_prod(torch.arange(2), torch.arange(16))
    order, judges = hold_out(states, tuples, 1 / 8, torch.Generator().manual_seed(0))
    x, t, eps, _ = states.gather(order[-judges:])
    before = float((model(x, t) - eps).detach().square().mean())
    errors = learn(denoiser, model, states, units=["conv"])["conv"]
    after = float((model(x, t) - eps).detach().square().mean())
    assert judges == 4 and errors == pytest.approx((before, after), rel=1e-5)


def test_units_cover_every_layer_once_in_the_order_of_execution() -> None:
    unet = narrow_unet()
    model = quantize(unet, TimestepContext([0, 500], 1000), BitPolicy())
    declared = unet.layer_roles().units
    units = unit_names(model, declared)
    order: list[str] = []
    handles = [
        unet.get_submodule(u).register_forward_pre_hook(lambda m, a, u=u: order.append(u))
        for u in units
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    for handle in handles:
        handle.remove()
    assert units == order
    assert units[0] == "conv_in" and units[-1] == "conv_out"
    covered = [
        name
        for u in units
        for name, m in model.denoiser.named_modules()
        if isinstance(m, CalibLayer) and (name == u or name.startswith(f"{u}."))
    ]
    kept = {f"{n}.layer" for n, m in model.denoiser.named_modules() if isinstance(m, TimestepLayer)}
    everything = [n.removeprefix("denoiser.") for n, _ in weight_layers(model)]
    assert sorted(set(covered) | kept) == sorted(everything)
    assert len(covered) == len(set(covered))
    assert unit_names(model, ("mid.block_1",))[0] == "mid.block_1"


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_chunks_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    names = [f"u{i}" for i in range(len(sizes))]
    table = dict(zip(names, sizes, strict=True))
    chunks = list(_chunks(names, table, limit))
    assert [n for chunk in chunks for n in chunk] == names
    assert all(chunk for chunk in chunks)
    assert all(len(c) == 1 or sum(table[n] for n in c) <= limit for c in chunks)


def unet_with_states() -> tuple[nn.Module, CalibrationStates]:
    unet = narrow_unet()
    x = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = [800, 300, 0]
    with torch.no_grad():
        eps = torch.stack([unet(x[k], torch.full((4,), t)) for k, t in enumerate(steps)])
    return unet, CalibrationStates(x, eps, steps)


@pytest.mark.slow
def test_little_memory_means_more_passes_and_the_same_result() -> None:
    unet, states = unet_with_states()
    quick = replace(FAST, iterations=4, batch_size=8)
    results, chunks = [], []
    for memory_gb in (1e-9, 5e-4, 4.0):
        model = toy_model(unet, states, 2, BitPolicy(weight=4, activation=8))
        passes: list[int] = []
        handle = unet.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        units = unit_names(model, unet.layer_roles().units)
        errors = learn(unet, model, states, settings=quick, units=units, memory_gb=memory_gb)
        handle.remove()
        assert list(errors) == units
        assert all(0 <= after <= before < float("inf") for before, after in errors.values())
        chunks.append((len(passes) - 1) // 2)  # after one probe, 12 samples in batches of 8
        results.append((errors, model.state_dict()))
        assert np.isfinite(eps_error(model, states))
    assert chunks[0] == len(units) > chunks[1] > chunks[2] == 1
    for errors, state in results[1:]:
        assert errors == results[0][0]
        assert all(torch.equal(v, results[0][1][k]) for k, v in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 20_000, 10**9])
def test_the_prefix_is_that_of_the_units_as_they_are(room: int) -> None:
    """Unit by unit: the inputs are those of a plain run, whatever is kept, and one pass is enough
    for the units that are finished."""
    unet, states = unet_with_states()
    model = toy_model(unet, states, 2, BitPolicy(weight=4, activation=8))
    batches = [states.gather(torch.tensor([[k, 0], [k, 3]])) for k in range(3)]
    prefix, calls = Prefix(model, room), []
    units = unit_names(model, unet.layer_roles().units)
    first = model.denoiser.get_submodule(units[0])
    first.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    for name in units:
        unit, seen = model.denoiser.get_submodule(name), []
        hook = unit.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        for x, t, _, conditioning in batches:
            model(x, t, **conditioning)
        hook.remove()
        calls.clear()
        inputs = prefix.inputs(unit, batches)
        assert len(inputs) == len(seen[0])
        for i, value in enumerate(inputs):
            assert torch.equal(value, torch.cat([args[i] for args in seen]).detach())
        kept = name == units[0] or (room == 10**9 and name != units[1])
        if room != 20_000:  # which holds some of the batches
            assert len(calls) == (0 if kept else 3)
        for layer in (m for m in unit.modules() if isinstance(m, CalibLayer)):
            layer.weight.data.mul_(1.01)  # as if it had learned
        prefix.finish(name, unit)
    assert not any("forward" in vars(m) for m in model.modules())


# ---- end-to-end steps ----


def test_a_batch_in_parts_teaches_what_the_whole_one_does() -> None:
    """Also in uneven ones: 10 samples as 4, 4 and 2. Weights are quantized once for all parts, but
    in denoisers that compute values again for their gradients, which would have to keep them."""
    denoiser = Toy()
    states = toy_states(denoiser, 12)
    tuples = tuples_of_steps(all_steps(96, 8), 12, torch.Generator().manual_seed(0))
    losses: list[list[float]] = []
    for parts, recomputes in ((1, False), (3, False), (3, True)):
        model = toy_model(
            denoiser, states, 2, BitPolicy(weight=4, activation=6, first_last=4, time=4)
        )
        model.denoiser.gradient_checkpointing = recomputes
        seen: list[float] = []
        made: list[str] = []
        for name, layer in weight_layers(model):
            layer.quantizer.register_forward_hook(lambda *_, name=name, to=made: to.append(name))
        generator = torch.Generator().manual_seed(1)

        def keep(i: int, loss: float, seen: list[float] = seen) -> None:
            seen.append(loss)

        plan = Plan(3, 10, 1e-3, accumulate=parts)
        EndToEnd(model, states, tuples, plan).run(generator, keep)
        losses.append(seen)
        times = 3 * (parts if recomputes else 1)  # of 3 steps
        assert Counter(made) == {name: times for name, _ in weight_layers(model)}
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_end_to_end_steps_lower_the_error(weighted: bool) -> None:
    denoiser = Toy()
    states, fresh = toy_states(denoiser, 12), toy_states(denoiser, 12, seed=9)
    model = toy_model(denoiser, states, 2, BitPolicy(weight=4, activation=6, first_last=4, time=4))
    original = copy.deepcopy(denoiser.state_dict())
    start, losses = eps_error(model, fresh), []
    tuples = tuples_of_steps(all_steps(96, 8), 12, torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 1.5, len(STEPS)) if weighted else None
    EndToEnd(model, states, tuples, Plan(150, 16, 1e-3, step_weight=weight)).run(
        torch.Generator().manual_seed(1), lambda i, loss: losses.append((i, loss))
    )
    assert [i for i, _ in losses] == list(range(150))
    assert eps_error(model, fresh) < 0.75 * start
    deployed = deploy(model)
    assert eps_error(deployed, fresh) == pytest.approx(eps_error(model, fresh), rel=1e-3)
    for _, layer in layers_of(deployed):
        assert int(layer.qweight.max()) < 16
    for _, q in quantizers_of(deployed):
        assert int(q.zero_point.min()) >= 0 and int(q.zero_point.max()) < 64
    assert all(torch.equal(v, original[k]) for k, v in denoiser.state_dict().items())


@pytest.mark.slow
def test_weights_of_the_steps_decide_which_of_them_learn() -> None:
    """The same model, weighted towards the first half of the steps or towards the second."""
    denoiser = Toy()
    states = toy_states(denoiser, 12)
    tuples = tuples_of_steps(all_steps(96, 8), 12, torch.Generator().manual_seed(0))
    early = torch.tensor([1.0] * 4 + [1e-6] * 4)
    halves = [tuples[tuples[:, 0] < 4], tuples[tuples[:, 0] >= 4]]
    errors = []
    for weight in (early, early.flip(0)):
        model = toy_model(denoiser, states, 1, BitPolicy(weight=3, activation=8))
        generator = torch.Generator().manual_seed(1)
        EndToEnd(model, states, tuples, Plan(100, 8, 1e-3, step_weight=weight)).run(generator)
        with torch.no_grad():
            errors.append([float(_loss(model, states, half, None)) for half in halves])
    assert errors[0][0] < errors[1][0] and errors[1][1] < errors[0][1]


def test_weights_are_shared_between_draws_and_errors() -> None:
    """Of a step with 9 times the weight 3 times as many samples are drawn, and each counts three
    times as much; what is drawn has a mean weight of 1."""
    tuples = tuples_of_steps(all_steps(400, 4), 100, torch.Generator().manual_seed(0))
    tuples = tuples[(tuples[:, 0] != 1) | (tuples[:, 1] < 20)]  # fewer samples, drawn as often
    weight = torch.tensor([9.0, 1.0, 1.0, 0.0])
    root = _balanced_root(weight, tuples)
    assert float(root[0] / root[1]) == pytest.approx(3)
    generator = torch.Generator().manual_seed(1)
    index = torch.multinomial(_chances(root, tuples), 50_000, True, generator=generator)
    drawn = tuples[index, 0]
    counts = torch.bincount(drawn, minlength=4) / 50_000
    assert counts.tolist() == pytest.approx([0.6, 0.2, 0.2, 0.0], abs=0.01)
    assert float(root[drawn].mean()) == pytest.approx(1, abs=0.01)


# ---- what a sampler may do ----


@pytest.fixture(scope="module")
def unet_model() -> QuantDenoiser:
    return quantized(narrow_unet(), BitPolicy(), [0, 50, 400, 900], 3, total=1000)


def test_extra_calls_change_nothing(unet_model: QuantDenoiser) -> None:
    """The released APQ-DM code counts its calls; here any call may come at any time."""
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.full((3,), 400)
    first = unet_model(x, t)
    for other in ([0, 0, 0], [7, 400, 999], [999, 999, 999], [400, 400, 401]):
        unet_model(x * 3, torch.tensor(other))
        assert torch.equal(unet_model(x, t), first)
    unet_model(x[:1], torch.tensor([0]))
    assert torch.equal(unet_model(x, t), first)


def test_two_schedules_share_one_file(unet_model: QuantDenoiser, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    path.write_bytes(to_bytes(unet_model, {}))
    table = alphas_cumprod(make_betas("linear", 1e-4, 0.02, 1000))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def sample(model: nn.Module, steps: int, skip: str) -> torch.Tensor:
        with torch.no_grad():
            timesteps = sampling_timesteps(steps, skip)
            return ddim(model, x, timesteps, table, eta=0.0, clip_denoised=True)

    plans = [(4, "uniform"), (9, "quad"), (7, "uniform")]
    alone = [sample(load_quantized(path, meta(narrow_unet)), *plan) for plan in plans]
    shared = load_quantized(path, meta(narrow_unet))
    together = [sample(shared, *plan) for plan in (*plans, *reversed(plans))]
    for a, b, c in zip(alone, together[:3], reversed(together[3:]), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(alone[0], alone[1])

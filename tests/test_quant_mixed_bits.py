"""Bits of each layer's weights under a common budget.

python -m pytest tests/test_quant_mixed_bits.py
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.calibrated import run
from tests.helpers.toy import STEPS, Toy, toy_model, toy_states
from tinydm.models.roles import LayerRoles
from tinydm.quant.calibration.mixed_bits import (
    choices,
    curvatures,
    free_layers,
    losses,
    set_bits,
    share_out,
)
from tinydm.quant.calibration.run_state import RunState
from tinydm.quant.calibration.timesteps import all_steps, tuples_of_steps
from tinydm.quant.calibration.wrapping import BitPolicy
from tinydm.quant.runtime.packed_file import to_bytes


def probes(states, count: int) -> torch.Tensor:
    steps = all_steps(count, len(STEPS))
    return tuples_of_steps(steps, states.trajectories, torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_the_curvature_tells_what_an_error_of_the_weights_does() -> None:
    """Small random errors of one layer at a time: measured, and by the quadratic form."""
    denoiser = Toy()
    states = toy_states(denoiser)
    importance = torch.linspace(0.5, 2.0, len(STEPS))
    index = probes(states, 48)
    generator = torch.Generator().manual_seed(1)
    names = ["first", "second"]
    found = curvatures(denoiser, names, states, index.repeat(300, 1), importance, 8, generator)
    x, t, eps, conditioning = states.gather(index)
    for name in names:
        measured, predicted = [], []
        for _ in range(20):
            other = copy.deepcopy(denoiser)
            weight = other.get_submodule(name).weight
            error = 1e-3 * torch.randn(weight.shape, generator=generator)
            weight.data += error
            with torch.no_grad():
                of_rows = (other(x, t, **conditioning) - eps).square().flatten(1).sum(1)
            measured.append(float((of_rows * importance[index[:, 0]]).sum()))
            predicted.append(float((found[name] * error.square()).sum()) / 300)
        assert sum(predicted) / sum(measured) == pytest.approx(1, abs=0.25), name
    assert all(p.requires_grad for p in denoiser.parameters())


def test_scaled_channels_count_as_the_original_ones() -> None:
    denoiser = Toy()
    model = toy_model(denoiser, toy_states(denoiser), 2, BitPolicy(weight=4))
    layer = free_layers(model, 4)["second"]
    curvature = torch.rand(layer.weight.shape)
    plain = losses(layer, curvature, choices(4))
    assert sorted(plain) == [4, 5, 6, 7, 8] and list(plain.values()) == sorted(
        plain.values(), reverse=True
    )
    factor = torch.full((layer.weight.shape[1],), 2.0)
    layer.set_channel_scale(factor, layer.weight.detach() / 2, layer.quantizer)
    assert losses(layer, curvature, choices(4)) == pytest.approx(plain, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(1e-3, 1e3)), min_size=1, max_size=4),
    st.floats(2.0, 8.0),
)
def test_the_budget_is_kept_and_well_spent(layers: list[tuple[int, float]], average: float) -> None:
    """No move of one bit from a layer to another of the same size helps."""
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    losses_of = {str(i): {b: h * 4.0**-b for b in choices(2)} for i, (_, h) in enumerate(layers)}
    bits = share_out(losses_of, sizes, average)
    used = sum(sizes[n] * b for n, b in bits.items())
    assert used <= average * sum(sizes.values()) + 1e-6
    left = average * sum(sizes.values()) - used
    assert all(b == 8 or sizes[n] > left for n, b in bits.items())  # what fits is used
    for a in bits:
        for b in bits:
            if sizes[a] == sizes[b] and bits[a] > 2 and bits[b] < 8:
                lost = losses_of[a][bits[a] - 1] - losses_of[a][bits[a]]
                won = losses_of[b][bits[b]] - losses_of[b][bits[b] + 1]
                assert won <= lost * (1 + 1e-9)


def test_no_layer_has_fewer_bits_than_the_mean_has_whole_ones() -> None:
    assert [choices(average)[0] for average in (2.0, 2.5, 3.0, 3.9, 4.0, 8.0)] == [2, 2, 3, 3, 4, 8]
    assert all(choices(average)[-1] == 8 for average in (2.0, 8.0))


def test_a_layer_has_as_many_codes_as_its_new_bits_allow() -> None:
    denoiser = Toy()
    model = toy_model(denoiser, toy_states(denoiser), 2, BitPolicy(weight=4))
    set_bits(model, {"second": 2})
    layer = free_layers(model, 2)["second"]
    codes = layer.quantizer.codes(layer.weight)
    assert set(codes.detach().unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


class RolesToy(Toy):
    """Says which of its layers sees the timestep alone."""

    def layer_roles(self) -> LayerRoles:
        """One layer."""
        return LayerRoles(timestep_only=("embed",))


def test_layers_of_the_timestep_alone_give_bits_to_the_others() -> None:
    """The file does not grow, and no method but tinyDM's shares out."""
    shared, report, _, _ = run(RolesToy(), "tinydm")
    bits = report["bits"]["bits"]
    assert 4 <= bits["embed"] < 8 and bits["last"] > 4 and bits["second"] == 4
    alike, report, _, _ = run(RolesToy(), "tinydm", weight={"average_bits": 0.0})
    assert "bits" not in report
    assert len(to_bytes(shared, {})) <= len(to_bytes(alike, {}))
    assert "bits" not in run(RolesToy(), "e2e")[1]


def test_without_anything_to_share_no_time_is_spent() -> None:
    _, report, progress, _ = run(Toy(), "tinydm")
    assert "bits" not in report and "bits of the layers" not in progress.phases


def test_a_calibration_with_a_budget_resumes_to_the_same_bits_and_bytes() -> None:
    whole, report, _, saved = run(Toy(), "tinydm", weight={"average_bits": 3.5})
    assert set(report["bits"]["bits"].values()) != {4}
    half = next(s for s in saved if s["done"][-1:] == ["rounding"])
    again, _, _, _ = run(Toy(), "tinydm", RunState.from_plain(half), weight={"average_bits": 3.5})
    assert to_bytes(whole, {}) == to_bytes(again, {})

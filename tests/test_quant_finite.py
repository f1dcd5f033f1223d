"""Losses that become NaN or infinite end their phase at once, before the step that spreads them.

python -m pytest tests/test_quant_finite.py
"""

from dataclasses import replace

import pytest
import torch

from tests.helpers.blocks import FAST, Block, block_model, block_states, learn
from tests.helpers.toy import STEPS, Toy, toy_model, toy_states
from tinydm.quant.calibration.end_to_end import EndToEnd, Plan
from tinydm.quant.calibration.finite import DivergenceError, check_finite
from tinydm.quant.calibration.phases import unfinished_phase
from tinydm.quant.calibration.run_state import RunState
from tinydm.quant.calibration.search import Search
from tinydm.quant.calibration.timesteps import all_steps, tuples_of_steps
from tinydm.quant.calibration.wrapping import BitPolicy, activation_quantizers
from tinydm.quant.core.settings import SearchSettings
from tinydm.quant.runtime.denoiser import QuantDenoiser

NAN, INF = float("nan"), float("inf")


def learned(model: QuantDenoiser) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_search_stops_at_the_first_sample_that_has_no_error(value: float) -> None:
    """One trajectory of twelve is spoilt: the rounds before it are done, none after it."""
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 3, BitPolicy(weight=8, activation=4))
    states.eps[:, 7] = value
    rounds: list[int] = []
    settings = SearchSettings(rounds=100, batch_size=2)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(DivergenceError, match="at iteration .* of 100") as raised:
        alike = torch.ones(len(STEPS))
        search = Search(model, states, settings, importance=alike, first_errors=alike)
        search.run(generator, lambda i, loss: rounds.append(i))
    assert 0 < len(rounds) < 100
    assert f"iteration {len(rounds) + 1} of" in str(raised.value) and not raised.value.untouched
    assert all(torch.isfinite(p).all() for p in learned(model))


def test_end_to_end_steps_stop_too() -> None:
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 3, BitPolicy(weight=4, activation=4))
    states.eps[:, 7] = NAN
    tuples = tuples_of_steps(
        all_steps(96, len(STEPS)), states.trajectories, torch.Generator().manual_seed(0)
    )
    losses: list[float] = []
    with pytest.raises(DivergenceError, match="the loss is nan at iteration"):
        EndToEnd(model, states, tuples, Plan(100, 2, 5e-3)).run(
            torch.Generator().manual_seed(0), lambda i, loss: losses.append(loss)
        )
    assert 0 < len(losses) < 100
    assert all(torch.isfinite(p).all() for p in learned(model))


def test_block_reconstruction_names_the_unit() -> None:
    denoiser = Block()
    states = block_states(denoiser, 32, 1)
    model = block_model(denoiser, states, 4)
    with pytest.raises(DivergenceError, match="the loss is .* at conv, iteration .* of 250"):
        learn(denoiser, model, states, settings=replace(FAST, lr_scale=1e4))


@pytest.mark.parametrize(("value", "bad"), [(2.0, False), (NAN, True), (100.0, True)])
def test_what_was_learned_is_looked_through(value: float, bad: bool) -> None:
    """A logarithm of 100 is a number; what it stands for is not, in float32."""
    model = toy_model(Toy(), toy_states(Toy()), 3, BitPolicy(weight=8, activation=4))
    name, quantizer = next(iter(activation_quantizers(model)))
    check_finite(model)
    with torch.no_grad():
        quantizer.log_scale[0] = value
    if bad:
        with pytest.raises(DivergenceError, match=rf"{name}\.log_scale is not finite"):
            check_finite(model)
    else:
        check_finite(model)


def test_rewound_to_the_start_of_the_phase() -> None:
    start, amid = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    state = RunState(["equivalent"], amid, partial={"i": 3}, before=start)
    assert unfinished_phase(state).name == "bits"
    state.rewind()
    assert state.tensors is start and state.partial is None and not state.before
    state.rewind()  # stands there already
    assert state.tensors is start

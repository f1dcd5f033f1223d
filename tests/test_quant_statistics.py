"""Statistics of the activations, which the ranges come from."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers.toy import STEPS, Toy, toy_states
from tinydm.quant.calibration.sharing import Alone
from tinydm.quant.calibration.statistics import LARGEST_DRAW_RANGE, Draws, collect
from tinydm.quant.calibration.wrapping import BitPolicy, quantize
from tinydm.quant.core.context import TimestepContext


def test_statistics_hold_the_extremes_of_each_timestep() -> None:
    denoiser = Toy()
    states = toy_states(denoiser)
    model = quantize(denoiser, TimestepContext(STEPS, 1000), BitPolicy())
    stats = collect(denoiser, model, states.by_timestep(12, 5))
    first = stats["denoiser.first.inputs.0"]
    for b, t in enumerate(sorted(STEPS)):
        x = states.x[STEPS.index(t)]
        assert first.low[b] == x.min() and first.high[b] == x.max()
        assert first.values[b].min() == x.min() and first.values[b].max() == x.max()
    second = stats["denoiser.second.inputs.0"]
    assert second.high[-1] > 8 * second.high[0]
    broken = copy.deepcopy(denoiser)
    broken.first.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="second"):
        collect(broken, model, states.by_timestep(12, 5))


# ---- statistics in parts ----


def test_statistics_made_in_parts_are_the_same() -> None:
    """Three processes' worth of draws, each of every third batch, joined in the order."""

    class Three(Alone):
        def share(self, count: int, make: Callable) -> Iterator:
            return (parts[i % 3].make(i) for i in range(count))

    denoiser = Toy()
    states = toy_states(denoiser)
    model = quantize(denoiser, TimestepContext(STEPS, 1000), BitPolicy())
    batches = list(states.by_timestep(12, 5))
    whole = collect(denoiser, model, batches, 64, seed=3)
    parts = [Draws(denoiser, model, batches, 64, 3) for _ in range(3)]
    joined = collect(denoiser, model, batches, 64, 3, Three())
    assert set(joined) == set(whole) and len(whole) >= 3
    for name, statistics in whole.items():
        for key, value in vars(statistics).items():
            assert torch.equal(vars(joined[name])[key], value), (name, key)
    other = collect(denoiser, model, batches, 64, seed=4)
    assert not torch.equal(other[name].values, statistics.values)


@pytest.mark.parametrize("places", [2, 1000, LARGEST_DRAW_RANGE])
def test_a_draw_takes_equally_many_random_numbers_of_any_range(places: int) -> None:
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    torch.randint(1, (99,), generator=one)
    torch.randint(places, (99,), generator=other)
    assert torch.equal(one.get_state(), other.get_state())


def test_a_layer_that_runs_twice_is_named() -> None:
    class Twice(Toy):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t, y) + self.last(self.first(x))

    states, denoiser = toy_states(Toy()), Twice()
    model = quantize(denoiser, TimestepContext(STEPS, 1000), BitPolicy())
    with pytest.raises(ValueError, match="layer (first|last) runs twice"):
        collect(denoiser, model, states.by_timestep(4, 4))

"""The choice of calibration samples, and the states that they come from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.calibration.timesteps import (
    ActiveSelector,
    all_steps,
    normal_steps,
    normalised_entropy,
    spread,
    tuples_of_steps,
    uniform_steps,
)

FEW = settings(max_examples=80, deadline=None)


def test_score_is_the_formula_of_the_paper_without_the_error_term() -> None:
    selector = ActiveSelector(torch.ones(3), exploration=1.5, error_weight=0.0)
    selector.entropy = normalised_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]]))
    selector.chosen = torch.tensor([4, 0, 1])
    selector.error = torch.tensor([1.0, 2.0, 3.0])
    in_nats = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    expected = [1 + 1.5 / 5, 0 + 1.5, in_nats / math.log(2) + 1.5 / 2]
    assert torch.allclose(selector.score(), torch.tensor(expected), atol=1e-5)
    assert selector.pick(1).tolist() == [1]
    # 1.3, 0.75, 1.219 -> 0; then 1.25, .., 1.219 -> 0; then 1.214, .., 1.219 -> 2
    assert selector.pick(3).tolist() == [0, 0, 2]
    assert selector.chosen.tolist() == [6, 1, 2]


def test_what_a_step_does_to_the_image_is_relative_to_the_mean() -> None:
    selector = ActiveSelector(torch.tensor([2.0, 1.0, 1.0]), exploration=0.0, error_weight=3.0)
    assert selector.score().tolist() == [0, 0, 0]
    selector.observe_error(torch.tensor([0, 2, 2]), torch.tensor([1.0, 3.0, 5.0]))
    assert torch.allclose(selector.score(), torch.tensor([3.0, 0.0, 6.0]))  # 2 x 1, 0, 1 x 4
    assert selector.pick(1).tolist() == [2]
    selector.observe_error(torch.tensor([2]), torch.tensor([0.0]))
    assert torch.allclose(selector.error, torch.tensor([1.0, 0.0, 2.0]))


def test_samples_are_shared_in_proportion_to_the_error() -> None:
    """The best score again and again must not end in one step: shares 3, 2 and 1 here."""
    selector = ActiveSelector(torch.tensor([1.0, 0.5, 3.0]), exploration=1.0, error_weight=1.0)
    selector.error = torch.tensor([4.0, 4.0, 0.0])
    assert selector.shares().tolist() == [3, 2, 1]
    selector.pick(600)
    assert (selector.chosen - torch.tensor([300, 200, 100])).abs().max() <= 2


@pytest.mark.parametrize("count", [1, 5, 20, 100])
def test_every_step_is_eligible(count: int) -> None:
    """The released APQ-DM code can never choose the 30 noisiest steps and fails below 31."""
    for error_weight in (0.0, 1.0):
        selector = ActiveSelector(torch.ones(count), 1.5, error_weight)
        assert sorted(selector.pick(count).tolist()) == list(range(count))
        selector.entropy[0] = 1.0
        selector.chosen += 10
        assert selector.pick(1).tolist() == [0]
        selector.entropy = torch.zeros(count)
        selector.entropy[-1] = 1.0
        assert selector.pick(1).tolist() == [count - 1]


def test_uniform_steps_are_evenly_spaced_with_both_ends() -> None:
    steps = uniform_steps(1000, 100)
    assert len(steps) == 1000 and len(steps.unique()) == 20
    assert steps.min() == 0 and steps.max() == 99
    assert set(steps.unique().diff().tolist()) <= {5, 6}
    assert torch.bincount(steps)[steps.unique()].tolist() == [50] * 20
    assert uniform_steps(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert uniform_steps(2, 1).tolist() == [0, 0]


def test_few_samples_are_of_all_noise_levels() -> None:
    for steps in (uniform_steps(5, 50), all_steps(5, 50)):
        assert steps.tolist() == [0, 12, 24, 37, 49]
    tuples = torch.stack([torch.arange(40) % 20, torch.arange(40)], 1)
    assert torch.equal(spread(tuples, 40), tuples) and torch.equal(spread(tuples, 99), tuples)
    assert torch.equal(spread(tuples, 25), tuples[:25])
    few = spread(tuples, 5)
    assert few[:, 0].tolist() == [0, 5, 10, 14, 19]
    assert all(pair in tuples.tolist() for pair in few.tolist())


def test_normal_steps_lean_to_the_clean_end() -> None:
    steps = normal_steps(20_000, 100, torch.Generator().manual_seed(0), 0.4, 0.1)
    assert float(steps.float().mean()) == pytest.approx(59.5, abs=0.5)
    assert float(steps.float().std()) == pytest.approx(10, abs=0.5)
    wide = normal_steps(5000, 10, torch.Generator().manual_seed(0))
    assert wide.min() == 0 and wide.max() == 9


def test_all_steps_come_alike() -> None:
    assert torch.bincount(all_steps(64, 8)).tolist() == [8] * 8
    assert all_steps(3, 8).tolist() == [0, 4, 7]
    few = all_steps(64, 250)  # what a layer's measures look at must not be the noisiest steps alone
    assert few[0] == 0 and few[-1] == 249 and set(few.diff().tolist()) == {3, 4}


@FEW
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 99))
def test_no_trajectory_repeats_before_all_were_used(
    steps: list[int], trajectories: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = tuples_of_steps(torch.tensor(steps), trajectories, generator)
    assert pairs[:, 0].tolist() == steps
    for k in set(steps):
        used = pairs[pairs[:, 0] == k, 1]
        counts = torch.bincount(used, minlength=trajectories)
        assert len(counts) == trajectories and counts.max() - counts.min() <= 1


def coded_states(steps: list[int], trajectories: int, first: int = 0) -> CalibrationStates:
    """x = (k, j) and eps = -(k, j) for step k and trajectory j."""
    k, j = torch.meshgrid(
        torch.arange(len(steps)), torch.arange(first, first + trajectories), indexing="ij"
    )
    x = torch.stack([k, j], -1).float()[..., None, None]
    return CalibrationStates(x, -x, steps, {"y": torch.arange(first, first + trajectories)})


def test_each_state_keeps_its_timestep_noise_and_conditioning() -> None:
    steps = [30, 20, 10, 0, 0]  # a quad schedule repeats t = 0
    states = coded_states(steps, 6)
    index = tuples_of_steps(all_steps(60, 5), 6, torch.Generator().manual_seed(0))
    x, t, eps, conditioning = states.gather(index)
    assert torch.equal(x[:, :, 0, 0].long(), index)
    assert t.tolist() == [steps[k] for k in index[:, 0].tolist()]
    assert torch.equal(eps, -x)
    assert torch.equal(conditioning["y"], index[:, 1])
    seen = []
    for x, t, conditioning in states.by_timestep(limit=5, batch_size=2):
        assert [steps[int(k)] for k in x[:, 0, 0, 0]] == [t] * len(x)
        assert torch.equal(x[:, 1, 0, 0].long(), conditioning["y"])
        seen += x[:, :, 0, 0].long().tolist()
    assert [k for k, _ in seen] == [k for k in range(5) for _ in range(5)]
    chosen = [[j for k, j in seen if k == step] for step in range(5)]
    assert all(len(set(js)) == 5 for js in chosen)
    # All conditions come up, though those of the first trajectories may be alike.
    assert {j for js in chosen for j in js} == set(range(6)) and len(set(map(tuple, chosen))) > 1
    again = [c["y"].tolist() for _, _, c in states.by_timestep(limit=5, batch_size=5)]
    assert again == chosen
    plain = CalibrationStates(states.x, states.eps, steps)
    rows = [x[:, 1, 0, 0].tolist() for x, _, _ in plain.by_timestep(limit=4, batch_size=4)]
    assert rows == [[0, 1, 2, 3]] * 5
    seen = []
    for x, t, conditioning in states.at_step(3, 4):
        assert t == 0 and (x[:, 0] == 3).all()
        seen += conditioning["y"].tolist()
    assert seen == list(range(6))

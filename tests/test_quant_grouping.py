"""Groups of timesteps by the table of errors."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydm.quant.calibration.grouping import (
    assign,
    candidate_ranges,
    contiguous_groups,
    error_table,
    refine,
    uniform_groups,
)
from tinydm.quant.calibration.quantizer import LearnedQuantizer
from tinydm.quant.calibration.statistics import Statistics
from tinydm.quant.core.context import TimestepContext

FEW = settings(max_examples=80, deadline=None)


def cost_of(table: torch.Tensor, group: torch.Tensor, candidates: torch.Tensor) -> float:
    return float(table[torch.arange(len(table)), candidates[group]].double().sum())


def brute_force(table: torch.Tensor, groups: int) -> float:
    """The least cost over every split into `groups` runs and every choice of candidates."""
    bins, least = len(table), math.inf
    for cuts in combinations(range(1, bins), groups - 1):
        edges = [0, *cuts, bins]
        runs = zip(edges[:-1], edges[1:], strict=True)
        least = min(least, sum(float(table[a:b].double().sum(0).min()) for a, b in runs))
    return least


TABLES = st.integers(1, 6).flatmap(
    lambda c: st.lists(
        st.lists(st.integers(0, 20).map(float), min_size=c, max_size=c), min_size=1, max_size=7
    )
)


@FEW
@given(TABLES, st.integers(1, 5))
def test_runs_are_the_best_of_all_runs(rows: list[list[float]], groups: int) -> None:
    table = torch.tensor(rows)
    group, candidates = contiguous_groups(table, groups)
    count = min(groups, len(table))
    assert len(candidates) == count and group.unique().tolist() == list(range(count))
    assert (group.diff() >= 0).all()
    assert cost_of(table, group, candidates) == pytest.approx(brute_force(table, count))


@FEW
@given(TABLES, st.integers(1, 5), st.data())
def test_refinement_never_raises_the_cost(
    rows: list[list[float]], groups: int, data: st.DataObject
) -> None:
    table = torch.tensor(rows)
    group, candidates = contiguous_groups(table, groups)
    if data.draw(st.booleans()):  # any other start as well
        index = st.integers(0, len(candidates) - 1)
        group = torch.tensor(data.draw(st.lists(index, min_size=len(rows), max_size=len(rows))))
        candidates = torch.tensor(
            data.draw(st.lists(st.integers(0, len(rows[0]) - 1), min_size=groups, max_size=groups))
        )
    before, first = cost_of(table, group, candidates), candidates.clone()
    for rounds in (1, 2, 10):
        new_group, new = refine(table, group, candidates, rounds)
        after = cost_of(table, new_group, new)
        assert after <= before + 1e-6
        before = after
        assert int(new_group.max()) < len(new)
    assert torch.equal(candidates, first)  # the caller's are not touched


@FEW
@given(st.integers(1, 30), st.integers(1, 10))
def test_uniform_groups_are_equal_runs(bins: int, groups: int) -> None:
    group, candidates = uniform_groups(torch.rand(bins, 3), groups)
    sizes = torch.bincount(group)
    assert len(sizes) == len(candidates) == min(groups, bins)
    assert (group.diff() >= 0).all() and sizes.max() - sizes.min() <= 1


def statistics_of(spreads: list[float], seed: int = 0) -> Statistics:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(len(spreads), 500, generator=g) * torch.tensor(spreads)[:, None]
    return Statistics(values, values.amin(1), values.amax(1), torch.ones(len(values)))


def assigned(stats: Statistics, groups: int, how: str, scale: str = "mse") -> LearnedQuantizer:
    context = TimestepContext(list(range(len(stats.low))), 1000)
    quantizer = LearnedQuantizer(context, 6, False, False)
    assign(quantizer, stats, groups, how, scale)
    return quantizer


@pytest.mark.parametrize("how", ["dp", "kmeans", "differentiable"])
@pytest.mark.parametrize("jump", [1, 4, 7])
def test_the_jump_of_a_range_becomes_the_border_of_two_groups(how: str, jump: int) -> None:
    quantizer = assigned(statistics_of([1.0] * jump + [20.0] * (9 - jump)), 2, how)
    group = quantizer.group_of_timestep
    assert len(group[:jump].unique()) == len(group[jump:].unique()) == 1
    assert group[0] != group[-1]
    ratio = (quantizer.log_scale[group[-1]] - quantizer.log_scale[group[0]]).exp()
    assert 12 < ratio < 33


def test_free_groups_need_not_be_runs() -> None:
    spreads = [1.0, 20.0] * 4
    free = assigned(statistics_of(spreads), 2, "kmeans").group_of_timestep
    assert free.tolist() in ([0, 1] * 4, [1, 0] * 4)
    runs = assigned(statistics_of(spreads), 2, "dp").group_of_timestep
    assert (runs.diff() >= 0).all()


def test_more_groups_never_raise_the_error() -> None:
    stats = statistics_of([0.1, 0.3, 1, 3, 9, 9, 2, 0.5])
    low, high = candidate_ranges(stats, False, False)
    table = error_table(stats, low, high, 4, False)
    costs = [cost_of(table, *refine(table, *contiguous_groups(table, g))) for g in range(1, 9)]
    assert all(b <= a * 1.0001 for a, b in zip(costs, costs[1:], strict=False))
    assert costs[-1] == pytest.approx(float(table.min(1).values.sum()), rel=1e-5)
    assert costs[3] < 0.6 * costs[0]


def test_candidates_are_close_to_each_other_however_far_ranges_reach() -> None:
    """States that grow along the trajectory leave the small ones no coarser a choice."""
    _, high = candidate_ranges(statistics_of([1.0, 1.0, 30.0]), False, True)
    assert 1.1 < float((high[1:] / high[:-1]).max()) < 1.14
    _, alike = candidate_ranges(statistics_of([1.0, 1.0, 1.0]), False, True)
    assert len(alike) == 20


def test_ranges_of_many_bits_follow_states_that_grow() -> None:
    context = TimestepContext([0, 1, 2, 3], 1000)
    quantizer = LearnedQuantizer(context, 16, False, False)
    largest = torch.tensor([1000.0, 300.0, 8.0, 5.0])
    assign(
        quantizer, Statistics(largest[:, None], -largest, largest, torch.ones(4)), 8, "none", "mse"
    )
    assert quantizer.group_of_timestep.tolist() == [0, 0, 1, 1]
    x = torch.linspace(-5, 5, 500)[None]
    context.set(torch.tensor([3]))
    assert float((quantizer(x).detach() - x).abs().max()) < 5e-4
    assign(quantizer, statistics_of([4.0, 3.0, 3.0, 1.0]), 8, "none", "mse")
    assert quantizer.groups == 1


@pytest.mark.parametrize("scale", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "unsigned"])
def test_ranges_of_dead_and_constant_activations_are_finite(scale: str, kind: str) -> None:
    values = torch.zeros(4, 100)
    values[1], values[2] = 3.0, -2.0
    stats = Statistics(values, values.amin(1), values.amax(1), torch.ones(len(values)))
    context = TimestepContext([0, 1, 2, 3], 10)
    quantizer = LearnedQuantizer(context, 8, kind == "symmetric", kind == "unsigned")
    assign(quantizer, stats, 4, "kmeans", scale)
    for t in range(4):
        context.set(torch.tensor([t]))
        out = quantizer(values[t]).detach()
        assert torch.isfinite(out).all()
        if not (kind == "unsigned" and t == 2):
            assert torch.allclose(out, values[t], atol=0.05)


def test_minmax_covers_the_extremes_of_every_group() -> None:
    stats = statistics_of([1.0, 5.0, 2.0, 40.0])
    quantizer = assigned(stats, 2, "none", "minmax")
    for b in range(4):
        quantizer.context.set(torch.tensor([b]))
        scale, zero, _ = quantizer.deploy().current(1)
        assert -zero * scale <= stats.low[b] + scale * 0.51
        assert (63 - zero) * scale >= stats.high[b] - scale * 0.51

"""Groups of timesteps, their search, and the choice of calibration samples, on a toy denoiser.

python -m pytest tests/test_quant_grouping.py
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant.bank import Bank
from quant.calibration import calibrate
from quant.context import TimestepContext
from quant.grouping import (
    assign,
    candidate_ranges,
    contiguous_groups,
    error_table,
    refine,
    uniform_groups,
)
from quant.layers import QuantLayer
from quant.methods import CalibrationSettings, QuantSettings, SearchSettings, preset
from quant.model import BitPolicy, QuantDenoiser, activation_quantizers, quantize
from quant.packed import to_bytes
from quant.quantizer import LearnedQuantizer
from quant.search import search, start
from quant.state import PHASES, CalibrationState
from quant.statistics import LARGEST, Draws, Statistics, collect
from quant.timesteps import (
    ActiveSelector,
    all_steps,
    normal_steps,
    normalised_entropy,
    tuples_of_steps,
    uniform_steps,
)

FEW = settings(max_examples=80, deadline=None)
STEPS = [900, 700, 500, 400, 300, 200, 100, 0]


class Toy(nn.Module):
    """Three layers and no layer_roles; the activations grow with the timestep.

    It refuses a state that does not belong to its timestep: channel 0 of x holds t / 1000, and
    channel 1 the number of the trajectory, which `y` repeats.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(4, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)
        self.embed = nn.Linear(2, 12)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not torch.allclose(x[:, 0, 0, 0], t / 1000):
            raise AssertionError("a state was met with another timestep")
        if not torch.equal(x[:, 1, 0, 0], y):
            raise AssertionError("a state was met with another conditioning")
        grown = (1 + 15 * (t >= 400).float()).view(-1, 1, 1, 1)
        emb = self.embed(torch.stack([t / 1000, torch.cos(t / 100)], 1))
        h = self.norm(self.first(x)) * grown + emb[:, :, None, None]
        return self.last(nn.functional.silu(self.second(h)))


def toy_bank(denoiser: nn.Module, trajectories: int = 12, seed: int = 1, first: int = 0) -> Bank:
    """Its states encode step and trajectory, see Toy."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(STEPS), trajectories, 4, 6, 6, generator=g)
    x[:, :, 0] = torch.tensor(STEPS).view(-1, 1, 1, 1) / 1000
    y = torch.arange(first, first + trajectories).float()
    x[:, :, 1] = y.view(1, -1, 1, 1)
    eps = [denoiser(x[k], torch.full((trajectories,), t), y).detach() for k, t in enumerate(STEPS)]
    return Bank(x, torch.stack(eps), STEPS, {"y": y})


@torch.no_grad()
def toy_sampler(model: nn.Module, adjust: Callable[..., torch.Tensor], count: int) -> None:
    x = torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    y = torch.arange(count).float()
    for t in STEPS:
        x[:, 0], x[:, 1] = t / 1000, y.view(-1, 1, 1)  # see Toy
        steps = torch.full((count,), t)
        x = x + 0.3 * adjust(x, steps, model(x, steps, y))


def eps_error(model: nn.Module, bank: Bank) -> float:
    """Mean squared error over the whole bank."""
    total = 0.0
    with torch.no_grad():
        for k, t in enumerate(bank.timesteps):
            steps = torch.full((bank.trajectories,), t)
            out = model(bank.x[k], steps, **bank.conditioning)
            total += float((out - bank.eps[k]).square().mean())
    return total / len(bank.timesteps)


def toy_model(
    denoiser: nn.Module, bank: Bank, groups: int, policy: BitPolicy, how: str = "kmeans"
) -> QuantDenoiser:
    """Under calibration, with ranges from the bank."""
    model = quantize(denoiser, TimestepContext(bank.timesteps, 1000), policy)
    stats = collect(denoiser, model, bank.by_timestep(bank.trajectories, 8))
    for name, quantizer in activation_quantizers(model):
        assign(quantizer, stats[name], groups, how, "mse")
    return model


class Silent:
    """Progress that is only counted: phase -> (announced, done)."""

    def __init__(self) -> None:
        self.phases: dict[str, list[int]] = {}
        self.open = ""

    def begin(self, phase: str, total: int) -> None:
        assert not self.open
        self.open, self.phases[phase] = phase, [total, 0]

    def step(self, text: str) -> None:
        self.phases[self.open][1] += 1

    def end(self) -> None:
        self.open = ""


def tiny(
    method: str = "tinydm", progressive: bool = True, **calibration: object
) -> tuple[QuantSettings, object]:
    """Settings of a method in seconds instead of minutes."""
    quant, calib = preset(method)
    finetune = 30 if quant.reconstruct.finetune_iterations else 0
    quant = replace(
        quant,
        activation=replace(quant.activation, bits=6, groups=min(3, quant.activation.groups)),
        search=replace(quant.search, rounds=6, batch_size=8),
        reconstruct=replace(
            quant.reconstruct,
            iterations=25,
            finetune_iterations=finetune,
            progressive=progressive and bool(finetune),  # off by default; it must work too
        ),
    )
    values = {"samples": 64, "trajectories": 12, "batch_size": 8} | calibration
    return quant, replace(calib, **values)


# ---- grouping by error table ----


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
    group = quantizer.group_of_bin
    assert len(group[:jump].unique()) == len(group[jump:].unique()) == 1
    assert group[0] != group[-1]
    ratio = (quantizer.log_scale[group[-1]] - quantizer.log_scale[group[0]]).exp()
    assert 12 < ratio < 33


def test_free_groups_need_not_be_runs() -> None:
    spreads = [1.0, 20.0] * 4
    free = assigned(statistics_of(spreads), 2, "kmeans").group_of_bin
    assert free.tolist() in ([0, 1] * 4, [1, 0] * 4)
    runs = assigned(statistics_of(spreads), 2, "dp").group_of_bin
    assert (runs.diff() >= 0).all()


def test_more_groups_never_raise_the_error() -> None:
    stats = statistics_of([0.1, 0.3, 1, 3, 9, 9, 2, 0.5])
    low, high = candidate_ranges(stats, False, False)
    table = error_table(stats, low, high, 4, False)
    costs = [cost_of(table, *refine(table, *contiguous_groups(table, g))) for g in range(1, 9)]
    assert all(b <= a * 1.0001 for a, b in zip(costs, costs[1:], strict=False))
    assert costs[-1] == pytest.approx(float(table.min(1).values.sum()), rel=1e-5)
    assert costs[3] < 0.6 * costs[0]


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
        scale, zero = quantizer.deploy().current(1)
        assert -zero * scale <= stats.low[b] + scale * 0.51
        assert (63 - zero) * scale >= stats.high[b] - scale * 0.51


def test_statistics_hold_the_extremes_of_each_timestep() -> None:
    denoiser = Toy()
    bank = toy_bank(denoiser)
    model = quantize(denoiser, TimestepContext(STEPS, 1000), BitPolicy())
    stats = collect(denoiser, model, bank.by_timestep(12, 5))
    first = stats["denoiser.first.inputs.0"]
    for b, t in enumerate(sorted(STEPS)):
        x = bank.x[STEPS.index(t)]
        assert first.low[b] == x.min() and first.high[b] == x.max()
        assert first.values[b].min() == x.min() and first.values[b].max() == x.max()
    second = stats["denoiser.second.inputs.0"]
    assert second.high[-1] > 8 * second.high[0]
    broken = copy.deepcopy(denoiser)
    broken.first.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="second"):
        collect(broken, model, bank.by_timestep(12, 5))


# ---- statistics in parts ----


def test_statistics_made_in_parts_are_the_same() -> None:
    """Three processes' worth of draws, each of every third batch, joined in the order."""
    denoiser = Toy()
    bank = toy_bank(denoiser)
    model = quantize(denoiser, TimestepContext(STEPS, 1000), BitPolicy())
    batches = list(bank.by_timestep(12, 5))
    whole = collect(denoiser, model, batches, 64, seed=3)
    parts = [Draws(denoiser, model, batches, 64, 3) for _ in range(3)]
    made = [parts[i % 3].make(i) for i in range(len(batches))]
    joined = collect(denoiser, model, batches, 64, 3, lambda count, make: iter(made))
    assert set(joined) == set(whole) and len(whole) >= 3
    for name, statistics in whole.items():
        for key, value in vars(statistics).items():
            assert torch.equal(vars(joined[name])[key], value), (name, key)
    other = collect(denoiser, model, batches, 64, seed=4)
    assert not torch.equal(other[name].values, statistics.values)


@pytest.mark.parametrize("places", [2, 1000, LARGEST])
def test_a_draw_takes_equally_many_random_numbers_of_any_range(places: int) -> None:
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    torch.randint(1, (99,), generator=one)
    torch.randint(places, (99,), generator=other)
    assert torch.equal(one.get_state(), other.get_state())


def test_a_layer_that_runs_twice_is_named() -> None:
    class Twice(Toy):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t, y) + self.last(self.first(x))

    bank, denoiser = toy_bank(Toy()), Twice()
    model = quantize(denoiser, TimestepContext(STEPS, 1000), BitPolicy())
    with pytest.raises(ValueError, match="layer (first|last) runs twice"):
        collect(denoiser, model, bank.by_timestep(4, 4))


# ---- differentiable search ----


def test_search_lowers_the_entropy_and_ends_hard() -> None:
    denoiser = Toy()
    bank = toy_bank(denoiser)
    model = toy_model(denoiser, bank, 3, BitPolicy(weight=8, activation=4))
    quantizers = [q for _, q in activation_quantizers(model) if q.groups > 1]
    assert len(quantizers) >= 2
    before = {n: q.log_scale.detach().clone() for n, q in activation_quantizers(model)}
    logits = start(quantizers)
    sigma = [torch.softmax(p, -1) for p in logits]
    for s, q in zip(sigma, quantizers, strict=True):
        cost = q.group_error / q.group_error.amin(1, keepdim=True)
        assert torch.equal(s.max(-1).values, s.gather(1, q.group_of_bin[:, None])[:, 0])
        worse = cost > 1.4  # hopeless ranges start far behind, near ties start undecided
        assert (s[worse] < 0.05).all() and s[(cost < 1.02) & (s < 1)].min() > 0.1
    entropy = torch.stack([normalised_entropy(s) for s in sigma]).mean()
    rounds: list[int] = []
    result = search(
        model,
        bank,
        SearchSettings(rounds=30, batch_size=8),
        torch.Generator().manual_seed(0),
        torch.ones(len(STEPS)),
        lambda i, loss: rounds.append(i),
    )
    assert rounds == list(range(30))
    assert result.selector.entropy.mean() < 0.2 * entropy
    assert result.decided > 0.95 and 0 <= result.moved < 0.5
    assert result.tuples.shape == (240, 2)
    assert result.tuples[:, 0].unique().tolist() == list(range(len(STEPS)))  # none left out
    for name, q in activation_quantizers(model):
        assert q.logits is None and q.temperature == 1.0
        assert int(q.group_of_bin.max()) < q.groups
        if q.groups > 1:
            assert not torch.equal(q.log_scale, before[name])  # the scales learn as well
        else:
            assert torch.equal(q.log_scale, before[name])


def test_search_repairs_a_wrong_group() -> None:
    """One timestep starts in the group of the small range: the loss takes it to the other."""
    denoiser = Toy()
    bank = toy_bank(denoiser)
    model = toy_model(denoiser, bank, 2, BitPolicy(weight=8, activation=6))
    quantizer = dict(activation_quantizers(model))["denoiser.second.inputs.0"]
    right = quantizer.group_of_bin.clone()
    assert len(right.unique()) == 2
    wrong = right.clone()
    wrong[-1] = 1 - wrong[-1]
    quantizer.group_of_bin = wrong
    for _, q in activation_quantizers(model):
        q.group_error = None  # which would say so at once
    hurt = eps_error(model, bank)
    search(
        model,
        bank,
        SearchSettings(rounds=60, batch_size=8, lr_logits=0.3, entropy=0.1),
        torch.Generator().manual_seed(0),
        torch.ones(len(STEPS)),
    )
    assert quantizer.group_of_bin[-1] == right[-1]
    assert eps_error(model, bank) < 0.5 * hurt


def test_search_without_groups_does_nothing() -> None:
    denoiser = Toy()
    bank = toy_bank(denoiser)
    model = toy_model(denoiser, bank, 1, BitPolicy())
    state = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    result = search(model, bank, SearchSettings(rounds=2), generator, torch.ones(len(STEPS)))
    assert len(result.tuples) == 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---- the whole calibration on a plain module ----


def run(
    denoiser: nn.Module, method: str, state: CalibrationState | None = None, **calibration: object
) -> tuple[QuantDenoiser, dict, Silent, list[dict]]:
    bank, progress, saved = toy_bank(denoiser), Silent(), []
    quant, calib = tiny(method, **calibration)
    model, report = calibrate(
        denoiser,
        bank,
        lambda model, number: toy_bank(denoiser, 4, 100 + number, 50 * number),
        toy_sampler,
        quant,
        calib,
        1000,
        torch.ones(len(STEPS)),
        progress,
        state,
        lambda state: saved.append(copy.deepcopy(state.to_plain())),
    )
    return model, report, progress, saved


@pytest.mark.parametrize("method", ["tinydm", "qdiffusion", "ptqd", "ptq4dm", "minmax"])
def test_a_plain_module_is_calibrated_by_every_method(method: str) -> None:
    denoiser = Toy()
    original = copy.deepcopy(denoiser.state_dict())
    model, report, progress, saved = run(denoiser, method)
    assert all(torch.equal(v, original[k]) for k, v in denoiser.state_dict().items())
    whole = [state["done"][-1] for state in saved if state["partial"] is None]
    assert whole == list(PHASES)
    for phase, (announced, done) in progress.phases.items():
        assert announced == done, phase
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    assert [layer.bits for layer in layers] == [4, 4, 4, 4]
    fresh = toy_bank(denoiser, 6, seed=77)
    error, power = eps_error(model, fresh), float(fresh.eps.square().mean())
    assert math.isfinite(error) and error < 0.1 * power
    assert report["tuples_per_step"] and sum(report["tuples_per_step"]) == 64
    assert ("reconstruct" in report) == (method in ("qdiffusion", "ptqd"))
    assert ("finetune" in report) == ("search" in report) == (method == "tinydm")
    assert (model.correction is not None) == (method in ("tinydm", "ptqd"))
    if method == "tinydm":
        assert report["finetune"]["visited"] == 2
        assert len(report["rounding"]["relative_errors"]) == 4
        assert len(report["equivalent"]["relative_errors"]) == 4


def test_tinydm_beats_the_naive_floor() -> None:
    denoiser = Toy()
    fresh = toy_bank(denoiser, 8, seed=78)
    assert eps_error(run(denoiser, "tinydm")[0], fresh) < 0.75 * eps_error(
        run(denoiser, "minmax")[0], fresh
    )


@pytest.mark.parametrize(
    ("method", "progressive", "parts"),
    [("tinydm", True, 0), ("tinydm", False, 2), ("ptqd", False, 4)],
)
def test_calibration_resumed_anywhere_gives_the_same_bytes(
    method: str, progressive: bool, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any phase, after each block, between end-to-end steps."""
    monkeypatch.setattr("quant.calibration.CHECKPOINT", 12)
    denoiser = Toy()
    limits = {"progressive": progressive, "memory_gb": 1e-6}  # a block a chunk
    model, _, _, saved = run(denoiser, method, **limits)
    whole = to_bytes(model, {})
    assert sum(plain["partial"] is not None for plain in saved) == parts
    for plain in saved:
        state = CalibrationState.from_plain(copy.deepcopy(plain))
        resumed, report, progress, _ = run(denoiser, method, state, **limits)
        assert all(announced == done for announced, done in progress.phases.values())
        assert to_bytes(resumed, {}) == whole, f"after {plain['done'][-1]}"
        assert report["tuples_per_step"]


@pytest.mark.parametrize("kind", ["active", "uniform", "normal", "all"])
def test_every_choice_of_timesteps_gives_the_asked_samples(kind: str) -> None:
    saved = run(Toy(), "tinydm", timesteps=kind, samples=40)[3]
    tuples = saved[-1]["tuples"]
    assert tuples.shape == (40, 2)
    assert int(tuples[:, 0].max()) < len(STEPS) and int(tuples[:, 1].max()) < 12


# ---- choice of timesteps ----


def test_score_is_the_formula_of_the_paper_without_the_error_term() -> None:
    selector = ActiveSelector(3, exploration=1.5, error_weight=0.0)
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


def test_error_term_is_relative_to_the_largest() -> None:
    selector = ActiveSelector(3, exploration=0.0, error_weight=2.0)
    assert selector.score().tolist() == [0, 0, 0]
    selector.observe_error(torch.tensor([0, 2, 2]), torch.tensor([1.0, 3.0, 5.0]))
    assert torch.allclose(selector.score(), torch.tensor([0.5, 0.0, 2.0]))
    selector.observe_error(torch.tensor([2]), torch.tensor([0.0]))
    assert torch.allclose(selector.error, torch.tensor([1.0, 0.0, 2.0]))
    assert selector.pick(1).tolist() == [2]


def test_samples_are_shared_in_proportion_to_the_error() -> None:
    """The best score again and again must not end in one step: weights 2, 1.5 and 1 here."""
    selector = ActiveSelector(3, exploration=1.0, error_weight=1.0)
    selector.error = torch.tensor([4.0, 2.0, 0.0])
    selector.pick(450)
    assert (selector.chosen - torch.tensor([200, 150, 100])).abs().max() <= 2


@pytest.mark.parametrize("count", [1, 5, 20, 100])
def test_every_step_is_eligible(count: int) -> None:
    """The released APQ-DM code can never choose the 30 noisiest steps and fails below 31."""
    for error_weight in (0.0, 1.0):
        selector = ActiveSelector(count, 1.5, error_weight)
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


def test_normal_steps_lean_to_the_clean_end() -> None:
    steps = normal_steps(20_000, 100, torch.Generator().manual_seed(0), 0.4, 0.1)
    assert float(steps.float().mean()) == pytest.approx(59.5, abs=0.5)
    assert float(steps.float().std()) == pytest.approx(10, abs=0.5)
    wide = normal_steps(5000, 10, torch.Generator().manual_seed(0))
    assert wide.min() == 0 and wide.max() == 9


def test_all_steps_come_alike() -> None:
    assert torch.bincount(all_steps(64, 8)).tolist() == [8] * 8
    assert all_steps(3, 8).tolist() == [0, 1, 2]


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


# ---- the bank ----


def coded_bank(steps: list[int], trajectories: int, first: int = 0) -> Bank:
    """x = (k, j) and eps = -(k, j) for step k and trajectory j."""
    k, j = torch.meshgrid(
        torch.arange(len(steps)), torch.arange(first, first + trajectories), indexing="ij"
    )
    x = torch.stack([k, j], -1).float()[..., None, None]
    return Bank(x, -x, steps, {"y": torch.arange(first, first + trajectories)})


def test_each_state_keeps_its_timestep_noise_and_conditioning() -> None:
    steps = [30, 20, 10, 0, 0]  # a quad schedule repeats t = 0
    bank = coded_bank(steps, 6)
    index = tuples_of_steps(all_steps(60, 5), 6, torch.Generator().manual_seed(0))
    x, t, eps, conditioning = bank.gather(index)
    assert torch.equal(x[:, :, 0, 0].long(), index)
    assert t.tolist() == [steps[k] for k in index[:, 0].tolist()]
    assert torch.equal(eps, -x)
    assert torch.equal(conditioning["y"], index[:, 1])
    seen = []
    for x, t, conditioning in bank.by_timestep(limit=5, batch_size=2):
        assert [steps[int(k)] for k in x[:, 0, 0, 0]] == [t] * len(x)
        assert torch.equal(x[:, 1, 0, 0].long(), conditioning["y"])
        seen += x[:, :, 0, 0].long().tolist()
    assert [k for k, _ in seen] == [k for k in range(5) for _ in range(5)]
    chosen = [[j for k, j in seen if k == step] for step in range(5)]
    assert all(len(set(js)) == 5 for js in chosen)
    # All conditions come up, though those of the first trajectories may be alike.
    assert {j for js in chosen for j in js} == set(range(6)) and len(set(map(tuple, chosen))) > 1
    again = [c["y"].tolist() for _, _, c in bank.by_timestep(limit=5, batch_size=5)]
    assert again == chosen
    plain = Bank(bank.x, bank.eps, steps)
    rows = [x[:, 1, 0, 0].tolist() for x, _, _ in plain.by_timestep(limit=4, batch_size=4)]
    assert rows == [[0, 1, 2, 3]] * 5
    seen = []
    for x, t, conditioning in bank.at_step(3, 4):
        assert t == 0 and (x[:, 0] == 3).all()
        seen += conditioning["y"].tolist()
    assert seen == list(range(6))


def test_joined_banks_keep_both() -> None:
    both = coded_bank([9, 0], 3).extend(coded_bank([9, 0], 2, first=3))
    assert both.trajectories == 5
    x, t, _, conditioning = both.gather(torch.tensor([[1, 4], [0, 0]]))
    assert x[:, :, 0, 0].tolist() == [[1, 4], [0, 0]]
    assert t.tolist() == [0, 9] and conditioning["y"].tolist() == [4, 0]
    with pytest.raises(ValueError, match="timesteps"):
        both.extend(coded_bank([9, 1], 2))


def test_the_toy_does_refuse_a_wrong_pair() -> None:
    denoiser = Toy()
    bank = toy_bank(denoiser)
    with pytest.raises(AssertionError, match="timestep"):
        denoiser(bank.x[0], torch.full((12,), STEPS[1]), bank.conditioning["y"])


def test_settings_of_the_presets_are_what_they_are_called() -> None:
    methods = {m: preset(m) for m in ("tinydm", "qdiffusion", "ptqd", "ptq4dm", "minmax")}
    for method, (quant, calibration) in methods.items():
        assert isinstance(calibration, CalibrationSettings)
        assert quant.method == method
        assert (quant.activation.groups > 1) == (method == "tinydm")
        assert (quant.correction == "ptqd") == (method == "ptqd")
    assert {m: c.timesteps for m, (_, c) in methods.items()} == {
        "tinydm": "active",
        "qdiffusion": "uniform",
        "ptqd": "uniform",
        "ptq4dm": "normal",
        "minmax": "uniform",
    }
    with pytest.raises(ValueError, match="unknown method"):
        preset("apq")

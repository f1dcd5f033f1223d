"""The differentiable search of the groups, on a toy denoiser."""

import copy

import torch

from tests.helpers.toy import STEPS, Toy, eps_error, toy_model, toy_states
from tinydm.quant.calibration.search import Search, start
from tinydm.quant.calibration.timesteps import normalised_entropy
from tinydm.quant.calibration.wrapping import BitPolicy, activation_quantizers
from tinydm.quant.core.settings import SearchSettings

ALIKE = torch.ones(len(STEPS))  # weights of the steps


def test_search_lowers_the_entropy_and_ends_hard() -> None:
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 3, BitPolicy(weight=8, activation=4))
    quantizers = [q for _, q in activation_quantizers(model) if q.groups > 1]
    assert len(quantizers) >= 2
    before = {n: q.log_scale.detach().clone() for n, q in activation_quantizers(model)}
    logits = start(quantizers)
    sigma = [torch.softmax(p, -1) for p in logits]
    for s, q in zip(sigma, quantizers, strict=True):
        cost = q.group_error / q.group_error.amin(1, keepdim=True)
        assert torch.equal(s.max(-1).values, s.gather(1, q.group_of_timestep[:, None])[:, 0])
        worse = cost > 1.4  # hopeless ranges start far behind, near ties start undecided
        assert (s[worse] < 0.05).all() and s[(cost < 1.02) & (s < 1)].min() > 0.1
    entropy = torch.stack([normalised_entropy(s) for s in sigma]).mean()
    rounds: list[int] = []
    search = Search(model, states, SearchSettings(rounds=30, batch_size=8), ALIKE, ALIKE)
    result = search.run(torch.Generator().manual_seed(0), lambda i, loss: rounds.append(i))
    assert rounds == list(range(30))
    assert result.selector.entropy.mean() < 0.2 * entropy
    assert result.decided > 0.95 and 0 <= result.moved < 0.5
    assert result.tuples.shape == (240, 2)
    assert result.tuples[:, 0].unique().tolist() == list(range(len(STEPS)))  # none left out
    for name, q in activation_quantizers(model):
        assert q.logits is None and q.temperature == 1.0
        assert int(q.group_of_timestep.max()) < q.groups
        if q.groups > 1:
            assert not torch.equal(q.log_scale, before[name])  # the scales learn as well
        else:
            assert torch.equal(q.log_scale, before[name])


def test_ranges_of_many_bits_are_not_searched() -> None:
    """They may have groups where states grow, which codes enough leave as they are."""
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 2, BitPolicy(weight=8, activation=6))
    wide = dict(activation_quantizers(model))["denoiser.second.inputs.0"]
    wide.bits, wide.group_error = 16, None
    group = torch.arange(len(STEPS)) % 2
    wide.set_ranges(-torch.tensor([1.0, 40.0]), torch.tensor([1.0, 40.0]), group)
    before = wide.log_scale.detach().clone()
    settings = SearchSettings(rounds=2, batch_size=4)
    Search(model, states, settings, ALIKE, ALIKE).run(torch.Generator())
    assert torch.equal(wide.log_scale, before) and torch.equal(wide.group_of_timestep, group)


def test_search_repairs_a_wrong_group() -> None:
    """One timestep starts in the group of the small range: the loss takes it to the other."""
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 2, BitPolicy(weight=8, activation=6))
    quantizer = dict(activation_quantizers(model))["denoiser.second.inputs.0"]
    right = quantizer.group_of_timestep.clone()
    assert len(right.unique()) == 2
    wrong = right.clone()
    wrong[-1] = 1 - wrong[-1]
    quantizer.group_of_timestep = wrong
    for _, q in activation_quantizers(model):
        q.group_error = None  # which would say so at once
    hurt = eps_error(model, states)
    settings = SearchSettings(rounds=60, batch_size=8, lr_logits=0.3, entropy=0.1)
    Search(model, states, settings, ALIKE, ALIKE).run(torch.Generator().manual_seed(0))
    assert quantizer.group_of_timestep[-1] == right[-1]
    assert eps_error(model, states) < 0.5 * hurt


def test_a_batch_in_parts_learns_the_same() -> None:
    denoiser = Toy()
    states = toy_states(denoiser)
    start_model = toy_model(denoiser, states, 3, BitPolicy(weight=8, activation=4))
    found = []
    for parts in (1, 3, 8):
        model = copy.deepcopy(start_model)
        settings = SearchSettings(rounds=6, batch_size=8, accumulate=parts)
        generator = torch.Generator().manual_seed(0)
        weights = torch.linspace(0.5, 2, len(STEPS))
        result = Search(model, states, settings, weights, weights).run(generator)
        quantizers = [q for _, q in activation_quantizers(model)]
        found.append((result, quantizers))
    for result, quantizers in found[1:]:
        assert torch.equal(result.tuples, found[0][0].tuples)
        assert abs(result.error_start / found[0][0].error_start - 1) < 1e-3
        for a, b in zip(quantizers, found[0][1], strict=True):
            assert torch.allclose(a.log_scale, b.log_scale, atol=1e-3)
            assert torch.equal(a.group_of_timestep, b.group_of_timestep)


def test_with_one_group_scales_learn_as_with_more() -> None:
    """An ablation of the groups must not be one of the scales as well."""
    denoiser = Toy()
    states = toy_states(denoiser)
    model = toy_model(denoiser, states, 1, BitPolicy(activation=4))
    state = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    settings = SearchSettings(rounds=2, batch_size=4)
    result = Search(model, states, settings, ALIKE, ALIKE).run(generator)
    assert len(result.tuples) == 8 and (result.decided, result.moved) == (1.0, 0.0)
    for name, q in activation_quantizers(model):
        moved = not torch.equal(q.log_scale, state[f"{name}.log_scale"])
        assert moved == (q.bits <= 8), name
        assert q.groups == 1

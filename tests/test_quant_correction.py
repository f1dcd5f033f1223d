"""PTQD's correction of the predicted noise."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.calibrated import Silent
from tests.helpers.toy import STEPS, Toy, ToySampler, eps_error, toy_states
from tinydm.models.samplers import ddim, ddpm
from tinydm.models.schedule import alphas_cumprod, make_betas, sampling_timesteps
from tinydm.quant.calibration.phases.correct import correct
from tinydm.quant.calibration.ptqd import fit_tables
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.runtime.correction import LARGEST_K, OutputCorrection, corrected_variance


def observed(
    k: torch.Tensor, mu: torch.Tensor, sigma: float, samples: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """eps, eps_q = (1 + k) eps + mu + sigma noise, and bins; k, mu (S, C)."""
    g = torch.Generator().manual_seed(0)
    bins = torch.arange(len(k)).repeat_interleave(samples)
    eps = torch.randn(len(bins), k.shape[1], 8, 8, generator=g) + 0.7  # a mean matters to mu
    noise = sigma * torch.randn(eps.shape, generator=g)
    return eps, eps * (1 + k[bins, :, None, None]) + mu[bins, :, None, None] + noise, bins


def test_correction_recovers_what_was_put_in() -> None:
    context = TimestepContext([0, 10, 20], 100)
    k = torch.tensor([[0.1, -0.05], [0.0, 0.2], [-0.15, 0.02]])
    mu = torch.tensor([[0.02, -0.03], [0.3, 0.0], [0.0, -0.1]])
    eps, eps_q, bins = observed(k, mu, 0.05)
    found = fit_tables(context, eps, eps_q, bins)
    assert torch.allclose(found.k, k, atol=0.01)
    assert torch.allclose(found.mu, mu, atol=0.01)
    # What remains is the noise, divided by 1 + k like the rest.
    expected = (0.05 / (1 + k)).square().mean(1).sqrt()
    assert torch.allclose(found.sigma, expected, rtol=0.05)
    t = torch.tensor(context.timesteps)[bins]
    context.set(t)
    corrected = found(eps_q)
    assert (corrected - eps).square().mean() < 0.1 * (eps_q - eps).square().mean()
    context.set(torch.tensor([12, 12]))  # not calibrated: the nearest timestep's
    assert torch.equal(
        found(eps_q[:2]),
        (eps_q[:2] - found.mu[1].view(1, 2, 1, 1)) / (1 + found.k[1].view(1, 2, 1, 1)),
    )


@pytest.mark.parametrize("kind", ["ptqd", "drift"])
def test_the_fit_is_on_trajectories_that_the_weights_did_not_learn_from(kind: str) -> None:
    """A model that knows its calibration states by heart, and is off by a constant elsewhere."""
    denoiser = Toy()
    states = toy_states(denoiser)
    known = {tuple(x.flatten().tolist()) for step in states.x for x in step}

    class ByHeart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.context, self.correction = TimestepContext(sorted(STEPS), 1000), None

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            new = [tuple(row.flatten().tolist()) not in known for row in x]
            return denoiser(x, t, y) + 0.1 * torch.tensor(new).float().view(-1, 1, 1, 1)

    model = ByHeart()
    assert eps_error(model, states) < 1e-10
    correct(kind, model, denoiser, ToySampler(), states, Silent())
    mu = model.correction.mu[1:, 2:]  # the drift of the last step is of no use; channels of codes
    assert mu.numpy() == pytest.approx(0.1, abs=0.01)


def test_correction_of_perfect_outputs_is_nothing() -> None:
    context = TimestepContext([0, 10], 100)
    eps, _, bins = observed(torch.zeros(2, 2), torch.zeros(2, 2), 0.0)
    found = fit_tables(context, eps, eps, bins)
    assert not found.k.any() and not found.mu.any() and not found.sigma.any()
    context.set(torch.tensor(context.timesteps)[bins])
    assert torch.equal(found(eps), eps)


def test_correction_is_bounded() -> None:
    context = TimestepContext([0, 10], 100)
    k = torch.tensor([[0.8, -0.2], [-0.9, 0.1]])
    eps, eps_q, bins = observed(k, torch.zeros(2, 2), 0.01)
    found = fit_tables(context, eps, eps_q, bins)
    assert torch.allclose(found.k, torch.tensor([[LARGEST_K, -0.2], [-LARGEST_K, 0.1]]), atol=0.01)


def test_correction_must_help_samples_that_did_not_fit_it() -> None:
    """Odd samples carry an offset, even ones the opposite: what one half learns hurts the other."""
    context = TimestepContext([0], 100)
    eps, _, bins = observed(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
    sign = torch.tensor([-1.0, 1.0]).repeat(20).view(-1, 1, 1, 1)
    found = fit_tables(context, eps, eps + 0.1 * sign, bins)
    assert not found.k.any() and not found.mu.any()
    found = fit_tables(context, eps, eps + 0.1, bins)
    assert torch.allclose(found.mu, torch.full((1, 2), 0.1), atol=1e-6)


def test_too_few_samples_stay_uncorrected() -> None:
    context = TimestepContext([0, 10], 100)
    eps, eps_q, bins = observed(torch.full((2, 2), 0.1), torch.zeros(2, 2), 0.01, samples=4)
    found = fit_tables(context, eps[1:], eps_q[1:], bins[1:])
    assert not found.k[0].any() and found.sigma[0] == 0
    assert torch.allclose(found.k[1], torch.full((2,), 0.1), atol=0.02)


@pytest.mark.parametrize("broken", ["k", "mu", "sigma", "large", "negative", "short"])
def test_tables_of_a_correction_are_checked(broken: str) -> None:
    context = TimestepContext([0, 10], 100)
    state = {"k": torch.zeros(2, 3), "mu": torch.zeros(2, 3), "sigma": torch.zeros(2)}
    OutputCorrection.from_state(context, state)
    if broken in state:
        del state[broken]
    elif broken == "large":
        state["k"] = state["k"] + 0.31
    elif broken == "negative":
        state["sigma"] = state["sigma"] - 1
    else:
        state = {name: v[:1] for name, v in state.items()}
    with pytest.raises(ValueError):
        OutputCorrection.from_state(context, state)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2), st.floats(-3, 3), st.floats(0, 2))
def test_noise_of_the_sampler_gives_room_to_the_quantization_noise(
    sigma_t: float, direction: float, sigma_q: float
) -> None:
    left = corrected_variance(sigma_t, direction, sigma_q)
    assert 0 <= left <= sigma_t
    assert corrected_variance(0.0, direction, sigma_q) == 0.0  # eta = 0: a no-op
    assert corrected_variance(sigma_t, direction, 0.0) == pytest.approx(sigma_t)
    if left > 1e-3:
        assert left**2 + (direction * sigma_q) ** 2 == pytest.approx(sigma_t**2)


class NoisyDenoiser:
    """eps of Gaussian data of standard deviation one half, plus noise that depends on t alone."""

    def __init__(self, std: float, betas: np.ndarray):
        self.std, self.abar = std, alphas_cumprod(betas)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = float(self.abar[int(t[0])])
        exact = x * (1 - a) ** 0.5 / (a * 0.25 + 1 - a)
        return exact + self.std * torch.randn(x.shape, generator=self.generator)


@pytest.mark.parametrize("sampler", [partial(ddim, eta=1.0), ddpm], ids=["ddim", "ddpm"])
def test_variance_correction_takes_the_quantization_noise_out_of_the_samplers_own(
    sampler: Callable[..., torch.Tensor],
) -> None:
    """The samples of a noisy denoiser get the spread of those of the exact one back."""
    betas = make_betas("linear", 0.0001, 0.02, 1000)
    steps = sampling_timesteps(20, "uniform", 1000)
    context = TimestepContext(steps, 1000)
    table = OutputCorrection(
        context, torch.zeros(20, 1), torch.zeros(20, 1), torch.full((20,), 0.35)
    )
    start = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))

    def spread(std: float, **arguments: object) -> float:
        g = torch.Generator().manual_seed(2)
        x = sampler(
            NoisyDenoiser(std, betas),
            start,
            steps,
            alphas_cumprod(betas),
            noise=lambda k: torch.randn(start.shape, generator=g),
            **arguments,
        )
        return float(x.std())

    exact, noisy = spread(0.0), spread(0.35)
    corrected = spread(0.35, noise_scale=table.noise_scale)
    assert noisy > 1.02 * exact
    assert abs(corrected - exact) < 0.5 * (noisy - exact)

"""The correction of the drift, on samplers and errors that are known exactly."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.calibrated import Silent
from tinydm.quant.calibration.drift import Call, CallRecorder, DriftFit, step_coefficients
from tinydm.quant.calibration.phases.correct import correct
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.runtime.correction import OutputCorrection

STEPS = [800, 500, 300, 100, 0]
A, B = 1.05, -0.2  # of every step of the sampler below

Model = Callable[[torch.Tensor, int], torch.Tensor]


def full_precision(x: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(x) * (0.5 + t / 1000)


def sampler(model: Model, adjust: Callable[..., torch.Tensor], steps: list[int]) -> torch.Tensor:
    """The start is the same each time; the next state looks at the first two channels of eps."""
    x = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    for t in steps:
        eps = adjust(x, torch.full((6,), t), model(x, t))
        x = A * x + B * eps[:, :2]
    return x


def fitted(model: Model, steps: list[int], bins: list[int]) -> tuple[DriftFit, torch.Tensor]:
    """The fit, and the state that the corrected sampler ends with."""
    recorder = CallRecorder()
    sampler(full_precision, recorder, steps)
    fit = DriftFit(TimestepContext(bins, 1000), recorder.calls)
    return fit, sampler(model, fit, steps)


def applied(correction: OutputCorrection) -> Callable[..., torch.Tensor]:
    def adjust(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        correction.context.set(t)
        return correction(eps)

    return adjust


def keep(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return eps


def error(x: torch.Tensor, steps: list[int]) -> float:
    return float((x - sampler(full_precision, keep, steps)).square().mean())


def test_coefficients_of_a_step_are_found() -> None:
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 8, 8, generator=g)
    of_x, of_eps = step_coefficients(x, eps, 0.9 * x - 0.3 * eps)
    assert torch.allclose(of_x, torch.tensor(0.9).double())
    assert torch.allclose(of_eps, torch.tensor(-0.3).double())
    of_x, of_eps = step_coefficients(x, 2 * x, x)  # not to be told apart
    assert of_x.eq(1).all() and of_eps.eq(0).all()


def test_scaled_and_shifted_outputs_are_put_right() -> None:
    """Each channel has its own error; the tables are the inverse of it."""
    gain = torch.tensor([0.95, 1.05]).view(1, 2, 1, 1)
    shift = torch.tensor([0.05, -0.02]).view(1, 2, 1, 1)

    def model(x: torch.Tensor, t: int) -> torch.Tensor:
        return gain * full_precision(x, t) + shift

    fit, _ = fitted(model, STEPS, STEPS)
    correction = fit.correction()
    assert error(sampler(model, keep, STEPS), STEPS) > 1e-4
    # The last step has no next state to be judged by: it stays as it is.
    assert fit.drift[-1] < 1e-9
    first = [correction.context.timesteps.index(t) for t in STEPS[:-1]]
    assert torch.allclose(correction.k[first], (gain - 1).view(1, 2).expand(4, 2), atol=1e-4)
    assert torch.allclose(correction.mu[first], shift.view(1, 2).expand(4, 2), atol=1e-4)
    assert correction.k[0].eq(0).all() and correction.mu[0].eq(0).all()
    assert correction.noise_scale(500, 0.7, 1.0) == 0.7


def test_a_gain_that_is_cut_has_the_offset_that_fits_it() -> None:
    """Where the output's mean is far from 0, the offset of the uncut gain would be far off."""
    context, made = TimestepContext([100, 500], 1000), torch.Generator().manual_seed(4)
    x, noise = torch.randn(2, 6, 2, 8, 8, generator=made)
    eps = 3 + 0.1 * noise
    calls = [Call(500, x, eps), Call(100, A * x + B * eps, eps)]
    fit = DriftFit(context, calls)
    wrong = 3 + 0.05 * noise  # half of what varies: twice the gain is cut to a tenth more
    right = fit(x, torch.full((6,), 500), wrong)
    assert float((right - eps).mean().abs()) < 1e-3


def test_the_tables_do_what_the_fit_did() -> None:
    def model(x: torch.Tensor, t: int) -> torch.Tensor:
        return 0.93 * full_precision(x + 0.02, t).round(decimals=1)

    fit, end = fitted(model, STEPS, STEPS)
    again = sampler(model, applied(fit.correction()), STEPS)
    assert torch.allclose(again, end, atol=1e-5)
    assert error(again, STEPS) < 0.5 * error(sampler(model, keep, STEPS), STEPS)


def test_steps_that_share_a_bin_share_the_correction() -> None:
    """Also a timestep that is called twice: the fit removes the drift in equal parts."""

    def model(x: torch.Tensor, t: int) -> torch.Tensor:
        return 0.95 * full_precision(x, t) + 0.01

    steps = [800, 790, 780, 500, 300, 300, 100, 0]
    fit, end = fitted(model, steps, [790, 500, 300, 100, 0])
    assert len(fit.fitted) == 4  # all but the last step's
    again = sampler(model, applied(fit.correction()), steps)
    assert torch.allclose(again, end, atol=1e-5)
    assert error(again, steps) < 0.5 * error(sampler(model, keep, steps), steps)


def test_a_learned_variance_is_left_alone() -> None:
    def model(x: torch.Tensor, t: int) -> torch.Tensor:
        return torch.cat([0.95 * full_precision(x, t), x], dim=1)

    recorder = CallRecorder()
    sampler(lambda x, t: torch.cat([full_precision(x, t), x], dim=1), recorder, STEPS)
    fit = DriftFit(TimestepContext(STEPS, 1000), recorder.calls)
    sampler(model, fit, STEPS)
    correction = fit.correction()
    assert correction.k.shape == (5, 4)
    assert correction.k[1:, :2].abs().min() > 0.03
    assert correction.k[:, 2:].eq(0).all() and correction.mu[:, 2:].eq(0).all()


def test_the_tables_stay_within_what_a_file_may_hold() -> None:
    fit, _ = fitted(lambda x, t: 0.2 * full_precision(x, t), STEPS, STEPS)
    correction = fit.correction()
    assert float(correction.k.abs().max()) == pytest.approx(1 - 1 / 1.1, abs=1e-6)
    OutputCorrection.from_state(correction.context, correction.state_dict())


@pytest.mark.parametrize("solver", [[55 / 24, -59 / 24, 37 / 24, -9 / 24], [1.0]])
def test_a_fit_that_leads_away_is_left_out(solver: list[float]) -> None:
    """PLMS weighs the last output with 55/24, the one before with -59/24: what the fit removes of
    the drift comes back larger at the next step."""
    steps = [*range(900, 0, -50)]

    class Model(torch.nn.Module):
        def __init__(self, error: float) -> None:
            super().__init__()
            self.context, self.correction, self.error = TimestepContext(steps, 1000), None, error

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            off = torch.sin(40 * x) + torch.sin(t[0] / 7)
            return full_precision(x, int(t[0])) + self.error * off

    class Multistep:
        @torch.no_grad()
        def run(self, model: torch.nn.Module, on_output: Any, count: int) -> None:
            x = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(3))
            outputs: list[torch.Tensor] = []
            for t in steps:
                rows = torch.full((count,), t)
                outputs.insert(0, on_output(x, rows, model(x, rows)))
                weights = solver if len(outputs) >= len(solver) else [1.0]
                x = A * x + B * sum(w * e for w, e in zip(weights, outputs, strict=False))

    model, trajectories = Model(0.05), SimpleNamespace(trajectories=6, timesteps=steps)
    report = correct("drift", model, Model(0.0), Multistep(), trajectories, Silent())
    assert report["kept"] == (len(solver) == 1)
    assert bool(model.correction.k.any()) == bool(model.correction.mu.any()) == report["kept"]


def test_another_sampler_is_refused() -> None:
    recorder = CallRecorder()
    sampler(full_precision, recorder, STEPS)
    fit = DriftFit(TimestepContext(STEPS, 1000), recorder.calls)
    with pytest.raises(ValueError, match="at timestep 700, not at 800"):
        sampler(full_precision, fit, [700, 500])

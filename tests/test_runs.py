"""Runs through the first sampling steps: the sampler's own calls, with gradients, and what they
teach."""

from collections.abc import Sequence

import pytest
import torch

from tests.helpers.narrow import PARAMS, SAMPLER
from tinydm.models.pipeline import Pipeline, build_denoiser, build_pipeline
from tinydm.quant.calibration import runs
from tinydm.quant.calibration.end_to_end import finetune
from tinydm.quant.calibration.grouping import assign
from tinydm.quant.calibration.record import Recorder
from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.calibration.statistics import collect
from tinydm.quant.calibration.wrapping import (
    BitPolicy,
    activation_quantizers,
    quantize,
    weight_layers,
)
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.settings import QuantSettings, preset, usable
from tinydm.quant.runtime.denoiser import QuantDenoiser

SEED, COUNT = 3, 6


def make(
    name: str = "ddim", eta: float = 0.0, clip: bool = True
) -> tuple[torch.nn.Module, Pipeline]:
    torch.manual_seed(0)
    values = SAMPLER | {"guidance_scale": 1.0, "name": name, "skip": "uniform", "steps": 6}
    values |= {"eta": eta, "clip_denoised": clip}
    model = build_denoiser("ddim_unet", PARAMS)
    return model, build_pipeline("ddim_unet", PARAMS, {}, values, micro_batch=COUNT)


def recorded(model: torch.nn.Module, pipeline: Pipeline) -> CalibrationStates:
    recorder = Recorder(model)
    pipeline.latents(recorder, range(COUNT), SEED)
    return recorder.states(1, "cpu")


@pytest.mark.parametrize(
    ("name", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("plms", 0.0), ("dpmpp", 0.0)]
)
def test_a_run_of_full_precision_ends_on_its_trajectory(name: str, eta: float) -> None:
    """Also with noise of the steps, and with PLMS, which calls twice in its first step."""
    model, pipeline = make(name, eta)
    states = recorded(model, pipeline)
    for calls in (1, 4):
        found = pipeline.begin(model, [4, 1], SEED, calls)
        assert torch.allclose(found, states.x[calls, [4, 1]], atol=1e-4)


def test_gradients_go_through_all_calls_of_a_run() -> None:
    """Numerically: a bias moves the end of the run as the gradient says."""
    model, pipeline = make(clip=False)  # which has kinks
    bias = model.get_parameter("conv_out.bias").requires_grad_(True)
    pipeline.begin(model, [0], SEED, 4).mean().backward()
    assert bias.grad is not None
    ends = []
    with torch.no_grad():
        for shift in (0.002, -0.004):
            bias[0] += shift
            ends.append(float(pipeline.begin(model, [0], SEED, 4).mean()))
    assert (ends[0] - ends[1]) / 0.004 == pytest.approx(float(bias.grad[0]), rel=0.1)


def quantized(model: torch.nn.Module, states: CalibrationStates) -> QuantDenoiser:
    context = TimestepContext(sorted(set(states.timesteps)), 1000)
    found = quantize(model, context, BitPolicy(weight=4, activation=4, first_last=8, time=8))
    stats = collect(model, found, states.by_timestep(COUNT, COUNT))
    for name, quantizer in activation_quantizers(found):
        assign(quantizer, stats[name], 1, "none", "mse")
    return found


def test_runs_bring_the_model_back_to_the_trajectory_with_the_codes_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "RUN_CALLS", 4)
    full, pipeline = make()
    states = recorded(full, pipeline)
    model = quantized(full, states)
    codes: list[torch.Tensor] = []
    losses: list[float] = []

    def begin(denoiser: torch.nn.Module, trajectories: Sequence[int], calls: int) -> torch.Tensor:
        if not losses:  # the codes are those of the steps before
            codes.extend(layer.quantizer.codes(layer.weight) for _, layer in weight_layers(model))
            losses.append(0.0)
        return pipeline.begin(denoiser, trajectories, SEED, calls)

    def distance() -> float:
        with torch.no_grad():
            end = pipeline.begin(model, range(COUNT), SEED, 4)
        return float((end - states.x[4]).square().mean())

    start = distance()
    tuples = torch.tensor([[k, j] for k in range(len(states.timesteps)) for j in range(COUNT)])
    generator = torch.Generator().manual_seed(0)
    finetune(model, states, tuples, 1, 4, 5e-3, generator, run_iterations=24, begin=begin)
    assert distance() < 0.7 * start
    for before, (_, layer) in zip(codes, weight_layers(model), strict=True):
        assert torch.equal(before, layer.quantizer.codes(layer.weight))


def test_only_tinydm_has_runs_and_only_where_a_sampler_can_make_them() -> None:
    shares = {name: preset(name)[0].reconstruct.run_share for name in ("tinydm", "e2e", "ptqd")}
    assert shares["tinydm"] > 0 and shares["e2e"] == shares["ptqd"] == 0
    settings = QuantSettings()
    assert usable(settings, corrected=True, run=True) == settings
    assert usable(settings, corrected=True, run=False).reconstruct.run_share == 0
    assert usable(settings, corrected=False, run=True).correction == "none"

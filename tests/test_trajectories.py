"""Calibration states with guidance: two rows are one output of the sampler, and one trajectory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.calibrated import Silent
from tests.helpers.latent import CONFIG, FIRST_STAGE, PARAMS, write_checkpoint
from tinydm.models.pipeline import build_denoiser
from tinydm.quant.calibration.phases.correct import correct
from tinydm.quant.core.context import TimestepContext
from tinydm.scripts.bench.measure import eps_errors
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.assembly import Assembly, assemble
from tinydm.scripts.experiment.calibration_run import CalibrationRun, calibrate_run
from tinydm.scripts.experiment.config import load_config, parse_config
from tinydm.scripts.experiment.config_sections import calls_per_image
from tinydm.scripts.experiment.trajectories import mean_of_halves, record_states

COUNT = 8  # two network calls, without and with the class


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guided")


@pytest.fixture(scope="module")
def assembly(room: Path) -> Assembly:
    config = CONFIG | {"model": CONFIG["model"] | {"checkpoint": str(room / "model.ckpt")}}
    write_checkpoint(room / "model.ckpt", config)
    (room / "narrow.yaml").write_text(yaml.safe_dump(config))
    return assemble(load_config(room / "narrow.yaml"))


def sampled(assembly: Assembly, model: torch.nn.Module) -> torch.Tensor:
    """What the sampler goes on with at each step, (S, COUNT, C, H, W)."""
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        seen.append(eps)
        return eps

    blocks = []
    for first in range(0, COUNT, assembly.pipeline.micro_batch):
        seen.clear()
        indices = range(first, first + assembly.pipeline.micro_batch)
        assembly.pipeline.latents(model, indices, (1 << 62) + 3, on_output=keep)
        blocks.append(torch.stack(seen))
    return torch.cat(blocks, 1)


def test_rows_of_a_bank_are_the_samplers_outputs(assembly: Assembly) -> None:
    states = record_states(assembly.pipeline, assembly.denoiser, COUNT, 3)
    assert states.trajectories == 2 * COUNT
    expected = sampled(assembly, assembly.denoiser)
    for k, eps in enumerate(states.eps):
        halves = eps.unflatten(0, (-1, 2, assembly.pipeline.micro_batch))
        without, given = halves[:, 0], halves[:, 1]
        guided = without + assembly.pipeline.guidance_scale * (given - without)
        torch.testing.assert_close(guided.flatten(0, 1), expected[k])


def test_a_short_chain_of_a_sampler_that_asks_twice(assembly: Assembly) -> None:
    """PLMS with guidance and 2 steps: six calls, of which two belong together."""
    timesteps = assembly.pipeline.timesteps[:2]
    pipeline = replace(assembly.pipeline, sampler="plms", timesteps=timesteps)

    class Telltale(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x) + (t + context.mean((1, 2))).view(-1, 1, 1, 1)

    states = record_states(pipeline, Telltale(), COUNT, 3)
    assert states.timesteps == [timesteps[0], timesteps[1], timesteps[1]]
    means = states.conditioning["context"].mean((1, 2))
    for t, eps in zip(states.timesteps, states.eps, strict=True):
        torch.testing.assert_close(eps[:, 0, 0, 0], t + means)


def test_an_error_is_of_a_trajectory(assembly: Assembly) -> None:
    """Else an interval over trajectories would be of twice as many as there are."""
    states = record_states(assembly.pipeline, assembly.denoiser, COUNT, 3)
    model = assembly.denoiser

    def off(x: torch.Tensor, t: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        return model(x, t, **conditioning) + x[:, :1, :1, :1]

    steps, trajectories = eps_errors(off, states, assembly.pipeline)
    assert len(trajectories) == COUNT and len(steps) == len(states.timesteps)
    assert sum(trajectories) / COUNT == pytest.approx(sum(steps) / len(steps))
    # Both halves of a trajectory see the same state, so that their errors here are the same.
    states = states.x[:, :, 0, 0, 0].double().square()
    both = mean_of_halves(assembly.pipeline, states)
    assert trajectories == pytest.approx(both.mean(0).tolist(), rel=1e-4)
    assert both[:, 0].tolist() == pytest.approx(states[:, 0].tolist())


def test_ptqds_tables_are_of_guided_outputs(assembly: Assembly, room: Path) -> None:
    """An error of the two halves that guidance takes away must not be corrected."""
    states = record_states(assembly.pipeline, assembly.denoiser, COUNT, 3)
    states.x = states.x[:, : assembly.pipeline.micro_batch]  # so that one call has all of them
    scale = assembly.pipeline.guidance_scale
    context = TimestepContext(sorted(set(states.timesteps)), 1000)
    run = CalibrationRun(load_config(room / "narrow.yaml"), assembly, room, torch.device("cpu"))

    class Off(torch.nn.Module):
        """Adds what weighs nothing, (1 - s) a + s b = 0, and something to both."""

        def __init__(self, more: float) -> None:
            super().__init__()
            self.context, self.correction, self.calls, self.more = context, None, 0, more

        def forward(self, x: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            added = scale if self.calls % 4 in (1, 2) else scale - 1  # two parts of a half each
            return assembly.denoiser(x, t, **given) + 0.1 * added + self.more

    for more in (0.0, 0.05):
        off, progress = Off(more), Silent()
        correct("ptqd", off, assembly.denoiser, run, states, progress)
        assert off.correction.mu.sub(more).abs().max() < 1e-5
        assert off.correction.sigma.max() < 1e-5
        assert progress.phases == {"noise correction": [2 * len(states.timesteps)] * 2}


def test_the_scale_of_latents_is_found_in_the_denoisers_file(tmp_path: Path) -> None:
    """A first stage with a file of its own has none, and sampling from the quantized file does not
    read the denoiser's."""
    whole = CONFIG | {"model": CONFIG["model"] | {"checkpoint": str(tmp_path / "whole.ckpt")}}
    write_checkpoint(tmp_path / "whole.ckpt", whole)
    state = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    stage = {n: v for n, v in state.items() if n.startswith("first_stage")}
    torch.save({"state_dict": stage}, tmp_path / "stage.ckpt")
    model = {k: v for k, v in CONFIG["model"].items() if k != "conditioning"}
    model |= {"params": PARAMS, "checkpoint": str(tmp_path / "denoiser.ckpt")}
    model["first_stage"] = FIRST_STAGE | {"checkpoint": str(tmp_path / "stage.ckpt")}
    config = CONFIG | {"model": model, "sampler": CONFIG["sampler"] | {"guidance_scale": 1.0}}
    (tmp_path / "narrow.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(0)
    weights = build_denoiser("ldm_unet", PARAMS).state_dict()
    kept = {f"model.diffusion_model.{n}": v for n, v in weights.items()}
    kept["scale_factor"] = torch.tensor(0.25)
    torch.save({"state_dict": kept}, tmp_path / "denoiser.ckpt")
    quick = ["quant.method=minmax", "calibration.samples=4", "calibration.trajectories=4"]
    config = load_config(tmp_path / "narrow.yaml", quick)
    full = assemble(config)
    assert full.pipeline.scale_factor == 0.25
    calibrate_run(CalibrationRun(config, full, tmp_path / "run", torch.device("cpu")))
    (tmp_path / "denoiser.ckpt").unlink()
    quantized = tmp_path / "run" / "quantized.safetensors"
    assert assemble(config, quantized).pipeline.scale_factor == 0.25
    longer = [*quick, "schedule.train_timesteps=2000", "sampler.steps=2"]
    with pytest.raises(ConfigError, match="train_timesteps 1000"):
        assemble(load_config(tmp_path / "narrow.yaml", longer), quantized)


@pytest.mark.parametrize(("name", "scale", "calls"), [("ldm_ddim", 1.5, 8), ("plms", 1.0, 5)])
def test_calls_per_image(name: str, scale: float, calls: int) -> None:
    sampler = CONFIG["sampler"] | {"name": name, "guidance_scale": scale}
    config = parse_config(yaml.safe_dump(CONFIG | {"sampler": sampler}), "x")
    assert calls_per_image(config) == calls

"""No method calibrates on a sample twice, and too few trajectories are refused in one line."""

from pathlib import Path

import pytest
import torch

import calibrate
from tests.helpers import forks
from tests.helpers.calibrated import run
from tests.helpers.commands import ROOT
from tests.helpers.toy import STEPS, Toy
from tinydm.models.pipeline import sampling_plan
from tinydm.quant.calibration.distinct import TooFewTrajectoriesError, fill
from tinydm.quant.calibration.timesteps import normal_steps, uniform_steps
from tinydm.quant.core.settings import METHODS, CalibrationSettings
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.trajectories import trajectories_of

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_enough_for_every_method(path: Path) -> None:
    """And as many for each of them: a comparison gives all the same."""
    found = set()
    for method in METHODS:
        config = load_config(path, [f"quant.method={method}"])
        sampler, steps = config.sampler, config.sampler.steps
        if config.model.arch != "diffusers":
            plan = sampling_plan(sampler.name, steps, sampler.skip, **vars(config.schedule))
            steps = len(plan[0])
        guided = sampler.guidance_scale not in (None, 1.0)
        size = config.sampling.micro_batch
        found.add(trajectories_of(config.calibration, steps, guided, size))
    assert len(found) == 1


def test_the_number_that_is_needed() -> None:
    """Of 50 steps, 20 in the rule "uniform"; what is rounded up to whole calls counts."""

    def needed(count: int | None, rule: str = "uniform", guided: bool = False) -> int:
        calibration = CalibrationSettings(samples=2048, trajectories=count, timesteps=rule)
        return trajectories_of(calibration, 50, guided, 16)

    assert needed(None) == needed(None, "active") == 103 and needed(None, guided=True) == 52
    assert needed(97) == 97  # makes 112
    for count, rule, guided, words in (
        (96, "uniform", False, "96 have 1920 different samples at 20 timesteps (uniform)"),
        (48, "uniform", True, "52 trajectories are needed"),
        (32, "normal", False, "41 trajectories are needed"),
        (32, "active", False, "calibration.samples asks for 2048"),
    ):
        with pytest.raises(ConfigError) as caught:
            needed(count, rule, guided)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert needed(48, "active") == needed(48, "normal") == 48


def test_fill_keeps_the_rule_and_repeats_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(0, 2, dtype=torch.long)

    def uniform(n: int) -> torch.Tensor:
        return uniform_steps(n, 50)

    pairs = fill(none, uniform, 200, 50, 10, generator)
    assert len(pairs.unique(dim=0)) == 200
    assert pairs[:, 0].bincount()[uniform_steps(20, 50)].tolist() == [10] * 20
    first = torch.tensor([[3, 1], [3, 1], [4, 0]])
    pairs = fill(first, lambda n: torch.full((n,), 3), 12, 5, 4, generator)
    assert pairs[:2].tolist() == [[3, 1], [4, 0]] and len(pairs.unique(dim=0)) == 12
    counts = pairs[:, 0].bincount(minlength=5)
    assert counts[3] == 4 and counts.max() - counts[[0, 1, 2]].min() <= 2  # the others take turns
    drawn = fill(none, lambda n: normal_steps(n, 10, generator), 400, 10, 60, generator)
    counts = drawn[:, 0].bincount(minlength=10)
    assert len(drawn.unique(dim=0)) == 400 and counts[-1] == counts.max() == 60
    two = fill(none, lambda n: torch.zeros(n, dtype=torch.long), 9, 2, 4, generator)
    assert len(two) == 8  # all there are


@pytest.mark.parametrize("method", ["tinydm", "ptqd", "ptq4dm"])
def test_samples_of_a_calibration_differ(method: str, one_thread: None) -> None:
    """As many as there are at all."""
    samples = len(STEPS) * 12
    _, _, _, saved = run(Toy(), method, samples=samples)
    tuples = saved[-1]["tuples"]
    assert len(tuples) == len(tuples.unique(dim=0)) == samples
    with pytest.raises(TooFewTrajectoriesError, match="13 trajectories are needed"):
        run(Toy(), method, samples=samples + 1)


def test_a_command_is_refused_in_one_line(room: Path) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", room / "run")
    few = ("--set", "calibration.trajectories=14")
    line = forks.refusal(forks.run(calibrate.main, *arguments, *few))
    assert "calibration.trajectories: 14" in line and "16 trajectories are needed" in line
    assert not (room / "run" / "calibration.pt").exists()

"""kill -9 at random moments of three commands: the end is the same, byte for byte.

Calibration, sampling and training.

python -m pytest tests/test_kills.py --kills 50 -s

Half of the processes are killed at a random time, half in the middle of a random file operation:
before or after an fsync or a rename, where half-written files come from.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.rooms import RESULT, files_of
from tinydm.scripts import train_ddim

SEED = 7
KEYS = (
    "quant.reconstruct.iterations=4",  # so that the block-wise phase is there too
    "quant.reconstruct.batch_size=4",
    "quant.reconstruct.finetune_iterations=8",
    "quant.correction=ptqd",
    "sampler.steps=6",
)
TRAINING = (
    *("--iterations", 12, "--save-every", 3, "--grid-every", 6, "--batch-size", 2, "--float32"),
    *("--set", "ch=8", "ch_mult=[1]", "num_res_blocks=1", "norm_groups=2", "image_size=8"),
)
OPERATIONS = {"run": 12, "images": 24, "training": 28}  # fsyncs and renames of a job
# Files that say when and how fast something was made.
TIMED = {"report.json", "log.txt", "state.pt", "training.json"}


def fatal(calls: int, after: bool) -> Callable[[], None]:
    """The process ends itself with SIGKILL at its n-th fsync or rename, before or after it."""

    def arm() -> None:
        left = [calls]

        def deadly(real: Callable) -> Callable:
            def operation(*args: object) -> None:
                left[0] -= 1
                if left[0] == 0 and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*args)
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            return operation

        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)

    return arm


def killed(main: Callable, arguments: list, seconds: float, operations: int, dice: random.Random):
    """A started command that gets killed, unless it ends before."""
    if dice.random() < 0.5:
        before = fatal(dice.randint(1, operations), dice.random() < 0.5)
        with forks.ended([forks.start(main, *arguments, before=before)]) as (fork,):
            fork.wait()
        return fork
    with forks.ended([forks.start(main, *arguments)]) as (fork,):
        limit = time.monotonic() + dice.random() * seconds
        while fork.running() and time.monotonic() < limit:
            time.sleep(0.001)
        fork.send(signal.SIGKILL)
        fork.wait()
    return fork


def phase_of(folder: Path) -> str:
    """After which phase the killed calibration stands."""
    if (folder / RESULT).exists():
        return "result"
    try:
        state = torch.load(folder / "calibration.pt", weights_only=True)["state"]
    except FileNotFoundError:
        return "nothing"
    return state["done"][-1] if state["done"] else "trajectories"


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    room: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    kills, dice = pytestconfig.getoption("--kills"), random.Random(SEED)
    config = ["--config", room / "tiny.yaml", "--set", *KEYS]
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.savez(room / "data.npz", x=images)
    whole = tmp_path / "whole"
    times = {}
    for name, main, more in jobs(whole, config, room / "data.npz"):
        began = time.monotonic()
        assert forks.run(main, *more).code == 0
        times[name] = time.monotonic() - began
    counts: Counter = Counter()
    attempt = 0
    while counts["kills"] < kills:
        attempt += 1
        folder = tmp_path / f"{attempt}"
        for name, main, more in jobs(folder, config, room / "data.npz"):
            fork = None
            while fork is None or fork.code != 0:
                if counts["kills"] < kills:
                    fork = killed(main, more, times[name], OPERATIONS[name], dice)
                else:
                    fork = forks.run(main, *more)
                assert fork.code in (0, -signal.SIGKILL), fork.text()
                if fork.code:
                    counts["kills"] += 1
                    counts[f"{name}: {where(name, folder)}"] += 1
        for name in OPERATIONS:
            made, wanted = files_of(folder / name), files_of(whole / name)
            assert set(made) == set(wanted)
            assert {n for n in made if made[n] != wanted[n]} <= TIMED
        assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    print(f"\n{attempt} runs: {dict(sorted(counts.items()))}")


def jobs(folder: Path, config: list, data: Path) -> list[tuple[str, Callable, list]]:
    """Calibration, sampling from its file, and a training."""
    run, images = folder / "run", folder / "images"
    quantized = ["--quantized", run / RESULT, "--config", run / "config.yaml"]
    return [
        ("run", calibrate.main, [*config, "--out", run, "--resume"]),
        ("images", sample_diffusion.main, [*quantized, "--out", images]),
        ("training", train_ddim.main, ["--data", data, "--out", folder / "training", *TRAINING]),
    ]


def where(name: str, folder: Path) -> str:
    if name == "run":
        return f"after {phase_of(folder / 'run')}"
    if name == "training":
        return "after a save" if (folder / name / "state.pt").exists() else "before the first save"
    return "between" if list((folder / "images").glob("*.png")) else "before the first image"

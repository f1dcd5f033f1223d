"""What a training leaves behind: a kill in its last save, damaged outputs, weights that it reads.

python -m pytest tests/test_training_outputs.py
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import forks
from tests.helpers.forks import refusal
from tests.helpers.rooms import flip
from tinydm.scripts import train_ddim, train_ldm

SIZES = ["ch=8", "ch_mult=[1]", "num_res_blocks=1", "norm_groups=2", "image_size=8"]


def killed_at(rename: int) -> Callable[[], None]:
    """The process ends itself with SIGKILL before its n-th rename."""

    def arm() -> None:
        real, left = os.replace, [rename]

        def deadly(*args: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        os.replace = deadly

    return arm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8))
    return path


def training(data: Path, out: Path) -> list[object]:
    loop = ["--iterations", 1, "--batch-size", 2, "--float32"]
    return ["--data", data, "--out", out, *loop, "--set", *SIZES]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    folder = tmp_path_factory.mktemp("trained")
    forks.succeed(train_ddim.main, *training(data, folder))
    return folder


@pytest.mark.parametrize("rename", [1, 2, 3, 4])
def test_a_kill_in_the_last_save_loses_nothing(data: Path, tmp_path: Path, rename: int) -> None:
    """At each of its files; what says that the run has ended is the last of them."""
    arguments = training(data, tmp_path)
    fork = forks.run(train_ddim.main, *arguments, before=killed_at(rename))
    assert fork.code == -signal.SIGKILL, fork.text()
    assert not (tmp_path / "state.pt").exists()
    assert forks.run(train_ddim.main, *arguments).code == 0
    names = {"ema.pt", "grid.png", "state.pt", "training.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("name", ["ema.pt", "grid.png", "training.json"])
@pytest.mark.parametrize("damage", ["gone", "flipped", "cut"])
def test_a_finished_training_looks_at_its_outputs(
    trained: Path, data: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "trained"))
    arguments = training(data, folder)
    path, whole = folder / name, (folder / name).read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "training.json":
        path.write_bytes(b"x" + whole[1:])
    else:
        flip(path, len(whole) // 2)
    fork = forks.run(train_ddim.main, *arguments)
    assert fork.code == 0 and "missing or damaged; written again" in fork.text()
    assert path.read_bytes() == whole
    assert "written again" not in forks.run(train_ddim.main, *arguments).text()


def test_a_damaged_state_is_not_trained_on(trained: Path, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "trained"))
    flip(folder / "state.pt", (folder / "state.pt").stat().st_size // 2)
    assert "state.pt: damaged" in refusal(forks.run(train_ddim.main, *training(data, folder)))


def test_the_weights_to_start_from_are_not_overwritten(data: Path, tmp_path: Path) -> None:
    (tmp_path / "ema.pt").write_bytes(b"of the user")
    arguments = [*training(data, tmp_path), "--warm-start", tmp_path / "ema.pt"]
    assert "would overwrite what is read" in refusal(forks.run(train_ddim.main, *arguments))
    (tmp_path / "model.pt").write_bytes(b"of the user")
    room = ["--config", "configs/emoji64.yaml", "--data", data, "--out", tmp_path]
    room += ["--warm-start", tmp_path / "model.pt"]
    assert "would overwrite what is read" in refusal(forks.run(train_ldm.main, *room))

"""What goes wrong on machines: full disks, missing permission, values that are not finite.

Each gives one line, exit code 2 (130 when interrupted), and leaves nothing half-written.

python -m pytest tests/test_failures.py
"""

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.forks import refusal
from tests.helpers.images import write_images
from tests.helpers.rooms import RESULT, files_of, names_below, write_room
from tinydm.quant.calibration.phases import learn
from tinydm.scripts import evaluate
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.calibration_run import CalibrationRun, calibrate_run
from tinydm.scripts.experiment.config import load_config

NOBODY = 65534


# ---- full disks ----


def largest_file(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("run", 0), ("run", 20_000), ("images", 100)])
def test_a_full_disk_is_named_and_the_same_command_continues(
    room: Path, whole: Path, tmp_path: Path, name: str, size: int
) -> None:
    main, out = (calibrate.main, "run") if name == "run" else (sample_diffusion.main, "images")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / out)
    line = refusal(forks.run(main, *arguments, before=largest_file(size)))
    assert str(tmp_path) in line and "File too large; make room" in line
    assert not [n for n in names_below(tmp_path) if n.endswith((".tmp", ".lock"))]
    again = (*arguments, "--resume") if name == "run" else arguments
    fork = forks.run(main, *again)
    assert fork.code == 0, fork.text()
    made, expected = (files_of(folder / out) for folder in (tmp_path, whole))
    if name == "run":
        assert made[RESULT] == expected[RESULT]
    else:
        assert made == expected


def test_scores_that_cannot_be_written(room: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2, 0)
    out = tmp_path / "new" / "scores.json"
    arguments = (folder, folder, "--metrics", "none", "--paired", folder, "--json", out)
    fork = forks.run(evaluate.main, *arguments, before=largest_file(10))
    assert f"error: {out}: File too large" in refusal(fork)
    assert not list(out.parent.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 kB, where this user may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system; the limit on file sizes stands in for it")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_space_left_on_a_real_file_system(room: Path, small_disk: Path) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", small_disk / "images", "-n", 100)
    line = refusal(forks.run(sample_diffusion.main, *arguments))
    assert ".png: No space left on device; make room, the same command continues" in line
    made = files_of(small_disk / "images")
    assert made and all(data.endswith(b"IEND\xaeB`\x82") for data in made.values())


# ---- missing permission ----


@pytest.fixture
def public() -> Iterator[Path]:
    """A room below folders that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield write_room(folder)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def become_nobody() -> None:
    """Permissions do not bind root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.mark.parametrize("what", ["out", "run", "checkpoint", "configuration", "images"])
def test_what_may_not_be_opened_is_named(public: Path, what: str, tmp_path: Path) -> None:
    closed = public / ("tiny.pt" if what == "checkpoint" else "tiny.yaml")
    if what in ("out", "run", "images"):
        closed = public / what
        closed.mkdir()
    out = (closed if closed.is_dir() else public) / "x"
    closed.chmod(0o555 if what in ("out", "run") else 0)
    main = calibrate.main if what == "run" else sample_diffusion.main
    arguments = ("--config", public / "tiny.yaml", "--out", out)
    if what == "images":
        main, arguments = evaluate.main, (closed, closed)
    fork = forks.run(main, *arguments, before=become_nobody)
    line = refusal(fork)
    assert closed.name in line and "Permission denied" in line


def test_a_path_that_never_ends(room: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "loop" / "images")
    assert "loop" in refusal(forks.run(sample_diffusion.main, *arguments))


# ---- values that are no numbers ----


@pytest.mark.parametrize("main", [sample_diffusion.main, calibrate.main])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "tensor conv_in.weight has 216 of 216 values NaN or infinite"),
        (3e38, "the sample is not finite after timestep"),
    ],
)
def test_a_denoiser_that_gives_nan(
    room: Path, tmp_path: Path, main: Callable, value: float, message: str
) -> None:
    state = torch.load(room / "tiny.pt", weights_only=True)
    name = "conv_in.weight" if value != value else "conv_out.weight"
    torch.save(state | {name: torch.full_like(state[name], value)}, tmp_path / "bad.pt")
    arguments = ("--config", room / "tiny.yaml", "--ckpt", tmp_path / "bad.pt")
    fork = forks.run(main, *arguments, "--out", tmp_path / "out" / "x")
    assert message in refusal(fork)
    assert not [n for n in names_below(tmp_path) if n.endswith((".png", ".tmp", ".safetensors"))]


@pytest.mark.slow
def test_few_samples_are_not_shown_again_and_again(room: Path, tmp_path: Path) -> None:
    many = ("quant.reconstruct.finetune_iterations=1000", "calibration.samples=5")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path, "--set", *many)
    assert forks.run(calibrate.main, *arguments).code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["phases"]["finetune"]["iterations"] == 13  # of 4 samples: 52 views of 5


WILD = ("quant.reconstruct.finetune_iterations=100", "quant.reconstruct.lr_scale=10")
TAME = ("quant.reconstruct.finetune_iterations=4", "quant.reconstruct.lr_scale=0.005")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [5, 100])
def test_a_calibration_that_runs_away_stops_and_goes_on_with_a_lower_rate(
    room: Path, tmp_path: Path, whole: Path, checkpoint: int
) -> None:
    """With a checkpoint amid the phase, and without one: the end is that of the lower rate."""
    out = tmp_path / "run"
    arguments = ("--config", room / "tiny.yaml", "--out", out)

    def often() -> None:
        learn.STEPS_PER_CHECKPOINT = checkpoint

    wild = (*arguments, "--set", *WILD)
    line = refusal(forks.run(calibrate.main, *wild, before=often))
    assert re.search(r"finetune: the loss is (nan|inf) at iteration \d+ of 100; lower", line), line
    assert "lower quant.reconstruct.lr_scale, and --resume" in line
    assert {p.name for p in out.iterdir()} == {"calibration.pt", "config.yaml"}
    state = torch.load(out / "calibration.pt", weights_only=True)["state"]
    assert state["done"][-1] == "reconstruct" and (state["partial"] is None) == (checkpoint == 100)
    assert refusal(forks.run(calibrate.main, *wild, "--resume")) == line
    other = (*arguments, "--set", *TAME, "quant.search.rounds=3", "--resume")
    assert "belongs to another configuration" in refusal(forks.run(calibrate.main, *other))
    fork = forks.run(calibrate.main, *arguments, "--set", *TAME, "--resume")
    assert fork.code == 0, fork.text()
    assert (out / RESULT).read_bytes() == (whole / "run" / RESULT).read_bytes()


@pytest.mark.slow
def test_units_that_learned_at_the_rate_that_ran_away_learn_anew(
    room: Path, tmp_path: Path
) -> None:
    temporal = ("quant.time_embedding=reconstructed", "quant.reconstruct.iterations=1")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "run", "--set", *temporal)
    line = refusal(forks.run(calibrate.main, *arguments, *WILD))
    assert "finetune: the loss is" in line
    assert line.endswith("lower quant.reconstruct.lr_scale and start anew with --overwrite")
    fork = forks.run(calibrate.main, *arguments, *TAME, "--overwrite")
    assert fork.code == 0, fork.text()


@pytest.mark.slow
def test_a_checkpoint_whose_noise_has_no_square(room: Path, tmp_path: Path) -> None:
    """The clipped trajectories are finite, the loss is not, and no rate is to blame."""
    state = torch.load(room / "tiny.pt", weights_only=True)
    torch.save(state | {"conv_out.weight": state["conv_out.weight"] * 1e24}, tmp_path / "big.pt")
    arguments = ("--config", room / "tiny.yaml", "--ckpt", tmp_path / "big.pt")
    keys = ("--set", "sampler.clip_denoised=true")
    line = refusal(forks.run(calibrate.main, *arguments, "--out", tmp_path / "x", *keys))
    assert "at iteration 1 of 2, before the first step: the noise" in line


def test_scoring_images_that_cannot_be_decoded(room: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2, 0)
    (folder / "001.png").write_bytes(b"half")
    fork = forks.run(evaluate.main, folder, folder, "--paired", folder)
    assert "001.png: cannot be decoded" in refusal(fork)


def test_a_model_without_layers_of_the_timestep_alone(room: Path, tmp_path: Path) -> None:
    keys = ("quant.time_embedding=reconstructed", "quant.reconstruct.iterations=1")
    config = load_config(room / "tiny.yaml", keys)
    assembly = replace(assemble(config), denoiser=torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(ConfigError, match="no layer that depends on the timestep alone"):
        calibrate_run(CalibrationRun(config, assembly, tmp_path / "run", torch.device("cpu")))
    assert not (tmp_path / "run").exists()

"""Odd values and surroundings: one line each, and bars that move with every call.

python -m pytest tests/test_one_line.py
"""

import io
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.commands import ROOT
from tests.helpers.images import write_images
from tinydm.quant.backends import native
from tinydm.scripts import evaluate, gpu_compile, train_ddim
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.progress import ImageBar
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.calibration_run import CalibrationRun, make_states
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.counted import Counted


def only_line(fork: forks.Fork) -> str:
    """All that a refused command printed."""
    assert fork.code == 2, fork.text()
    lines = fork.text().replace("\r", "\n").splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), fork.text()
    return lines[0]


# ---- sizes and schedules ----


@pytest.mark.parametrize("key", ["ch=0", "in_channels=0", "out_ch=0"])
def test_a_size_of_zero_is_one_line(room: Path, tmp_path: Path, key: str) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "x")
    line = only_line(forks.run(sample_diffusion.main, *arguments, "--set", f"model.params.{key}"))
    assert "build no denoiser" in line and "a size is 0" in line
    arguments = ("--data", write_images(tmp_path / "images", 2, 0), "--out", tmp_path / "y")
    line = only_line(forks.run(train_ddim.main, *arguments, "--set", key))
    assert "--set: these build no denoiser" in line


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("ch=2", "ch is 2, for which there are no frequencies"),
        ("norm_groups=-1", "has -1 groups"),
        ("num_res_blocks=-1", "num_res_blocks is -1, must be at least 0"),
        ("num_res_blocks=9999999", "num_res_blocks is 1e+07, at most 64 is sensible"),
        ("ch_mult=[1,99999999]", "ch_mult is 1e+08, at most 65536 is sensible"),
    ],
)
def test_sizes_that_build_what_cannot_run(room: Path, tmp_path: Path, key: str, words: str) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "x", "--set")
    assert words in only_line(forks.run(sample_diffusion.main, *arguments, f"model.params.{key}"))
    arguments = ("--data", tmp_path, "--out", tmp_path / "y", "--set")
    assert words in only_line(forks.run(train_ddim.main, *arguments, key))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "dpmpp"])
@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (("schedule.beta_start=1e-9", "schedule.beta_end=1e-9"), "no noise"),
        (("schedule.betas=const", "schedule.beta_end=0.9999"), "nothing but noise"),
        (("schedule.betas=jsd", "sampler.steps=1000", "sampler.skip=uniform"), "nothing but noise"),
    ],
)
def test_a_schedule_without_noise_or_without_image(
    room: Path, sampler: str, schedule: tuple[str, ...], words: str
) -> None:
    """1 - abar and abar are divisors; dpmpp works in float64, which tells 1 - 1e-9 from 1."""
    keys = (f"sampler.name={sampler}", "sampler.skip=uniform", "sampler.eta=0", *schedule)
    try:
        config = load_config(room / "tiny.yaml", keys)
    except ConfigError as error:
        assert words in str(error) or "does not fit" in str(error), error
    else:
        assert sampler == "dpmpp"
        assembly = assemble(config)
        x = assembly.pipeline.sample(assembly.denoiser, range(1), 0)
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("target", ["0", "00", "\u00b2", "999", ""])
def test_compute_capabilities_that_there_are_not(target: str) -> None:
    """Triton would answer with the whole of a program."""
    line = only_line(forks.run(gpu_compile.main, "--targets", target))
    assert f"--targets: invalid choice: {target!r}" in line


# ---- surroundings ----


def test_a_pipe_among_the_images(tmp_path: Path) -> None:
    """Reading it would wait for ever for a writer."""
    folder = write_images(tmp_path / "images", 2, 0)
    os.mkfifo(folder / "pipe.png")
    size = ["--set", "ch=8", "ch_mult=[1]", "norm_groups=2", "image_size=8"]
    train = ("--data", folder, "--out", tmp_path / "x", *size)
    assert "pipe.png: is no file" in only_line(forks.run(train_ddim.main, *train))
    paired = (folder, folder, "--metrics", "none", "--paired", folder)
    assert "pipe.png: is no file" in only_line(forks.run(evaluate.main, *paired))
    os.mkfifo(tmp_path / "pipe.npz")
    assert "pipe.npz" in only_line(
        forks.run(train_ddim.main, "--data", tmp_path / "pipe.npz", *train[2:])
    )


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/no/such/interpreter\n", "cannot be run"),
        ("#!/bin/sh\nexit 0\n", "cannot be loaded"),
        ("#!/bin/sh\nexit 3\n", "exit code 3"),
        ('#!/bin/sh\nfor last; do :; done\necho no library > "$last"\n', "cannot be loaded"),
        ("#!/bin/sh\nread line && exit 1\nexit 5\n", "exit code 5"),
    ],
)
def test_a_compiler_that_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    script(tmp_path / "g++", text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the user's would keep what is no library
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(native.CompileError, match=words) as caught:
        native.Compiled()
    assert "\n" not in str(caught.value)


def test_a_library_without_our_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    monkeypatch.setattr(native, "library", lambda instructions: ctypes.CDLL(None))
    with pytest.raises(native.CompileError, match="lacks a function"):
        native.Compiled()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "python scripts/check_environment.py"),
        (["no such file"], 2, "error: no such file: No such file"),
        (["no such\nfile"], 2, "error: no such file: No such file"),
        ([sys.executable], 2, "is no list of requirements"),
        (["requirements.txt", "--x"], 2, "error: --x: No such file"),
    ],
)
def test_check_environment(arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "scripts/check_environment.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_check_environment_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "scripts/check_environment.py", tmp_path / "pipe"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pipe is no list of requirements" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_check_environment_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """The shell scripts begin with it: Ctrl-C there was a traceback."""
    (tmp_path / "re.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-S", "scripts/check_environment.py", "--python"],  # site may need `re`
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == b"here\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"error: interrupted\n")


# ---- bars ----


def test_an_error_stands_on_a_line_of_its_own() -> None:
    def main(arguments: list[str]) -> None:
        bars.append(tqdm(total=2, mininterval=0))
        bars[0].update()
        raise ConfigError("x: wrong")

    bars: list[tqdm] = []  # open still when the error is told
    fork = forks.run(main)
    assert fork.code == 2 and fork.text().splitlines()[-1] == "error: x: wrong"
    assert "1/2" in fork.text().splitlines()[-2].rpartition("\r")[2]


@pytest.mark.parametrize("main", [sample_diffusion.main, calibrate.main])
def test_an_error_in_the_midst_of_a_bar(room: Path, tmp_path: Path, main: Callable) -> None:
    state = torch.load(room / "tiny.pt", weights_only=True)
    weight = torch.full_like(state["conv_out.weight"], 3e38)
    torch.save(state | {"conv_out.weight": weight}, tmp_path / "bad.pt")
    arguments = ("--config", room / "tiny.yaml", "--ckpt", tmp_path / "bad.pt")
    fork = forks.run(main, *arguments, "--out", tmp_path / "x")
    assert fork.code == 2 and len(fork.errors()) == 1, fork.text()
    assert fork.text().splitlines()[-1] == fork.errors()[0]


def test_a_bar_of_images_moves_with_rows() -> None:
    file = io.StringIO()
    with ImageBar(4, 10, "images", file=file) as bar:
        bar.mininterval = bar.miniters = 0
        for _ in range(5):
            bar.update(4)
        shown = str(bar)
    assert shown.startswith("images:  50%|") and " 2/4 [" in shown and " image/s]" in shown
    assert "<" in shown  # the time that is left
    assert " 0/4 [" in file.getvalue() and "?" not in shown.split("<")[1]


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp"])
def test_every_call_is_counted(
    room: Path, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of the bar is what calls_per_image says, in images and in trajectories."""
    keys = (f"sampler.name={sampler}", "sampler.eta=0", "sampler.skip=uniform", "sampler.steps=4")
    keys += ("calibration.trajectories=12",)
    config = load_config(room / "tiny.yaml", keys)
    assembly = assemble(config)
    rows: list[int] = []
    with_rows = assembly.pipeline.sample(Counted(assembly.denoiser, rows.append), range(6), 5)
    assert torch.equal(with_rows, assembly.pipeline.sample(assembly.denoiser, range(6), 5))
    assert sum(rows) == 6 * assembly.pipeline.calls_per_image and max(rows) == 2
    bars: list[ImageBar] = []

    class Kept(ImageBar):
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, file=io.StringIO(), **options)
            bars.append(self)

    monkeypatch.setattr("tinydm.scripts.experiment.calibration_run.ImageBar", Kept)
    make_states(CalibrationRun(config, assembly, tmp_path, torch.device("cpu")))
    assert bars[0].n == bars[0].total == 12 * assembly.pipeline.calls_per_image


@pytest.mark.slow
def test_the_rows_of_images_are_numbers_of_the_same_seed(room: Path, tmp_path: Path) -> None:
    """The bar of the command itself, which is there before the first call and shows the last image
    at its end."""
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "x", "-n", 4)
    fork = forks.run(sample_diffusion.main, *arguments, "--set", "sampler.steps=30")
    assert fork.code == 0
    bars = fork.text().replace("\r", "\n").splitlines()
    drawn = [line for line in bars if "image/s]" in line]
    last = drawn[-1]
    assert " 0/4 [" in drawn[0] and " 4/4 [" in last
    assert np.isfinite(float(last.split(", ")[1].split()[0]))

"""What goes wrong on machines: full disks, missing permission, NaN, no memory, two at once, Ctrl-C.

Each gives one line, exit code 2 (130 when interrupted), and leaves nothing half-written.

python -m pytest tests/test_failures.py
"""

import errno
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
from tests.helpers.rooms import RESULT, files_of, write_room
from tinydm.quant.calibration.phases import learn
from tinydm.scripts import evaluate, start
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.calibration_run import CalibrationRun, calibrate_run
from tinydm.scripts.experiment.config import load_config

NOBODY = 65534
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def whole(room: Path) -> Path:
    """Images and a calibration that nothing disturbed."""
    for main, name in ((sample_diffusion.main, "images"), (calibrate.main, "run")):
        arguments = ("--config", room / "tiny.yaml", "--out", room / "whole" / name)
        fork = forks.run(main, *arguments)
        assert fork.code == 0, fork.text()
    return room / "whole"


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


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


# ---- memory ----


def test_no_memory_is_one_line(room: Path, tmp_path: Path) -> None:
    def bound() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "images")
    large = ("--set", "sampling.micro_batch=65536", "sampling.count=1")
    fork = forks.run(sample_diffusion.main, *arguments, *large, before=bound)
    assert "out of memory: lower the batch size" in refusal(fork)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        SystemError("error return without exception set"),
        ImportError("libx.so: failed to map segment from shared object"),
        OSError("libx.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_every_failed_allocation_is_one_line(error: Exception) -> None:
    def main(arguments: list[str]) -> None:
        raise error

    assert "out of memory: lower the batch size" in refusal(forks.run(main))


def test_a_command_says_nothing_after_its_error() -> None:
    """Where memory lacks, what libraries do at Python's end fails as well."""

    def failing() -> None:
        raise MemoryError

    def main(arguments: list[str]) -> None:
        try:
            start.run(failing)
        finally:
            print("Python goes on")

    line = "error: out of memory: lower the batch size (--set sampling.micro_batch=4), free some, "
    assert forks.run(main).text() == f"{line}or raise its limit (ulimit -v)\n"


@pytest.mark.parametrize(
    "end",
    [os.abort, lambda: os._exit(1), lambda: os.kill(os.getpid(), signal.SIGSEGV)],
    ids=["as C++ ends", "as OpenMP ends", "as the loader ends"],
)
def test_a_library_that_ends_the_process_is_one_line(end: Callable[[], None]) -> None:
    def main(arguments: list[str]) -> None:
        start._fork()
        faulthandler.disable()  # pytest's own
        os.write(2, b"terminate called after throwing\n")
        end()

    assert forks.run(main).text() == f"error: {start.NO_ROOM}\n"


def test_the_fork_that_works_ends_as_a_command_does() -> None:
    def refused(arguments: list[str]) -> None:
        start._fork()
        raise ConfigError("x: wrong")

    def defect(arguments: list[str]) -> None:
        start._fork()
        start._explain(ValueError, ValueError("x"), None)

    def waiting(arguments: list[str]) -> None:
        start._fork()
        print("here", flush=True)
        time.sleep(60)

    fork = forks.run(refused)
    assert (fork.code, fork.text()) == (2, "error: x: wrong\n")
    fork = forks.run(defect)
    assert fork.code == 1 and fork.text() == "ValueError: x\n"
    with forks.ended([forks.start(waiting)]) as (fork,):
        while "here" not in fork.text():
            time.sleep(0.01)
        fork.send(signal.SIGTERM)
        assert fork.wait() == 130
    assert fork.errors() == ["error: interrupted; the same command continues"]


def test_a_file_named_like_an_error_is_no_lack_of_memory() -> None:
    def main(arguments: list[str]) -> None:
        Path("out of memory.yaml").read_text()

    assert refusal(forks.run(main)).endswith("out of memory.yaml: No such file or directory")


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [60, 300, 1500])
@pytest.mark.parametrize("command", ["sample_diffusion.py", "scripts/evaluate.py"])
def test_no_memory_for_the_libraries(command: str, megabytes: int) -> None:
    limit = megabytes << 20
    done = subprocess.run(
        [sys.executable, ROOT / command, "--help"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    line = "error: out of memory: free some, or raise its limit (ulimit -v)\n"
    # 1500 are enough where PyTorch was built without CUDA.
    assert (done.returncode, done.stderr) == (2, line) or (megabytes, done.returncode) == (1500, 0)


# ---- two at once ----


@pytest.mark.slow
@pytest.mark.parametrize("main", [sample_diffusion.main, calibrate.main])
def test_the_second_process_is_sent_away(
    room: Path, tmp_path: Path, main: Callable, whole: Path
) -> None:
    """The same command, another run, and --overwrite: the first is not disturbed."""
    out = tmp_path / "x"
    arguments = ("--config", room / "tiny.yaml", "--out", out)
    lock = tmp_path / "x.lock" if main is sample_diffusion.main else out / ".lock"
    first = forks.start(main, *arguments)
    with forks.ended([first]):
        while not (lock.exists() and lock.stat().st_size):
            assert first.running(), first.text()
        first.send(signal.SIGSTOP)
        for more in ([], ["--steps", "2"], ["--steps", "2", "--overwrite"]):
            line = refusal(forks.run(main, *arguments, *more))
            assert f"held by process {first.pid} on" in line
        first.send(signal.SIGCONT)
        assert first.wait() == 0
    assert not lock.exists()
    if main is sample_diffusion.main:
        assert files_of(out) == files_of(whole / "images")
    else:
        assert (out / RESULT).read_bytes() == (whole / "run" / RESULT).read_bytes()


@pytest.mark.slow
def test_two_runs_at_once_in_a_new_folder_leave_one(room: Path, tmp_path: Path) -> None:
    def arguments(out: Path, steps: int) -> list[object]:
        return ["--config", room / "tiny.yaml", "--out", out, "--steps", steps]

    alone = {}
    for steps in (2, 3):
        forks.succeed(sample_diffusion.main, *arguments(tmp_path / f"alone-{steps}", steps))
        alone[steps] = files_of(tmp_path / f"alone-{steps}")
    for attempt in range(4):
        out = tmp_path / f"{attempt}"
        both = [forks.start(sample_diffusion.main, *arguments(out, steps)) for steps in (2, 3)]
        with forks.ended(both):
            codes = [fork.wait() for fork in both]
        assert 0 in codes and set(codes) <= {0, 2}
        assert files_of(out) == alone[(2, 3)[codes.index(0)]]


# ---- Ctrl-C ----


@pytest.mark.slow
@pytest.mark.parametrize("main", [sample_diffusion.main, calibrate.main])
def test_interrupted_is_130_and_resumable(
    room: Path, tmp_path: Path, main: Callable, whole: Path
) -> None:
    interruption = forks.signal_itself(signal.SIGINT)
    arguments = ["--config", room / "tiny.yaml", "--out"]
    if main is sample_diffusion.main:
        out, more, before = tmp_path / "images", [], forks.before_image(3, interruption)
    else:
        out, more, before = (
            tmp_path / "run",
            ["--resume"],
            forks.after_phase("ranges", interruption),
        )
    fork = forks.run(main, *arguments, out, before=before)
    assert fork.code == 130, fork.text()
    assert fork.errors() == ["error: interrupted; the same command continues"]
    assert not [n for n in names_below(tmp_path) if n.endswith((".tmp", ".lock"))]
    assert forks.run(main, *arguments, out, *more).code == 0
    made, expected = files_of(out), files_of(whole / out.name)
    if main is sample_diffusion.main:
        assert made == expected
    else:
        assert made[RESULT] == expected[RESULT]


def test_an_interruption_of_a_destructor_is_not_lost() -> None:
    class Closing:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def main(arguments: list[str]) -> None:
        Closing()
        time.sleep(60)

    began = time.monotonic()
    fork = forks.run(main)
    assert fork.code == 130 and time.monotonic() - began < 50


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

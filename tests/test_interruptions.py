"""Two commands at once in one folder, and Ctrl-C: nobody's files are disturbed, all can go on.

python -m pytest tests/test_interruptions.py
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.forks import refusal
from tests.helpers.rooms import RESULT, files_of, names_below

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

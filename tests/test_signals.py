"""Ctrl-C and SIGTERM from the first line on, pipes that nobody reads, locks of other programs.

python -m pytest tests/test_signals.py
"""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import calibrate
from tests.helpers import forks
from tests.helpers.commands import ROOT
from tinydm.scripts import evaluate
from tinydm.scripts.common.errors import RunError
from tinydm.scripts.experiment.runs import locked

COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    if "\nif __name__" in path.read_text(encoding="utf-8")
    and path.name != "check_environment.py"  # runs where nothing is installed, on old Pythons too
)


def default_sigint() -> None:
    """A shell's background jobs ignore SIGINT and hand that on; here it must arrive."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def slow_torch(tmp_path: Path) -> dict[str, str]:
    """Variables of a process in which `import torch` says so and then takes a minute."""
    (tmp_path / "torch.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["calibrate.py", "scripts/train_ldm.py"])
def test_a_signal_while_torch_is_imported(
    slow_torch: dict[str, str], command: str, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, ROOT / command, "--help"],
        env=slow_torch,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_sigint,
    )
    assert process.stdout.readline() == b"here\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"error: interrupted before anything began\n")


@pytest.mark.parametrize("command", ["calibrate.py", "scripts/evaluate.py"])
def test_nothing_is_imported_before_signals_are_one_line(tmp_path: Path, command: str) -> None:
    """Not even `signal` and `typing`, which take long where others use the processor."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(0)\n")
    told = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / command],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.rpartition("|")[2].strip() for line in told.stderr.splitlines()]
    first = names[names.index("site") + 1 : names.index("tinydm.scripts.common.early")]
    assert {name.partition(".")[0] for name in first} == {"tinydm"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_watches_first(command: str) -> None:
    """Nothing is imported before, and the import is not there for nothing."""
    lines = (ROOT / command).read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports[0].startswith("from tinydm.scripts.start import run")
    assert any(line.startswith("    run(") for line in lines)


def main_of(command: str) -> Callable:
    module = command.removesuffix(".py").replace("/", ".")
    return importlib.import_module(f"tinydm.{module}" if "." in module else module).main


@pytest.mark.parametrize("command", COMMANDS)
def test_advice_for_less_memory_names_an_option_of_the_command(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    words = (ROOT / command).read_text(encoding="utf-8").rpartition("    run(main")[2]
    if "less=None" in words:
        return
    given = re.search(r'less="(\S+)', words.partition("\n")[0])
    option = given[1].rstrip('")') if given else "--set"
    with pytest.raises(SystemExit):
        main_of(command)(["--help"])
    assert option in capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, "scripts/benchmark.py --speed"])
def test_help_says_of_every_option_what_it_does(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[argparse.Action] = []
    real = argparse.ArgumentParser._add_action
    noted = lambda parser, action: given.append(action) or real(parser, action)  # noqa: E731
    monkeypatch.setattr(argparse.ArgumentParser, "_add_action", noted)
    command, *more = command.split()
    with pytest.raises(SystemExit):
        main_of(command)([*more, "--help"])
    assert given and [action.dest for action in given if not action.help] == []


@pytest.mark.slow
def test_the_message_names_the_command_that_continues(room: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, ROOT / "calibrate.py", "--config", room / "tiny.yaml"]
        + ["--out", tmp_path / "run", "--set", "quant.reconstruct.finetune_iterations=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=default_sigint,
        bufsize=0,
    )
    seen = b""
    while b"trajectories" not in seen and process.poll() is None:
        seen += process.stderr.read(64)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert rest.decode().splitlines()[-1] == (
        "error: interrupted; the same command with --resume, and without --overwrite, continues"
    )


def closed_reader(number: int) -> None:
    """Nobody reads what goes to this file descriptor."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
def test_output_that_nobody_reads_is_no_error(
    room: Path, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    """As of `| true`: the work is done, and nothing is said about the pipe."""
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path, "--set", "quant.method=minmax")
    fork = forks.run(calibrate.main, *arguments, before=lambda: [*map(closed_reader, numbers)])
    assert fork.code == 0 and not fork.errors(), fork.text()
    assert (tmp_path / "quantized.safetensors").exists()


@pytest.mark.slow
def test_help_that_nobody_reads(tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'scripts/evaluate.py'} --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True)
    assert done.stderr == b""


def test_output_without_room_is_told(tmp_path: Path) -> None:
    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    def main(arguments: list[str]) -> None:
        print("text that stays in a buffer", end="")

    fork = forks.run(main, before=full)
    assert fork.code == 2
    assert fork.errors() == [
        "error: No space left on device; make room, the same command continues"
    ]


def test_without_any_output(tmp_path: Path) -> None:
    def closed() -> None:
        sys.stdout = sys.stderr = None

    fork = forks.run(evaluate.main, before=closed)
    assert fork.code == 2, fork.text()


def make_symlink(path: Path, target: Path) -> None:
    path.symlink_to(target)


def make_hard_link(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def make_pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path, target: Path) -> None:
    path.mkdir()


def make_file(path: Path, target: Path) -> None:
    path.write_text("[[package]]")  # poetry.lock, beside a folder named poetry


@pytest.mark.parametrize("make", [make_symlink, make_hard_link, make_pipe, make_folder, make_file])
def test_what_only_has_the_name_of_a_lock_stays(tmp_path: Path, make) -> None:
    target, lock = tmp_path / "target", tmp_path / "x.lock"
    target.write_text("of somebody")
    make(lock, target)
    with pytest.raises(RunError, match="x.lock: is no lock"), locked(lock):
        pass
    assert target.read_text() == "of somebody" and os.path.lexists(lock)
    if make is make_file:
        assert lock.read_text() == "[[package]]"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text("process 123 on elsewhere")
    with locked(tmp_path / "x.lock"):
        pass
    assert not (tmp_path / "x.lock").exists()

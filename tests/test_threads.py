"""Every command settles its threads before PyTorch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tinydm.scripts.common import threads

COMMANDS = ["calibrate.py", "sample_diffusion.py"]
COMMANDS += [
    f"scripts/{n}.py" for n in ("benchmark", "compare", "download", "evaluate", "report")
] + ["scripts/train_ddim.py", "scripts/train_ldm.py"]
# Runs a command up to its import of PyTorch.
PROGRAM = """
import os, runpy, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def settings(command: str, **given: str) -> list[str]:
    names = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str):
    assert settings(command) == [str(threads.SPINS), str(threads.physical_cores())]


def test_what_the_user_sets_stays():
    given = settings(COMMANDS[0], GOMP_SPINCOUNT="7", OMP_NUM_THREADS="3")
    assert given == ["7", "3"]


def test_hyperthreads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for number, siblings in enumerate(("0,2", "1,3", "0,2")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.physical_cores(tmp_path) == 2
    assert threads.physical_cores(tmp_path / "none") is None

"""Lack of memory: one line and exit code 2, whichever library finds none and however it ends.

python -m pytest tests/test_failures_memory.py
"""

import errno
import faulthandler
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sample_diffusion
from tests.helpers import forks
from tests.helpers.commands import ROOT
from tests.helpers.forks import refusal
from tests.helpers.images import write_images
from tinydm.scripts import evaluate, start
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.metrics import inception


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


@pytest.mark.parametrize("what", ["read_file", "_build"])
def test_weights_that_find_no_memory_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise RuntimeError("could not create a memory object")

    (tmp_path / "x.pth").write_bytes(b"x")
    if what == "_build":
        monkeypatch.setattr(inception, "_read_weights", lambda file: {})
    monkeypatch.setattr(inception, what, exhausted)
    images = write_images(tmp_path / "images", 2, 0)
    line = refusal(forks.run(evaluate.main, images, images, "--inception", tmp_path / "x.pth"))
    assert "memory" in line and "delete" not in line and "not pytorch-fid" not in line


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
@pytest.mark.parametrize(
    ("then", "returned"), [("", False), ("memory.return_large_blocks()", True)]
)
def test_freed_memory_is_kept_unless_blocks_are_large(then: str, returned: bool) -> None:
    program = f"""
from tinydm.scripts.common import memory
memory.keep_freed_memory()
{then}
before = memory.resident("VmRSS")
block = b"x" * 2**27
del block
print((memory.resident("VmRSS") - before) / 2**27)
"""
    command = [sys.executable, "-c", program]
    kept = float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert kept < 0.1 if returned else kept > 0.9

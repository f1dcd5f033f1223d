"""Command lines as forks of the test process: real processes that need not import torch again."""

import fcntl
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch._dynamo  # noqa: F401 - optimizers import it at first use: here once, not in each fork

from tinydm.scripts.experiment import calibration_run, cli, sampling_run

PIPE_BYTES = 1 << 20  # more than any of these commands prints


@dataclass
class Fork:
    """A started command. Its two streams go to a pipe, since files may be what fails."""

    pid: int
    pipe: int
    code: int | None = None  # exit code, or minus the signal that ended it
    printed: bytes = b""

    def wait(self) -> int:
        if self.code is None:
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def send(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def text(self) -> str:
        """What it has printed so far."""
        try:
            while self.pipe >= 0 and (more := os.read(self.pipe, PIPE_BYTES)):
                self.printed += more
        except BlockingIOError:
            pass
        return self.printed.decode("utf-8", "replace")

    def errors(self) -> list[str]:
        """The lines that a user takes for errors."""
        return [line for line in self.text().splitlines() if line.startswith("error: ")]

    def close(self) -> None:
        self.text()
        os.close(self.pipe)
        self.pipe = -1


def start(
    main: Callable[[list[str]], object],
    *arguments: object,
    variables: Mapping[str, object] | None = None,
    before: Callable[[], None] = lambda: None,
) -> Fork:
    """Runs main(arguments) in a fork, through the wrapper that every script uses.

    variables: environment; before: what the fork does first (limits, another user).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    pid = os.fork()
    if pid:
        os.close(writer)
        os.set_blocking(reader, False)
        return Fork(pid, reader)
    code = 1
    try:  # whatever happens, the fork must not go on as a second test process
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update({name: str(value) for name, value in (variables or {}).items()})
        before()
        cli.run(lambda: main([str(a) for a in arguments]))
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(main: Callable[[list[str]], object], *arguments: object, **options) -> Fork:
    """As start, to its end."""
    with ended([start(main, *arguments, **options)]) as (fork,):
        fork.wait()
    return fork


def succeed(main: Callable[[list[str]], object], *arguments: object, **options) -> str:
    """What a command prints that must end well."""
    fork = run(main, *arguments, **options)
    assert fork.code == 0, fork.text()
    return fork.text()


def refusal(fork: Fork) -> str:
    """The one line of a command that ended with 2."""
    assert fork.code == 2, fork.text()
    assert "Traceback" not in fork.text(), fork.text()
    assert len(fork.errors()) == 1, fork.text()
    return fork.errors()[0]


def signal_itself(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def after_phase(phase: str, act: Callable[[], None]) -> Callable[[], None]:
    """For `before`: act is called when a calibration has saved this phase."""

    def arm() -> None:
        real = calibration_run.save_state

        def save_state(folder, config, sources, state, states) -> None:
            real(folder, config, sources, state, states)
            if (state.done or ["trajectories"])[-1] == phase:
                act()

        calibration_run.save_state = save_state

    return arm


def before_image(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """For `before`: act is called before the image of that number, from 1, is written."""

    def arm() -> None:
        real, left = sampling_run.write_png, [number]

        def write_png(path, image) -> None:
            left[0] -= 1
            if left[0] == 0:
                act()
            real(path, image)

        sampling_run.write_png = write_png

    return arm


def team(world: int, main: Callable, *arguments: object, port: int) -> list[Fork]:
    """As torchrun starts them: `world` processes that find each other by gloo."""
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(main, *arguments, variables=common | {"RANK": rank}) for rank in range(world)]


@contextmanager
def ended(forks: list[Fork]) -> Iterator[list[Fork]]:
    """Whatever happens in the block, nothing of it goes on afterwards."""
    try:
        yield forks
    finally:
        for fork in forks:
            fork.send(signal.SIGKILL)
            fork.wait()
            fork.close()

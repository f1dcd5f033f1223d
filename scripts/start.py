"""The first import of every command: from here on a signal or a lack of memory is one line.

    from tinydm.scripts.start import run
    ...
    if __name__ == "__main__":
        run(main)

What a command imports next, torch above all, takes a second and gigabytes of addresses. Until `run`
begins, nothing has been written: SIGINT and SIGTERM end the process at once, with 130, and a
library that finds no room ends it with 2. With a limit of addresses (ulimit -v) a fork does all of
it, since libraries may end it in words of their own. This module itself imports next to nothing.
"""

from .common import early  # first: signals are one line from here on

# isort: split
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from .common import signals, threads

NO_ROOM = "out of memory: free some, or raise its limit (ulimit -v)"
# How loaders and interpreters say it; what allocators say is known where torch is imported.
WORDS_OF_NO_ROOM = ("failed to map segment", "cannot allocate memory", "can't start new thread")
TOLD = (0, 2, 130)  # exit codes of commands, after their line
DEFECT = 3  # exit code of a fork that has printed a traceback

_forked = False
_began: Any = None  # memory that a fork shares: whether the work has begun, and bars are drawn


def run(main: Callable[[], int | None], **words: str) -> None:
    """See experiment.cli.run, which the command has imported by now."""
    from .experiment import cli

    if _began is not None:
        _began[0] = 1
    try:
        cli.run(main, **words)
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code != 0:
            _leave(ended.code)
        raise
    finally:  # the work is done, and Python ends
        signals.ignore()


def _leave(code: int) -> NoReturn:
    """Ends a command that has told its error. What libraries would still do at Python's end could
    fail as well, for want of memory for example, and say so in words of its own."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def watch() -> None:
    """Makes failed imports one line each, as signals are, until `run` has its own way with them."""
    import resource

    sys.excepthook = _explain
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited and sys.platform.startswith("linux"):
        _fork()


def _fork() -> None:
    """Returns in a fork, which does the work. This process ends as the fork does.

    OpenBLAS, OpenMP, oneDNN and glibc end a process, by signals or with an exit code of their own,
    where they find no room: then this one tells it. What they say goes nowhere, since Python has an
    stderr of its own.
    """
    global _forked, _began
    import mmap

    _began = mmap.mmap(-1, 1)
    awaited = {*signals.ENDING, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        _forked = True
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with suppress(OSError, AttributeError):  # where there is no stderr
            early.stderr = os.dup(2)
            encoding = sys.stderr.encoding
            sys.stderr = open(early.stderr, "w", 1, encoding, "backslashreplace")  # noqa: SIM115
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        return
    ended = status = 0
    while not ended:
        signal_info = signal.sigwaitinfo(awaited)
        if signal_info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
        elif signal_info.si_code <= 0:  # sent to this process; a terminal sends it to both
            os.kill(child, signal_info.si_signo)
    code = os.waitstatus_to_exitcode(status)
    if code in TOLD:
        os._exit(code)
    if code == DEFECT:
        os._exit(1)
    if _began[0]:
        os.write(early.stderr, b"\n")  # ends what is half-drawn
    early.end(2, NO_ROOM)


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or any(words in text for words in WORDS_OF_NO_ROOM):
            early.end(2, NO_ROOM)
        cause = cause.__cause__ or cause.__context__
    sys.__excepthook__(kind, error, trace)
    if _forked:
        _leave(DEFECT)


if early.is_command(sys.modules.get("__main__")):  # not in tests or in programs of others
    watch()
    threads.settle()

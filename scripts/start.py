"""The first import of every command: from here on a signal or a lack of memory is one line.

    from tinydm.scripts.start import run
    ...
    if __name__ == "__main__":
        run(main)

What a command imports next, torch above all, takes a second and gigabytes of addresses. Until `run`
begins, nothing has been written: SIGINT and SIGTERM end the process at once, with 130, and a
library that finds no room ends it with 2. This module itself imports next to nothing.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from .common import signals, threads

COMMANDS = os.path.dirname(os.path.abspath(__file__))  # those in the folder above as well
NO_ROOM = "out of memory while the libraries were loaded: free some, or raise ulimit -v"
# How loaders and interpreters say it; what allocators say is known where torch is imported.
WORDS_OF_NO_ROOM = ("failed to map segment", "allocate memory", "can't start new thread")
ROOM_TO_RUN = 1 << 26  # bytes

_limited = _rehearsing = False


def run(main: Callable[[], int | None], **words: str) -> None:
    """See experiment.cli.run, which the command has imported by now."""
    from .experiment import cli

    if _limited:
        _start_threads()
    if _rehearsing:
        import mmap

        mmap.mmap(-1, ROOM_TO_RUN).close()
        os._exit(0)
    try:
        cli.run(main, **words)
    except SystemExit as ended:
        if ended.code:
            _leave(ended.code)
        raise
    finally:  # the work is done, and Python ends
        signals.ignore()


def _start_threads() -> None:
    """OpenMP starts its threads when they are first needed, and ends the process where it cannot:
    that shall not be in the middle of the work."""
    import torch

    torch.zeros(torch.get_num_threads() << 16).add_(1)  # enough for each to get a part


def _leave(code: Any) -> NoReturn:
    """Ends a command that has told its error. What libraries would still do at Python's end could
    fail as well, for want of memory for example, and say so in words of its own."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def watch() -> None:
    """Makes signals and failed imports one line each, until `run` has its own way with them."""
    global _limited
    import resource

    signals.handle(_stop)
    sys.excepthook = _explain
    _limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if _limited:
        _rehearse()


def _rehearse() -> None:
    """With a limit of addresses (ulimit -v), a fork imports everything first, up to `run`.

    OpenBLAS, OpenMP and glibc itself end a process, in words of their own, where they find no room:
    that shall not be this one.
    """
    global _rehearsing
    child = os.fork()
    if child == 0:
        _rehearsing = True
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        return
    _, status = os.waitpid(child, 0)
    if status != 0:
        _end(2, NO_ROOM)


def _stop(signum: int, frame: FrameType | None) -> None:
    _end(130, "interrupted before anything began")


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _rehearsing:  # what has nothing to do with memory is met once more, and told then
        os._exit(0 if isinstance(error, ModuleNotFoundError | SyntaxError) else 2)
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or any(words in text for words in WORDS_OF_NO_ROOM):
            _end(2, NO_ROOM)
        cause = cause.__cause__ or cause.__context__
    sys.__excepthook__(kind, error, trace)


def _end(code: int, line: str) -> None:
    try:
        os.write(2, f"error: {line}\n".encode())
    finally:
        os._exit(code)


def _is_command(module: object) -> bool:
    file = getattr(module, "__file__", None)
    folder = os.path.dirname(os.path.abspath(file)) if file else ""
    return folder in (COMMANDS, os.path.dirname(COMMANDS))


if _is_command(sys.modules.get("__main__")):  # not in tests or in programs of others
    watch()
    threads.settle()

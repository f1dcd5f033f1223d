"""The first import of every command: from here on a signal or a lack of memory is one line.

    from tinydm.scripts.start import run
    ...
    if __name__ == "__main__":
        run(main)

What a command imports next, torch above all, takes a second and more than a gigabyte of addresses.
Until `run` begins, nothing has been written: SIGINT and SIGTERM end the process at once, with 130,
and a library that finds no room ends it with 2. This module itself imports next to nothing.
"""

import os
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

from .common import signals

COMMANDS = os.path.dirname(os.path.abspath(__file__))  # those in the folder above as well
# How loaders and interpreters say it; what allocators say is known where torch is imported.
NO_ROOM = ("failed to map segment", "cannot allocate memory", "can't start new thread")


def run(main: Callable[[], int | None], **words: str) -> None:
    """See experiment.cli.run, which the command has imported by now."""
    from .experiment import cli

    try:
        cli.run(main, **words)
    finally:  # the work is done, and Python ends
        signals.ignore()


def watch() -> None:
    """Makes signals and failed imports one line each, until `run` has its own way with them."""
    signals.handle(_stop)
    sys.excepthook = _explain


def _stop(signum: int, frame: FrameType | None) -> None:
    _end(130, "interrupted before anything began")


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or any(words in text for words in NO_ROOM):
            _end(2, "out of memory while the libraries were loaded: free some, or raise ulimit -v")
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

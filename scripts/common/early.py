"""The first moments of a command: signals end it in one line before anything else is imported.

Even `signal` and `typing` of the standard library take tens of milliseconds on a busy machine, in
which Ctrl-C would be a traceback. So this module, and what is imported before it, asks only for
what Python itself has imported by then.
"""

import _signal  # the part of `signal` that Python begins with
import os
import sys

COMMANDS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder above has some

stderr = 2  # file descriptor


def is_command(module: object) -> bool:
    """Whether a module is a command of this checkout, not a test or a program of others."""
    file = getattr(module, "__file__", None)
    folder = os.path.dirname(os.path.abspath(file)) if file else ""
    return folder in (COMMANDS, os.path.dirname(COMMANDS))


def end(code: int, line: str) -> None:
    """The end of the process, whatever else it is about to do."""
    try:
        os.write(stderr, f"error: {line}\n".encode())
    finally:
        os._exit(code)


def stop(signum: int, frame: object) -> None:
    end(130, "interrupted before anything began")


if is_command(sys.modules.get("__main__")):
    for _number in (_signal.SIGINT, _signal.SIGTERM):
        if _signal.getsignal(_number) != _signal.SIG_IGN:  # as a shell tells background jobs
            _signal.signal(_number, stop)

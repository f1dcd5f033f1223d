"""SIGINT and SIGTERM: both end a command in the same way. Imports next to nothing."""

import signal
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


def handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in ENDING}


def handle(handler: Handler) -> None:
    """Both call `handler`, unless the process was told to ignore them, as a shell tells its
    background jobs."""
    for number, old in handlers().items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)


def restore(before: dict[int, object]) -> None:
    """before: what `handlers` gave."""
    for number, handler in before.items():
        if handler is not None:  # one that is not Python's
            signal.signal(number, handler)


def ignore() -> None:
    """What comes from here on changes nothing any more."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)

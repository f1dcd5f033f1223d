"""Output that someone may stop reading: `command | head -1`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Unread:
    """A text stream of which nothing is heard any more once its reader is gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        """What is still in its buffer goes nowhere, and so does what follows."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unread_output_is_dropped() -> Iterator[None]:
    """Within the block the work goes on when a reader of stdout or stderr ends or was never there.

    What a command makes are files: a pipe that breaks is no reason to stop, nor an error.
    """
    before = sys.stdout, sys.stderr
    given = [open(os.devnull, "w") if stream is None else stream for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = map(_Unread, given)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

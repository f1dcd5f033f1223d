"""Work that a caller leaves to threads: files are encoded and written while a device computes.

    with Writers(threads=4, most=128) as writers:
        writers.put(write_png, path, image)

What is put first begins first. The block ends when all of it is done, also where it ends early, so
that what was computed is not lost.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Writers:
    """threads: that work; most: calls that may wait, beyond which `put` waits itself."""

    def __init__(self, threads: int, most: int):
        self._pool, self._most = ThreadPoolExecutor(threads, "writer"), most
        self._waiting: deque[Future] = deque()

    def put(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls function(*args) soon. Raises what an earlier call raised."""
        while self._waiting and (len(self._waiting) >= self._most or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *args))

    def __enter__(self) -> "Writers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for all calls. Raises what the first failed one raised, unless the block failed."""
        self._pool.shutdown(wait=True)
        if error is None:
            while self._waiting:
                self._waiting.popleft().result()

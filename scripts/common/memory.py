"""The allocator of a CPU run."""

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
LARGEST_INT = 2**31 - 1  # of an int


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks at once, and the kernel clears every page of each new
    activation again: a sixth of the time of a calibration step. Does nothing where there is no
    mallopt.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)


def return_freed_memory() -> None:
    """Gives back to the system, once, what is free: after a model was built of larger parts."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)

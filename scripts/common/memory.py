"""The allocator of a CPU run, and the memory of this process."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
BLOCK, BLOCKS = 1 << 25, 1 << 16  # bytes: the largest threshold that glibc takes; its own default
LARGEST_INT = 2**31 - 1  # of an int
STATUS, CLEAR_REFS = (Path("/proc/self") / name for name in ("status", "clear_refs"))


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


def return_large_blocks() -> None:
    """Lets glibc return what is larger than BLOCK at once again, after keep_freed_memory.

    The attention of a large model has tensors of half a GB each. Kept when they are freed, with
    others between them, they add up: a step of Stable Diffusion takes 9 GB for what needs 4.6.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, BLOCK)
        mallopt(M_MMAP_MAX, BLOCKS)


def return_freed_memory() -> None:
    """Gives back to the system, once, what is free: after a model was built of larger parts."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def resident(kind: str) -> float | None:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM); None where the system
    does not say."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{kind}:")]
    return 1024.0 * int(found[0]) if found else None


def forget_peak() -> bool:
    """Lets VmHWM, the peak of the memory, count anew; False where the system cannot do that."""
    return_freed_memory()
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")  # see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)

"""How OpenMP's threads behave. It reads its settings when PyTorch is imported.

A setting that the user made stays.
"""

import os
from pathlib import Path

# A thread that waits for the others looks this often before it sleeps. OpenMP's own 300,000 (a
# millisecond and more) make a run many times slower as soon as another process needs a core.
SPINS = 1000
TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores(topology: Path = TOPOLOGY) -> int | None:
    """Cores that this process may use, hyperthreads counted once; None where Linux does not say."""
    try:
        processors = os.sched_getaffinity(0)
        folders = [topology / f"cpu{number}" / "topology" for number in processors]
        return len({(folder / "thread_siblings_list").read_text("ascii") for folder in folders})
    except (AttributeError, OSError, ValueError):
        return None


def settle() -> None:
    """One thread for each physical core, which does not spin for long. For a process that has not
    imported PyTorch yet."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    cores = physical_cores()
    if cores is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))

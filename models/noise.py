"""Noise of a sampler's steps, drawn ahead where the device computes by itself."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from .samplers import Noise


@contextmanager
def drawn_ahead(draw: Callable[[], torch.Tensor], device: str | torch.device) -> Iterator[Noise]:
    """noise(k) for a sampler: the draws (B, C, H, W) in the order in which `draw` makes them, on
    the device.

    Each step's noise follows from the generators of its images alone. For another device than the
    CPU, a thread makes the next draw in pinned memory while the device computes, so that the copy
    waits for nothing; nothing is drawn before a sampler has asked once.
    """
    if torch.device(device).type == "cpu":
        yield lambda k: draw()
        return
    coming: Future[torch.Tensor] | None = None
    with ThreadPoolExecutor(1, "noise") as pool:

        def noise(k: int) -> torch.Tensor:
            nonlocal coming
            values = (coming or pool.submit(_pinned, draw)).result()
            coming = pool.submit(_pinned, draw)
            return values.to(device, non_blocking=True)

        yield noise


def _pinned(draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    values = draw()
    return values.pin_memory() if torch.cuda.is_available() else values

"""A process of several without the others."""

from collections.abc import Callable, Iterator

import torch

from tinydm.scripts.experiment.processes import _packed, _unpacked


class Member:
    """Process `rank` of `world`, which makes what the others would, and gets it as they would send
    it."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def broadcast(self, flag: bool) -> bool:
        return flag

    def share(
        self, count: int, make: Callable[[int], dict[str, torch.Tensor]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        for first in range(0, count, self.world):  # all make one before any goes on
            values = [make(i) for i in range(first, min(first + self.world, count))]
            for rank, value in enumerate(values):
                yield value if rank == self.rank else _unpacked(_packed(value))

"""The processes of one job, as torchrun starts them, and how they send tensors to the first.

    with team_of_processes() as team:           # alone without torchrun: nothing is opened
        for value in team.in_turn(count, make):  # value 0, 1, ... on rank 0, in this order
            ...

What is exchanged lies on the CPU and is small beside the work, so gloo serves on every machine.
Nothing is reduced on the way: rank 0 gets what one process would have made, in the same order, so
its results do not depend on the number of processes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from ..common.errors import ConfigError, RunError

PATIENCE = timedelta(days=1)  # a process that died is noticed at once, a slow one may be slow
Tensors = dict[str, torch.Tensor]


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) from the environment; (0, 1) without one. Raises ConfigError."""
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ConfigError(f"RANK={texts[0]} WORLD_SIZE={texts[1]}: not a place; use torchrun")
    return int(texts[0]), int(texts[1])


class Team:
    """This process among its like. Methods are called by every rank in the same order."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    def in_turn(self, count: int, make: Callable[[int], Tensors]) -> Iterator[Tensors]:
        """make(i) for i in 0..count-1, spread over the ranks; rank 0 yields all in order, the
        others nothing. Raises RunError if a process is gone."""
        for i in range(self.rank, count, self.world):
            value = make(i)
            if self.rank != 0:
                self._send(value, to=0)
                continue
            yield value
            for other in range(1, min(self.world, count - i)):
                yield self._receive(other)

    def broadcast(self, flag: bool) -> bool:
        """The flag of rank 0, on every rank."""
        if self.world == 1:
            return flag
        value = torch.tensor([flag], dtype=torch.uint8)
        with self._with(0):
            dist.broadcast(value, src=0)
        return bool(value)

    def share(self, value: Tensors) -> Tensors:
        """The tensors of rank 0 (on the CPU), on every rank."""
        if self.world == 1:
            return value
        data = _to_bytes(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        with self._with(0):
            dist.broadcast(length, src=0)
            data = data if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, src=0)
        return value if self.rank == 0 else load(data.numpy().tobytes())

    def _send(self, value: Tensors, to: int) -> None:
        data = _to_bytes(value)
        with self._with(to):
            dist.send(torch.tensor([len(data)]), to)
            dist.send(data, to)

    def _receive(self, other: int) -> Tensors:
        length = torch.zeros(1, dtype=torch.long)
        with self._with(other):
            dist.recv(length, other)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, other)
        return load(data.numpy().tobytes())

    @contextmanager
    def _with(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of every kind when a connection breaks
            raise RunError(
                f"rank {other} is gone or cannot be reached; what ended it stands above: "
                "mend that, then run it again"
            ) from error


def _to_bytes(value: Tensors) -> torch.Tensor:
    plain = {name: tensor.contiguous() for name, tensor in value.items()}
    return torch.frombuffer(bytearray(save(plain)), dtype=torch.uint8)


ALONE = Team()


@contextmanager
def team_of_processes() -> Iterator[Team]:
    """The processes that torchrun started together. Raises ConfigError, RunError."""
    rank, world = rank_and_world()
    if world == 1:
        yield ALONE
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ConfigError("WORLD_SIZE is set, MASTER_ADDR or MASTER_PORT is not; use torchrun")
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the {world} processes do not find each other: {reason}") from error
    try:
        yield Team(rank, world)
    finally:
        dist.destroy_process_group()

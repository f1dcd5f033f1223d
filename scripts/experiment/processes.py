"""The processes of one job, as torchrun starts them, and how they send tensors to each other.

    with team_of_processes() as team:           # alone without torchrun: nothing is opened
        for value in team.in_turn(count, make):  # value 0, 1, ... on rank 0, in this order
            ...
        for value in team.share(count, make):  # the same, on every rank
            ...

What is exchanged lies on the CPU, so gloo serves on every machine. Nothing is reduced on the way:
each rank gets what one process would have made, in the same order, so that its results do not
depend on the number of processes.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..common.errors import ConfigError, RunError

PATIENCE = timedelta(days=1)  # a process that died is noticed at once, a slow one may be slow
ALIGNED, LENGTH = 16, 8  # bytes: where tensors begin in a message; of the number before its table
SHORTEST_WAIT, LONGEST_WAIT = 1e-4, 0.02  # seconds between two looks for a message
Tensors = dict[str, torch.Tensor]


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) from the environment; (0, 1) without one. Raises ConfigError."""
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() and len(text) < 10 for text in texts) or not int(texts[0]) < int(
        texts[1]
    ):
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
            _broadcast(value, 0)
        return bool(value)

    def share(self, count: int, make: Callable[[int], Tensors]) -> Iterator[Tensors]:
        """See quant.calibration.sharing.Team. Raises RunError if a process is gone."""
        for first in range(0, count, self.world):
            own = first + self.rank
            value = make(own) if own < count else {}
            for owner in range(min(self.world, count - first)):
                if self.world == 1:
                    yield value
                elif owner == self.rank:
                    self._give(value)
                    yield value
                else:
                    yield self._take(owner)

    def _give(self, value: Tensors) -> None:
        data = _packed(value)
        with self._with(None):
            _broadcast(torch.tensor([len(data)]), self.rank)
            _broadcast(data, self.rank)

    def _take(self, owner: int) -> Tensors:
        length = torch.zeros(1, dtype=torch.long)
        with self._with(owner):
            _broadcast(length, owner)
            data = torch.empty(int(length), dtype=torch.uint8)
            _broadcast(data, owner)
        return _unpacked(data)

    def _send(self, value: Tensors, to: int) -> None:
        data = _packed(value)
        with self._with(to):
            dist.send(torch.tensor([len(data)]), to)
            dist.send(data, to)

    def _receive(self, other: int) -> Tensors:
        length = torch.zeros(1, dtype=torch.long)
        with self._with(other):
            dist.recv(length, other)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, other)
        return _unpacked(data)

    @contextmanager
    def _with(self, other: int | None) -> Iterator[None]:
        """other: the rank at the other end; None: all of them."""
        try:
            yield
        except RuntimeError as error:  # of every kind when a connection breaks
            if other is None and self.world == 2:
                other = 1 - self.rank
            who = "another rank" if other is None else f"rank {other}"
            raise RunError(
                f"{who} is gone or cannot be reached; what ended it stands above: "
                "mend that, then run it again"
            ) from error


def _broadcast(value: torch.Tensor, owner: int) -> None:
    """A signal ends the wait, which it does not when gloo waits by itself."""
    work, began = dist.broadcast(value, src=owner, async_op=True), time.monotonic()
    while not work.is_completed():
        waited = time.monotonic() - began
        time.sleep(min(max(waited / 20, SHORTEST_WAIT), LONGEST_WAIT))
    work.wait()


def _packed(value: Tensors) -> torch.Tensor:
    """Tensors as bytes: the length of a table of contents, the table, then one after the other."""
    table, end = [], 0
    for name, tensor in value.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        table.append((name, kind, list(tensor.shape), end))
        end += -(-tensor.nbytes // ALIGNED) * ALIGNED
    text = json.dumps(table).encode()
    text += b" " * (-(len(text) + LENGTH) % ALIGNED)
    start = LENGTH + len(text)
    data = torch.empty(start + end, dtype=torch.uint8)
    head = len(text).to_bytes(LENGTH, "little") + text
    data[:start] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for (*_, at), tensor in zip(table, value.values(), strict=True):
        _view(data[start + at :], tensor.dtype, tensor.shape).copy_(tensor.detach())
    return data


def _unpacked(data: torch.Tensor) -> Tensors:
    """The tensors of _packed, each with memory of its own: some of them are kept."""
    start = LENGTH + int.from_bytes(data[:LENGTH].numpy().tobytes(), "little")
    table = json.loads(data[LENGTH:start].numpy().tobytes())
    return {
        name: _view(data[start + at :], getattr(torch, kind), shape).clone()
        for name, kind, shape, at in table
    }


def _view(data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    return data[:size].view(dtype).view(shape)


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
    yield Team(rank, world)
    dist.destroy_process_group()  # not after an error: it waits for what the others still owe

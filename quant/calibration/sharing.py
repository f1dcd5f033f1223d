"""Work that several processes share, whose result is that of one.

What is shared is cut into parts whose number does not depend on that of the processes. Each part is
made by one of them, and all of them get all values in the order of the parts: what they make of
those is the same everywhere, and for any number of processes. All hold equal models.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
SPLIT = 2  # parts of a call without gradients


class Team(Protocol):
    """Processes that calibrate together. Methods are called by all of them in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process. The first one, 0, also works on what is not shared."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    def share(self, count: int, make: Callable[[int], Tensors]) -> Iterator[Tensors]:
        """make(0), ..., make(count - 1) in this order, on every process. Part i is made by process
        i mod world. What others made lies on the CPU."""
        ...


class Alone:
    """One process by itself."""

    rank, world = 0, 1

    def share(self, count: int, make: Callable[[int], Tensors]) -> Iterator[Tensors]:
        return map(make, range(count))


def add_gradients(
    team: Team, count: int, backward: Callable[[int], Tensors], parameters: Sequence[torch.Tensor]
) -> list[Tensors]:
    """Leaves in the parameters, which have no gradients yet, the sum of those of `count` parts,
    added in their order.

    backward(i) adds the gradients of part i and returns what is to be known of it: the values of
    all parts are returned.
    """
    if team.world == 1:
        return [backward(i) for i in range(count)]  # autograd adds in the same order

    def make(i: int) -> Tensors:
        for p in parameters:
            p.grad = None
        values = backward(i)
        given = [p.grad is not None for p in parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.reshape(-1) for part in parts])  # one tensor: quicker to send
        return values | {"gradients": flat, "given": torch.tensor(given)}

    found = list[Tensors]()
    total, anywhere = torch.zeros(0), torch.zeros(len(parameters), dtype=torch.bool)
    for values in team.share(count, make):
        flat = values.pop("gradients").to(parameters[0].device)
        total = total.add_(flat) if found else flat
        anywhere |= values.pop("given")
        found.append(values)
    sums = total.split([p.numel() for p in parameters])
    for p, flat, given in zip(parameters, sums, anywhere.tolist(), strict=True):
        # The optimizer wants it laid out as the parameter is.
        p.grad = torch.empty_like(p).copy_(flat.view(p.shape)) if given else None
    return found


class SharedRows(nn.Module):
    """Called like the denoiser that it wraps; SPLIT parts of the rows are made one by one."""

    def __init__(self, denoiser: Callable[..., torch.Tensor], team: Team):
        super().__init__()
        self._call, self._team = denoiser, team

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (B, C, H, W); the others are tensors of B rows, or of all of them."""
        places = torch.arange(len(x)).chunk(SPLIT)

        def rows(value: Any, part: slice) -> Any:
            whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == len(x)
            return value[part] if whole else value

        def make(i: int) -> Tensors:
            part = slice(int(places[i][0]), int(places[i][-1]) + 1)
            named = {name: rows(value, part) for name, value in kwargs.items()}
            eps = self._call(x[part], *(rows(value, part) for value in args), **named)
            return {"eps": eps.contiguous()}

        shared = self._team.share(len(places), make)
        eps = torch.cat([values["eps"].to(x.device) for values in shared])
        return eps.contiguous(memory_format=torch.channels_last) if eps.ndim == 4 else eps

"""Inputs of a unit behind the quantized units before it, for block-wise reconstruction.

They have to be those of the units as they are by now: a unit that learns on older ones makes up for
errors that its predecessors do not have any more.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import nn


class _Reached(Exception):
    """The unit whose inputs are wanted was called: what follows it does not matter."""


class Prefix:
    """Runs the quantized model up to a unit, for every batch.

    Units that are finished are computed once for each batch: their outputs are kept on the CPU as
    long as there is room (`limit` bytes), so that the passes for all units together cost little
    more than one.
    """

    def __init__(self, model: nn.Module, limit: int):
        self.model, self.room = model, limit
        self.finished: dict[str, nn.Module] = {}
        self._outputs: dict[tuple[str, int], torch.Tensor] = {}

    def finish(self, name: str, unit: nn.Module) -> None:
        """The unit will not change any more."""
        self.finished[name] = unit

    @torch.no_grad()
    def inputs(self, unit: nn.Module, batches: Iterable) -> list[torch.Tensor]:
        """The unit's tensor arguments on the CPU, sample by sample along axis 0.

        batches: (x, t, eps, conditioning), the same ones each time.
        """
        calls: list[tuple[torch.Tensor, ...]] = []

        def stop(module: nn.Module, args: tuple) -> None:
            calls.append(tuple(a.detach().cpu() for a in args if a is not None))
            raise _Reached

        handle = unit.register_forward_pre_hook(stop)
        try:
            for number, (x, t, _, conditioning) in enumerate(batches):
                for name, module in self.finished.items():
                    module.forward = self._recall(name, number, module)
                with suppress(_Reached):
                    self.model(x, t, **conditioning)
        finally:
            handle.remove()
            for module in self.finished.values():
                module.__dict__.pop("forward", None)
        return [torch.cat(parts) for parts in zip(*calls, strict=True)]

    def _recall(self, name: str, number: int, unit: nn.Module) -> Callable:
        """Stands for unit.forward in a batch: gives the kept output, or computes it."""

        def forward(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
            kept = self._outputs.get((name, number))
            if kept is not None:
                return kept.to(x.device)
            out = type(unit).forward(unit, x, *others)
            size = out.numel() * out.element_size()
            if size <= self.room:
                self.room -= size
                self._outputs[name, number] = out.detach().cpu()
            return out

        return forward

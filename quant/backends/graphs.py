"""CUDA graphs of a denoiser: all launches of a call, recorded once for each shape of its inputs.

    graphs = Graphs()
    eps = graphs.call(denoiser, (x, t, context), {})

A denoiser can be recorded if nothing that Python decides in a call depends on values: the timestep
in particular must be read on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


class Graphs:
    """The recordings of one denoiser. A copy and a pickled one begin without any."""

    def __init__(self) -> None:
        self._recorded: dict[tuple, Recorded] = {}

    def call(
        self,
        denoiser: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        recording: Callable[[], AbstractContextManager] = nullcontext,
    ) -> torch.Tensor:
        """denoiser(*args, **kwargs) on the CUDA device of the first argument; t may lie on the
        host. recording: a context in which a call is recorded."""
        inputs = [*args, *kwargs.values()]
        key = tuple((v.shape, v.dtype, v.stride()) if is_tensor(v) else v for v in inputs)
        key += tuple(kwargs)
        recorded = self._recorded.get(key)
        if recorded is None:
            with recording():
                recorded = Recorded(denoiser, inputs, tuple(kwargs))
            self._recorded[key] = recorded
        return recorded(inputs)

    def clear(self) -> None:
        """Drops the recordings: the weights are about to move."""
        self._recorded.clear()

    def __len__(self) -> int:
        return len(self._recorded)

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return Graphs()

    def __getstate__(self) -> dict[str, Any]:
        return {"_recorded": {}}


class Recorded:
    """The launches of one call of a denoiser, as a CUDA graph over copies of its inputs.

    inputs: the call's positional arguments, then the values of the keywords `names`; of its
    tensors, t may lie on the host.
    """

    def __init__(self, denoiser: nn.Module, inputs: list[Any], names: tuple[str, ...]):
        device = inputs[0].device
        self.inputs = [v.to(device, copy=True) if is_tensor(v) else v for v in inputs]
        count = len(inputs) - len(names)
        given, named = self.inputs[:count], dict(zip(names, self.inputs[count:], strict=True))
        # What is made at the first call (compiled kernels, weights in floating point, workspaces)
        # may not be made while a graph is recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                denoiser(*given, **named)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = denoiser(*given, **named)

    def __call__(self, inputs: list[Any]) -> torch.Tensor:
        for own, value in zip(self.inputs, inputs, strict=True):
            if is_tensor(own):
                own.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output.clone()


class Graphed(nn.Module):
    """A full-precision denoiser that plays CUDA graphs; called like it."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser, self.graphs = denoiser, Graphs()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.device.type != "cuda":
            return self.denoiser(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return self.graphs.call(self.denoiser, (x, *args), kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "Graphed":
        self.graphs.clear()
        return super()._apply(*args, **kwargs)


def is_tensor(value: Any) -> bool:
    """Whether an argument of a call is copied into a graph."""
    return isinstance(value, torch.Tensor)

"""A recording of what is computed, as a CUDA graph makes it: operations and kernels with the very
tensors that they read and wrote, but nothing of what Python decided between them.

    tape = Tape()
    with tape.recording():
        out = model(x)
    x.copy_(other)
    tape.play()          # out now holds model(other), unless Python looked at a value of x
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor


class Tape(TorchDispatchMode):
    """launches: of Triton kernels, which must be interpreted."""

    def __init__(self) -> None:
        super().__init__()
        self._actions: list[Callable[[], Any]] = []
        self.launches = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What happens in this block is recorded."""
        launch = GridExecutor.__call__

        def noted(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            self.launches += 1
            self._actions.append(lambda: launch(executor, *args, **kwargs))
            with _disable_current_modes():
                launch(executor, *args, **kwargs)

        GridExecutor.__call__ = noted  # type: ignore[method-assign]
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("Python looked at a value of the device")
        self._actions.append(lambda: self._again(func, args, kwargs, out))
        return out

    @staticmethod
    def _again(func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        made = func(*args, **kwargs)
        for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(made), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def play(self) -> None:
        """Everything once more, in the same order."""
        for action in self._actions:
            action()

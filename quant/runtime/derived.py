"""Values that a module makes of its buffers at the first call, and keeps."""

from collections.abc import Callable
from typing import Any

from torch import nn


class KeepsDerived(nn.Module):
    """A module that keeps values which it made of its buffers, until these move or are loaded.

    Subclasses drop the values in `_forget`.
    """

    def _forget(self) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable, recurse: bool = True) -> "KeepsDerived":
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

"""A denoiser that tells of its calls, for progress bars."""

from collections.abc import Callable
from typing import Any

import torch


class Counted:
    """Called like the denoiser that it wraps; on_rows(n) follows each call of n rows."""

    def __init__(self, denoiser: Any, on_rows: Callable[[int], Any]):
        self.denoiser, self.on_rows = denoiser, on_rows

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self.denoiser(x, *args, **kwargs)
        self.on_rows(len(x))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # what pipelines look for beside the call

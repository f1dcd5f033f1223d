"""Progress bars that move with every call of the denoiser."""

from typing import Any

import torch
from tqdm import tqdm


class Counted:
    """A denoiser whose calls move a bar by their rows; padding moves it no further than its end."""

    def __init__(self, denoiser: Any, bar: tqdm):
        self.denoiser, self.bar = denoiser, bar

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self.denoiser(x, *args, **kwargs)
        self.bar.update(min(len(x), self.bar.total - self.bar.n))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # what pipelines look for beside the call

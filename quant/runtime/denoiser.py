"""A quantized denoiser: the module that it wraps, the current timestep, the output's correction."""

from typing import Any, Protocol

import torch
from torch import nn

from ..core.context import TimestepContext
from .correction import OutputCorrection


class Caller(Protocol):
    """Calls a denoiser in some faster way, with the same result."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def clear(self) -> None:
        """The weights are about to change."""
        ...


class QuantDenoiser(nn.Module):
    """Called like the denoiser it wraps: eps = model(x, t, ...). Holds the one TimestepContext.

    independent_rows: a row of eps is the same to the bit in any batch, which a backend may bring
    about. simulated: name -> why a backend for integers left this layer in floating point. caller:
    what a backend has put in the place of calls of the denoiser, if anything.
    """

    def __init__(self, denoiser: nn.Module, context: TimestepContext):
        super().__init__()
        self.denoiser, self.context = denoiser, context
        self.correction: OutputCorrection | None = None
        self.independent_rows = False
        self.simulated: dict[str, str] = {}
        self.caller: Caller | None = None

    def forward(
        self, x: torch.Tensor, t: torch.Tensor | float, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """x (B, C, H, W); t (B,), or one timestep of all: a number, 0-d or (1,). On the CPU t costs
        no wait for the device of x."""
        t = torch.as_tensor(t)
        rows = x.shape[0]  # not len(x), which torch.export takes for a constant
        t = t.expand(rows) if t.ndim == 0 or t.shape[0] != rows else t
        self.context.set(t, x.device)
        if self.independent_rows and self.context.t is not None:
            t = t[:1]  # its embedding, too, must not depend on the batch
        call = self.denoiser if self.caller is None else self.caller
        eps = call(x, t.to(x.device, non_blocking=True), *args, **kwargs)
        return eps if self.correction is None else self.correction(eps)

    def noise_scale(self, t: int, sigma: float, direction: float) -> float:
        """What is left of a sampler's noise sigma at t, where eps enters the step with the factor
        `direction`: all of it without a correction, see correction.py."""
        if self.correction is None:
            return sigma
        return self.correction.noise_scale(t, sigma, direction)

    def _apply(self, *args: Any, **kwargs: Any) -> "QuantDenoiser":
        self._clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._clear()
        super()._load_from_state_dict(*args)

    def _clear(self) -> None:
        if self.caller is not None:
            self.caller.clear()


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one with that name below the root."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, child, module)

"""The current timestep, set once per denoiser call and read by every activation quantizer."""

from collections.abc import Sequence

import torch

Timestep = int | float  # most schedules have whole ones; diffusers' Euler steps lie between them


def plain_timestep(t: float | torch.Tensor) -> Timestep:
    """A number as the int that it is, or as a float."""
    value = float(t)
    return int(value) if value.is_integer() else value


class TimestepContext:
    """Maps any training timestep to the nearest calibrated one.

    `index` is an int when the whole batch shares one timestep (sampling), else an int64 tensor (B,)
    (calibration mixes timesteps). `t` is the shared timestep, or None for a mixed batch. There is
    no counter: a sampler may skip, repeat or reorder timesteps.

    train_timesteps: T of the noise schedule, or None where timesteps are any real numbers
    (consistency models).
    """

    def __init__(self, timesteps: Sequence[Timestep], train_timesteps: int | None):
        self.timesteps = sorted({plain_timestep(t) for t in timesteps})
        self.train_timesteps = train_timesteps
        if not self.timesteps:
            raise ValueError("no calibrated timestep")
        self._check(self.timesteps[0], self.timesteps[-1], "calibrated timesteps")
        centres = torch.tensor(self.timesteps, dtype=torch.float64)
        self.borders = (centres[1:] + centres[:-1]) / 2  # a timestep on one is the lower one's
        self.t: Timestep | None = None
        self.index: int | torch.Tensor = 0

    def nearest(self, t: Timestep | torch.Tensor) -> torch.Tensor:
        """Indices of the calibrated timesteps nearest to t, int64 of its shape, on its device."""
        t = torch.as_tensor(t)
        return torch.bucketize(t.double(), self.borders.to(t.device))

    def set(self, t: torch.Tensor, device: torch.device | None = None) -> None:
        """t: (B,) timesteps of the coming call, best on the CPU: elsewhere they are fetched, which
        waits for the device. device: where the indices of a mixed batch are needed, else that of t.
        Raises ValueError outside 0..T-1.

        While torch.export traces, t is an input whose values nobody knows: the quantizers then look
        their groups up by tensor. torch.jit.trace would take its values for constants, which is
        refused (RuntimeError).
        """
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace would freeze the timestep; use torch.export")
        if torch.compiler.is_compiling():
            self.t, self.index = None, self.nearest(t)
            return
        steps = t.detach().to("cpu")
        low, high = plain_timestep(steps.min()), plain_timestep(steps.max())
        self._check(low, high, "timestep")
        if low == high:
            self.t, self.index = low, int(self.nearest(low))
        else:
            self.t, self.index = (
                None,
                self.nearest(steps).to(t.device if device is None else device),
            )

    def _check(self, low: Timestep, high: Timestep, what: str) -> None:
        if self.train_timesteps is None:
            return
        if not (low >= 0 and high < self.train_timesteps):  # neither holds of NaN
            limits = f"0..{self.train_timesteps - 1}"
            raise ValueError(f"{what} {low}..{high} outside {limits}")

"""The current timestep, set once per denoiser call and read by every activation quantizer."""

from collections.abc import Sequence

import torch


class TimestepContext:
    """Maps any training timestep to the nearest calibrated one.

    `index` is an int when the whole batch shares one timestep (sampling), else an int64 tensor (B,)
    (calibration mixes timesteps). `t` is the shared timestep, or None for a mixed batch. There is
    no counter: a sampler may skip, repeat or reorder timesteps.
    """

    def __init__(self, timesteps: Sequence[int], train_timesteps: int):
        self.timesteps = sorted({int(t) for t in timesteps})
        self.train_timesteps = train_timesteps
        if not self.timesteps:
            raise ValueError("no calibrated timestep")
        if self.timesteps[0] < 0 or self.timesteps[-1] >= train_timesteps:
            raise ValueError(f"calibrated timesteps must lie within 0..{train_timesteps - 1}")
        centres = torch.tensor(self.timesteps)
        distance = (torch.arange(train_timesteps)[:, None] - centres[None, :]).abs()
        self.nearest = distance.argmin(dim=1)  # (T,) int64
        self.t: int | None = None
        self.index: int | torch.Tensor = 0

    def set(self, t: torch.Tensor) -> None:
        """t: (B,) timesteps of the coming call. Raises ValueError outside 0..T-1."""
        steps = t.detach().to("cpu", torch.long)
        low, high = int(steps.min()), int(steps.max())
        if low < 0 or high >= self.train_timesteps:
            raise ValueError(f"timestep {low}..{high} is outside 0..{self.train_timesteps - 1}")
        if low == high:
            self.t, self.index = low, int(self.nearest[low])
        else:
            self.t, self.index = None, self.nearest[steps].to(t.device)

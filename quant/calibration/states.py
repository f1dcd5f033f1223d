"""Calibration data: states of the full-precision sampler with the noise it predicted there.

Legend: K sampling steps, N trajectories. A sample is a pair (step k, trajectory j); samples are
given as an index tensor (n, 2). Steps are not calibrated timesteps (S): several steps may use one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..core.context import Timestep


@dataclass
class CalibrationStates:
    """x (K, N, C, H, W): state entering sampling step k of trajectory j; eps, same shape: the
    full-precision output there; timesteps (K,): t of each step, descending, may repeat.

    conditioning: keyword tensors of the denoiser, (N, ...), the same along a trajectory. The states
    may lie on the CPU; what it gives out is on `device`.
    """

    x: torch.Tensor
    eps: torch.Tensor
    timesteps: list[Timestep]
    conditioning: dict[str, torch.Tensor] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def trajectories(self) -> int:
        """Number of trajectories, N."""
        return self.x.shape[1]

    def gather(
        self, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """index (n, 2): pairs (step k, trajectory j). Returns x_t, t (n,) on the CPU, where
        quantizers look their groups up, eps, conditioning."""
        k, j = index[:, 0], index[:, 1]
        t = torch.tensor([self.timesteps[i] for i in k.tolist()])
        conditioning = {n: v[j].to(self.device) for n, v in self.conditioning.items()}
        return self._given(self.x[k, j]), t, self.eps[k, j].to(self.device), conditioning

    def _given(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.device)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def _part(self, k: int, part: slice) -> tuple[torch.Tensor, Timestep, dict[str, torch.Tensor]]:
        conditioning = {n: v[part].to(self.device) for n, v in self.conditioning.items()}
        return self._given(self.x[k, part]), self.timesteps[k], conditioning

    def by_timestep(
        self, limit: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, Timestep, dict[str, torch.Tensor]]]:
        """Batches of one timestep each: `limit` trajectories at every step.

        With a conditioning they are others at each step, drawn at random: neighbours may have the
        same one (with guidance the first ones are all unconditional).
        """
        limit = min(limit, self.trajectories)
        for k in range(len(self.timesteps)):
            chosen = torch.arange(limit)
            if self.conditioning:
                generator = torch.Generator().manual_seed(k)
                chosen = torch.randperm(self.trajectories, generator=generator)[:limit]
            for j in chosen.split(batch_size):
                x, _, _, conditioning = self.gather(torch.stack([torch.full_like(j, k), j], 1))
                yield x, self.timesteps[k], conditioning

    def tuples_by_timestep(
        self, tuples: torch.Tensor, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, Timestep, dict[str, torch.Tensor]]]:
        """Batches of one timestep each: the samples tuples (n, 2), in the order of the steps."""
        for k in tuples[:, 0].unique().tolist():
            for part in tuples[tuples[:, 0] == k].split(batch_size):
                x, _, _, conditioning = self.gather(part)
                yield x, self.timesteps[k], conditioning

    def at_step(
        self, k: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, Timestep, dict[str, torch.Tensor]]]:
        """Batches of all trajectories at sampling step k."""
        for start in range(0, self.trajectories, batch_size):
            yield self._part(k, slice(start, start + batch_size))


def joined(parts: Sequence[CalibrationStates]) -> CalibrationStates:
    """The trajectories of all parts. Raises ValueError where their timesteps differ."""
    first = parts[0]
    if any(part.timesteps != first.timesteps for part in parts):
        raise ValueError("states with different timesteps cannot be joined")
    return CalibrationStates(
        torch.cat([part.x for part in parts], dim=1),
        torch.cat([part.eps for part in parts], dim=1),
        first.timesteps,
        {n: torch.cat([p.conditioning[n] for p in parts]) for n in first.conditioning},
        first.device,
    )

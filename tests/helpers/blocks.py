"""One convolution to be reconstructed."""

import torch
from torch import nn

from tests.helpers.toy import toy_model
from tinydm.quant.calibration.reconstruct import Reconstruction, unit_names
from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.calibration.timesteps import all_steps, tuples_of_steps
from tinydm.quant.calibration.wrapping import BitPolicy
from tinydm.quant.core.settings import ReconstructSettings
from tinydm.quant.runtime.denoiser import QuantDenoiser

FAST = ReconstructSettings(iterations=250, batch_size=16, lr_rounding=0.1)


class Block(nn.Module):
    """One convolution over channels that depend on each other: rounding up or down interacts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def block_states(denoiser: nn.Module, trajectories: int, seed: int) -> CalibrationStates:
    mix = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    x = torch.einsum("oc,ncij->noij", mix, torch.randn(2 * trajectories, 4, 6, 6, generator=g))
    x = x.contiguous().unflatten(0, (2, trajectories))
    with torch.no_grad():
        eps = torch.stack([denoiser(v, torch.zeros(1)) for v in x])
    return CalibrationStates(x, eps, [50, 0])


def block_model(denoiser: nn.Module, states: CalibrationStates, bits: int) -> QuantDenoiser:
    return toy_model(denoiser, states, 1, BitPolicy(weight=bits, activation=8))


def learn(
    denoiser: nn.Module, model: QuantDenoiser, states: CalibrationStates, **changes: object
) -> dict:
    """Reconstructs all units; name -> (before, after)."""
    errors: dict[str, tuple[float, float]] = {}
    total = len(states.timesteps) * states.trajectories
    steps = all_steps(total, len(states.timesteps))
    arguments = {
        "settings": FAST,
        "learn_scales": True,
        "units": unit_names(model, ()),
        "memory_gb": 1.0,
        "seed": 0,
    } | changes
    tuples = tuples_of_steps(steps, states.trajectories, torch.Generator().manual_seed(0))
    Reconstruction(denoiser, model, states, tuples, **arguments).run(
        lambda name, before, after: errors.update({name: (before, after)})
    )
    return errors

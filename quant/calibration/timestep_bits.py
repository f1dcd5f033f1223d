"""Bits of the activations at each timestep, under a common mean.

An error of the first sampling steps moves the image far more than one of the last, while a bit
takes about three quarters off the error of a step wherever it is spent. Timesteps therefore get
more or fewer bits than the settings name, and as many in the mean of the sampling steps: each bit
goes where it takes most off the error of the image (reverse water-filling, Cover and Thomas,
Elements of Information Theory, section 10.3.3). Timesteps of different bits share no group.

Legend: S calibrated timesteps.
"""

import torch

from ..core.settings import FEWEST_BITS, MOST_BITS
from .mixed_bits import share_out


def bits_of_timesteps(
    contribution: torch.Tensor, calls: torch.Tensor, bits: int, groups: int
) -> torch.Tensor:
    """Bits of each calibrated timestep (S,), of a mean over the calls of at most `bits`.

    contribution (S,): what each adds to the error of the image when all have `bits`. calls (S,):
    sampling steps that use it. groups: of a quantizer at most, so that there are no more different
    bits.
    """
    fewest = max(FEWEST_BITS, bits - 1)
    choices = range(fewest, min(MOST_BITS, fewest + groups - 1) + 1)
    if groups == 1 or bits not in choices:
        return torch.full((len(calls),), bits)
    losses = {
        i: {b: value * 4.0 ** (bits - b) for b in choices}
        for i, value in enumerate(contribution.tolist())
    }
    chosen = share_out(losses, dict(enumerate(calls.tolist())), bits)
    return torch.tensor([chosen[i] for i in range(len(calls))])

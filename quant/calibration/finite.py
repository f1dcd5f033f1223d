"""Losses and results that stopped being finite: the phase of the calibration ends at once."""

import math

import torch
from torch import nn


class DivergenceError(ValueError):
    """A loss or a learned value is NaN or infinite; one line.

    untouched: nothing was learned yet, so that no learning rate is to blame."""

    def __init__(self, message: str, untouched: bool = False):
        super().__init__(message)
        self.untouched = untouched


def finite_loss(loss: torch.Tensor, i: int, iterations: int, where: str = "") -> float:
    """The loss () of iteration i, from 0, as a number. Raises DivergenceError.

    where: what is being learned, for the message. Call it before the step, which would spread NaN.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        place = f"{where}iteration {i + 1} of {iterations}"
        raise DivergenceError(f"the loss is {value} at {place}", untouched=i == 0)
    return value


def check_finite(model: nn.Module) -> None:
    """Raises DivergenceError, with the tensor, if something in the model, or the scale that a
    learned logarithm stands for, is NaN or infinite."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if name.endswith(("log_scale", "log_gain")):
            value = value.exp()
        if not torch.isfinite(value).all():
            raise DivergenceError(f"{name} is not finite")

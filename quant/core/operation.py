"""The geometry of a layer, without its parameters, and what happens to its input channels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LAYER_TYPES = (nn.Conv2d, nn.Conv1d, nn.Linear)
CHANNEL_PLACE = {"Linear": 0, "Conv1d": 1, "Conv2d": 2}  # dimensions behind the channels


class Operation:
    """The geometry of an nn.Conv2d, nn.Conv1d or nn.Linear, without its parameters."""

    # Of convolutions alone, one value for each dimension.
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(self, layer: nn.Conv2d | nn.Conv1d | nn.Linear):
        base = next(kind for kind in LAYER_TYPES if isinstance(layer, kind))
        if type(layer).forward is not base.forward:
            raise ValueError(f"{type(layer).__name__} computes something else than {base.__name__}")
        self.kind = base.__name__
        self.is_conv = not isinstance(layer, nn.Linear)
        self._call: Callable[..., torch.Tensor] = F.linear
        self._geometry: tuple[Any, ...] = ()
        if not isinstance(layer, nn.Linear):
            if layer.padding_mode != "zeros":
                raise ValueError(f"padding_mode '{layer.padding_mode}' is not supported")
            self.stride, self.padding = layer.stride, layer.padding
            self.dilation, self.groups = layer.dilation, layer.groups
            self._call = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
            self._geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        else:
            self.in_features = layer.in_features
        self.channel_dim = 1 if self.is_conv else -1  # of the input

    def beside(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each channel (C,), shaped to broadcast against the input."""
        return values.view(-1, *(1,) * CHANNEL_PLACE[self.kind])

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        return self._call(x, weight, bias, *self._geometry)


def quantize_input(
    x: torch.Tensor, quantizers: nn.ModuleList, split: int, channel_dim: int
) -> torch.Tensor:
    """Applies one quantizer, or one to the first `split` channels and another to the rest."""
    if len(quantizers) == 1:
        return quantizers[0](x)
    first, second = x.split([split, x.shape[channel_dim] - split], dim=channel_dim)
    return torch.cat([quantizers[0](first), quantizers[1](second)], dim=channel_dim)


def relative_to_row(x: torch.Tensor, inplace: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) divided by the largest value of each row, and these values (..., 1). inplace: x
    may be overwritten."""
    top = x.amax(-1, keepdim=True)
    return torch.div(x, top, out=x if inplace else None), top


def scale_channels(
    x: torch.Tensor, channel_scale: torch.Tensor | None, channel_dim: int
) -> torch.Tensor:
    """r x with r (C,) along the channels; x itself without r."""
    if channel_scale is None:
        return x
    if channel_dim == -1:
        return x * channel_scale
    return x * channel_scale.view(-1, *(1,) * (x.dim() - 2))

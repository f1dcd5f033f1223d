"""Small modules shared by the denoisers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class MatMul(nn.Module):
    """Batched matrix product as a module, so that other code can find and replace it.

    Attention calls it twice: scores = query @ key, and output = probabilities @ value.
    """

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left, right)  # (B, N, K) @ (B, K, M) -> (B, N, M)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then an optional 3x3 convolution."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def after_softmax(
    product: nn.Module, scores: torch.Tensor, right: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """softmax(scores * scale) @ right, by `product`. scores (B, N, K), right (B, K, M).

    A product that is a FusedSoftmax (protocols.py) takes them as one step.
    """
    fused: Callable[..., torch.Tensor] | None = getattr(product, "after_softmax", None)
    if fused is not None:
        return fused(scores, scale, right)
    return product(torch.softmax(scores if scale == 1.0 else scores * scale, dim=-1), right)


def after_norm_silu(
    layer: nn.Module,
    norm: nn.Module,
    x: torch.Tensor,
    dropout: nn.Module | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """layer(dropout(silu(norm(x)))) + plus. x (B, C, H, W); plus (B, O, H, W) or (B, O, 1, 1).

    A layer that is a FusedNormSilu (protocols.py) takes them as one step; such layers are never
    trained, so that they have no dropout.
    """
    fused: Callable[..., torch.Tensor] | None = getattr(layer, "after_norm_silu", None)
    if fused is not None:
        return fused(norm, x, plus)
    h = F.silu(norm(x))
    h = layer(h if dropout is None else dropout(h))
    return h if plus is None else h + plus

"""Small modules shared by the denoisers."""

import torch
import torch.nn.functional as F
from torch import nn


class MatMul(nn.Module):
    """Batched matrix product as a module, so that other code can find and replace it.

    Attention calls it twice: scores = query @ key, and output = probabilities @ value.
    """

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left, right)  # (B, N, K) @ (B, K, M) -> (B, N, M)


def after_norm_silu(
    layer: nn.Module, norm: nn.Module, x: torch.Tensor, dropout: nn.Module | None = None
) -> torch.Tensor:
    """layer(dropout(silu(norm(x)))). x (B, C, H, W).

    A layer that can take the three as one step has a method `after_norm_silu(norm, x)`; such layers
    are never trained, so that they have no dropout.
    """
    together = getattr(layer, "after_norm_silu", None)
    if together is not None:
        return together(norm, x)
    h = F.silu(norm(x))
    return layer(h if dropout is None else dropout(h))

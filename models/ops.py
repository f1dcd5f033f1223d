"""Small modules shared by the denoisers."""

import torch
from torch import nn


class MatMul(nn.Module):
    """Batched matrix product as a module, so that other code can find and replace it.

    Attention calls it twice: scores = query @ key, and output = probabilities @ value.
    """

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left, right)  # (B, N, K) @ (B, K, M) -> (B, N, M)

"""Attention of the latent-diffusion UNet: pixel self-attention and the text transformer.

Both matrix products of every attention are `MatMul` modules named `scores` and `values`, fed with
3-D tensors. Parameter names are those of CompVis/latent-diffusion and openai/guided-diffusion.

Shapes: B batch, C channels, N = H * W pixels (tokens), L context tokens, h heads of d channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .ops import MatMul, after_softmax


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the pixels, with a residual connection.

    The 3C output channels of `qkv` are read in one of two orders with equal weight shapes:
    per head [q | k | v] (legacy), or all q, all k, all v (`new_order`). The checkpoint does not
    say which; the wrong one loads and computes nonsense.
    """

    def __init__(self, channels: int, heads: int, new_order: bool, groups: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels cannot be divided into {heads} heads")
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.scores = MatMul()
        self.values = MatMul()

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3C, N) -> q, k, v, each (B*h, d, N)."""
        b, width, n = qkv.shape
        d = width // 3 // self.heads
        if self.new_order:
            return tuple(part.reshape(b * self.heads, d, n) for part in qkv.chunk(3, dim=1))
        return qkv.reshape(b * self.heads, 3 * d, n).split(d, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        q, k, v = self._split(self.qkv(self.norm(x).flatten(2)))
        scale = q.shape[1] ** -0.25  # on both factors, which keeps the product small
        scores = self.scores((q * scale).transpose(1, 2), k * scale)  # (B*h, N, N)
        h = after_softmax(self.values, scores, v.transpose(1, 2))  # (B*h, N, d)
        h = h.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)  # (B, C, N)
        return x + self.proj_out(h).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of N query tokens over the context, or over themselves without one."""

    def __init__(self, dim: int, context_dim: int | None, heads: int, dim_head: int):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))
        self.scores = MatMul()
        self.values = MatMul()

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, h*d) -> (B*h, M, d)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        # x (B, N, dim), context (B, L, context_dim) -> (B, N, dim)
        context = x if context is None else context
        q, k, v = (
            self._to_heads(p) for p in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = self.scores(q, k.transpose(1, 2))  # (B*h, N, L)
        h = after_softmax(self.values, scores, v, self.scale)  # (B*h, N, d)
        h = h.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)  # (B, N, h*d)
        return self.to_out(h)


class GEGLU(nn.Module):
    """Gated linear unit (Shazeer 2020): value * gelu(gate), both from one projection."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, c_in) -> (B, N, c_out)
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int):
        super().__init__()
        # The second place is upstream's dropout, which is always 0.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, dim) -> (B, N, dim)
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and residual."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int | None):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        # x (B, N, dim), context (B, L, context_dim)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual connection."""

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        depth: int,
        context_dim: int | None,
        groups: int,
    ):
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        # x (B, C, H, W), context (B, L, context_dim)
        h = self.proj_in(self.norm(x))
        size = h.shape[2:]
        h = h.flatten(2).transpose(1, 2)  # (B, N, h*d)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size))

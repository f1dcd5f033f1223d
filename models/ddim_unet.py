"""The pixel-space UNet of DDPM and DDIM (Ho et al. 2020, appendix B; Song et al. 2021).

Parameter names and arithmetic are those of the public checkpoints (ermongroup/ddim,
pesser/pytorch_diffusion), so `load_state_dict(strict=True)` works on them unchanged.

Shapes: B batch, C channels, H x W feature map, E embedding width (4 * ch).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .ops import MatMul, Upsample, after_norm_silu, after_softmax
from .protocols import ModuleList
from .roles import LayerRoles


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding, sines first. t: (B,) any dtype; returns (B, dim) float32."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * -(math.log(10000) / (half - 1))
    )
    angles = t.float()[:, None] * frequencies[None, :]  # (B, half)
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Downsample(nn.Module):
    """Halving by a stride-2 convolution, padded only at the right and the bottom, or by a mean."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the timestep enters between the two."""

    def __init__(self, c_in: int, c_out: int, emb: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = _norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(emb, c_out)
        self.norm2 = _norm(c_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        # x (B, C, H, W); temb (B, E) after SiLU
        shift = self.temb_proj(temb)[:, :, None, None]
        h = after_norm_silu(self.conv1, self.norm1, x, plus=shift)
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return after_norm_silu(self.conv2, self.norm2, h, self.dropout, plus=shortcut)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.scores = MatMul()
        self.values = MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, height, width = x.shape
        h = self.norm(x)
        q = self.q(h).flatten(2).transpose(1, 2)  # (B, HW, C)
        k = self.k(h).flatten(2)  # (B, C, HW)
        v = self.v(h).flatten(2).transpose(1, 2)  # (B, HW, C)
        scores = self.scores(q, k)  # (B, HW, HW)
        h = after_softmax(self.values, scores, v, c**-0.5)
        h = h.transpose(1, 2).reshape(b, c, height, width)
        return x + self.proj_out(h)


class TimestepMLP(nn.Module):
    """The two linear layers of the timestep's embedding, C to E to E channels. Its owner runs
    them."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(channels, emb), nn.Linear(emb, emb)])


class Stage(nn.Module):
    """The layers of one resolution: residual blocks, as many attentions or none, and but for the
    last stage what leads to the next one, `downsample` or `upsample`. Its owner runs them."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()


class Middle(nn.Module):
    """The lowest resolution: a residual block on each side of one attention. Its owner runs
    them."""

    def __init__(self, channels: int, emb: int, dropout: float, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, emb, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, emb, dropout, groups)


class DDIMUNet(nn.Module):
    """eps = model(x, t).  x (B, in_channels, R, R), t (B,) in 0..T-1; returns (B, out_ch, R, R).

    Parameters carry the upstream's names. `norm_groups` is 32 upstream; narrow models need fewer,
    since GroupNorm with one channel per group removes the timestep.

    exact_between_layers: between its layers, norms and attention products there are but sums,
    concatenations, copies and means of four pixels, whose bits do not depend on the batch, and one
    timestep stands for all samples.
    """

    exact_between_layers = True

    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        in_channels: int = 3,
        out_ch: int = 3,
        image_size: int = 32,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ):
        super().__init__()
        if ch // 2 == 1:
            raise ValueError(f"ch is {ch}, for which there are no frequencies of timesteps")
        self.ch, self.image_size, self.in_channels = ch, image_size, in_channels
        self.num_res_blocks, self.num_levels = num_res_blocks, len(ch_mult)
        emb = 4 * ch
        self.temb = TimestepMLP(ch, emb)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        widths = [ch * m for m in ch_mult]
        resolution, c = image_size, ch
        skips = [ch]  # channels of every stored feature map
        self.down: ModuleList[Stage] = ModuleList()
        for level, width in enumerate(widths):
            stage = Stage()
            for _ in range(num_res_blocks):
                stage.block.append(ResnetBlock(c, width, emb, dropout, norm_groups))
                c = width
                if resolution in attn_resolutions:
                    stage.attn.append(AttnBlock(c, norm_groups))
                skips.append(c)
            if level != self.num_levels - 1:
                stage.downsample = Downsample(c, resamp_with_conv)
                resolution //= 2
                skips.append(c)
            self.down.append(stage)

        self.mid = Middle(c, emb, dropout, norm_groups)

        self._concat_split: dict[str, int] = {}
        self.up: ModuleList[Stage] = ModuleList()
        for level in reversed(range(self.num_levels)):
            stage = Stage()
            for i in range(num_res_blocks + 1):
                name = f"up.{level}.block.{i}"
                stage.block.append(
                    ResnetBlock(c + skips.pop(), widths[level], emb, dropout, norm_groups)
                )
                if hasattr(stage.block[-1], "nin_shortcut"):
                    self._concat_split[f"{name}.nin_shortcut"] = c
                c = widths[level]
                if resolution in attn_resolutions:
                    stage.attn.append(AttnBlock(c, norm_groups))
            if level != 0:
                stage.upsample = Upsample(c, resamp_with_conv)
                resolution *= 2
            self.up.insert(0, stage)

        self.norm_out = _norm(c, norm_groups)
        self.conv_out = nn.Conv2d(c, out_ch, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.to(x.device, non_blocking=True)  # else the host would wait for all asked before
        temb = timestep_embedding(t, self.ch)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        temb = F.silu(temb)  # every block applies it; once is enough. (B, E)

        h = self.conv_in(x)
        skips = [h]
        for level, stage in enumerate(self.down):
            for i, block in enumerate(stage.block):
                h = block(h, temb)
                if len(stage.attn):
                    h = stage.attn[i](h)
                skips.append(h)
            if level != self.num_levels - 1:
                h = stage.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for level in reversed(range(self.num_levels)):
            stage = self.up[level]
            for i, block in enumerate(stage.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                if len(stage.attn):
                    h = stage.attn[i](h)
            if level != 0:
                h = stage.upsample(h)
        return after_norm_silu(self.conv_out, self.norm_out, h)

    def layer_roles(self) -> LayerRoles:
        """What each layer is for; names are those of `named_modules()`."""
        names = dict(self.named_modules())
        units = [n for n in self._execution_order() if n in names]
        matmuls = {
            f"{n}.{kind}": kind
            for n, m in names.items()
            if isinstance(m, AttnBlock)
            for kind in ("scores", "values")
        }
        return LayerRoles(
            inputs=("conv_in",),
            outputs=("conv_out",),
            timestep_only=tuple(n for n in names if "temb.dense." in n or n.endswith("temb_proj")),
            concat_split=dict(self._concat_split),
            matmuls=matmuls,
            units=tuple(units),
        )

    def _execution_order(self) -> list[str]:
        levels, blocks = range(self.num_levels), range(self.num_res_blocks)
        order = ["conv_in"]
        for level in levels:
            for i in blocks:
                order += [f"down.{level}.block.{i}", f"down.{level}.attn.{i}"]
            order.append(f"down.{level}.downsample")
        order += ["mid.block_1", "mid.attn_1", "mid.block_2"]
        for level in reversed(levels):
            for i in range(self.num_res_blocks + 1):
                order += [f"up.{level}.block.{i}", f"up.{level}.attn.{i}"]
            order.append(f"up.{level}.upsample")
        return [*order, "conv_out"]

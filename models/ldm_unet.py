"""The UNet of latent diffusion, Stable Diffusion v1 and guided diffusion (ADM).

One class covers both public families (Rombach et al. 2022, appendix E; Dhariwal & Nichol 2021,
section 3). Parameter names and arithmetic are those of the public checkpoints, so
`load_state_dict(strict=True)` works on them unchanged.

Shapes: B batch, C channels, H x W feature map, E embedding width (4 * model_channels),
L x D context (text tokens or one class token).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import AttentionBlock, CrossAttention, SpatialTransformer
from .ops import Upsample, after_norm_silu
from .roles import LayerRoles

# Keys of the public configurations that do not change what the network computes.
TRAINING_ONLY = ("image_size", "use_checkpoint", "use_fp16", "dims")


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding, cosines first. t: (B,) any dtype; returns (B, dim) float32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None, :]  # (B, half)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class Downsample(nn.Module):
    """Halving by a stride-2 convolution, padded on all sides, or by a 2x2 mean."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.op: nn.Module
        if with_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.op(x)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the embedding enters at the second norm.

    scale_shift: the embedding modulates the second norm instead of being added before it.
    resample: a parameter-free module applied to both paths before the first convolution.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb: int,
        dropout: float,
        scale_shift: bool,
        groups: int,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.resample = resample or nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, (1 + scale_shift) * c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        # x (B, C, H, W); emb (B, E) after SiLU, that of emb_layers
        emb = self.emb_layers[1](emb)[:, :, None, None]  # (B, C or 2C, 1, 1)
        shift = None if self.scale_shift else emb
        norm, activation, conv = self.in_layers
        if isinstance(self.resample, nn.Identity):
            h = after_norm_silu(conv, norm, x, plus=shift)
        else:
            h = conv(self.resample(activation(norm(x))))
            h = h if shift is None else h + shift
        skip = self.skip_connection(self.resample(x))
        norm, activation, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            return skip + conv(dropout(activation(norm(h) * (1 + scale) + shift)))
        return after_norm_silu(conv, norm, h, dropout, plus=skip)


class Stage(nn.ModuleList):
    """Layers between two skip connections; each receives what it takes besides x."""

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class LDMUNet(nn.Module):
    """eps = model(x, t, context=None, y=None).

    x (B, in_channels, H, W), t (B,) in 0..T-1, context (B, L, context_dim), y (B,) class numbers;
    returns (B, out_channels, H, W). Guided diffusion predicts 2 * in_channels: eps, then the
    interpolation v of the log variance.

    Arguments carry the upstream's names; attention_resolutions are downsampling factors.
    `norm_groups` is 32 upstream; narrow models need fewer, since GroupNorm with one channel per
    group removes the timestep. Raises ValueError for widths or heads that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        norm_groups: int = 32,
    ):
        super().__init__()
        if num_heads == -1 and num_head_channels == -1:
            raise ValueError("set num_heads or num_head_channels")
        if context_dim is not None and not use_spatial_transformer:
            raise ValueError("context_dim needs use_spatial_transformer")
        self.model_channels, self.context_dim = model_channels, context_dim
        self.num_classes = num_classes
        emb = 4 * model_channels

        def res_block(c_in: int, c_out: int, resample: nn.Module | None = None) -> ResBlock:
            shift = use_scale_shift_norm
            return ResBlock(c_in, c_out, emb, dropout, shift, norm_groups, resample)

        def attention(channels: int, heads: int) -> nn.Module:
            if num_head_channels != -1:
                heads = channels // num_head_channels
            if heads < 1:
                raise ValueError(f"{channels} channels are too few for one attention head")
            if not use_spatial_transformer:
                return AttentionBlock(channels, heads, use_new_attention_order, norm_groups)
            whole = legacy or num_head_channels == -1
            dim_head = channels // heads if whole else num_head_channels
            return SpatialTransformer(
                channels, heads, dim_head, transformer_depth, context_dim, norm_groups
            )

        def downsample(channels: int) -> nn.Module:
            if resblock_updown:
                return res_block(channels, channels, Downsample(channels, False))
            return Downsample(channels, conv_resample)

        def upsample(channels: int) -> nn.Module:
            if resblock_updown:
                return res_block(channels, channels, Upsample(channels, False))
            return Upsample(channels, conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        widths = [int(m * model_channels) for m in channel_mult]
        c, factor = widths[0], 1
        skips = [c]  # channels of every stored feature map
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, c, 3, padding=1)])])
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(c, width)]
                c = width
                if factor in attention_resolutions:
                    layers.append(attention(c, num_heads))
                self.input_blocks.append(Stage(layers))
                skips.append(c)
            if level != len(widths) - 1:
                self.input_blocks.append(Stage([downsample(c)]))
                skips.append(c)
                factor *= 2

        self.middle_block = Stage([res_block(c, c), attention(c, num_heads), res_block(c, c)])

        # Only the plain attention of the decoder has a head count of its own.
        own = legacy and not use_spatial_transformer and num_heads_upsample != -1
        decoder_heads = num_heads_upsample if own else num_heads
        self._concat_split: dict[str, int] = {}
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(num_res_blocks + 1):
                block = res_block(c + skips.pop(), widths[level])
                if isinstance(block.skip_connection, nn.Conv2d):
                    name = f"output_blocks.{len(self.output_blocks)}.0.skip_connection"
                    self._concat_split[name] = c
                c = widths[level]
                layers = [block]
                if factor in attention_resolutions:
                    layers.append(attention(c, decoder_heads))
                if level and i == num_res_blocks:
                    layers.append(upsample(c))
                    factor //= 2
                self.output_blocks.append(Stage(layers))

        self.out = nn.Sequential(
            nn.GroupNorm(norm_groups, c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1)
        )

    @classmethod
    def from_upstream(cls, params: Mapping[str, Any]) -> "LDMUNet":
        """Build from the `params` of a public configuration, without its training-only keys."""
        if params.get("dims", 2) != 2:
            raise ValueError(f"only two-dimensional convolutions are built, not {params['dims']}")
        return cls(**{k: v for k, v in params.items() if k not in TRAINING_ONLY})

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (y is None) != (self.num_classes is None):
            raise ValueError("y is needed exactly by a class-conditional model")
        if (context is None) != (self.context_dim is None):
            raise ValueError("context is needed exactly by a model with context_dim")
        t = t.to(x.device, non_blocking=True)
        emb = self.time_embed(timestep_embedding(t, self.model_channels))  # (B, E)
        if y is not None:
            emb = emb + self.label_emb(y)
        emb = F.silu(emb)  # every block applies it; once is enough
        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        norm, _, conv = self.out
        return after_norm_silu(conv, norm, h)

    def layer_roles(self) -> LayerRoles:
        """What each layer is for; names are those of `named_modules()`."""
        names = dict(self.named_modules())
        embedding = [n for n in names if n in ("time_embed.0", "time_embed.2")]
        embedding += [f"{n}.emb_layers.1" for n, m in names.items() if isinstance(m, ResBlock)]
        attentions = [n for n, m in names.items() if isinstance(m, AttentionBlock | CrossAttention)]
        return LayerRoles(
            inputs=("input_blocks.0.0",),
            outputs=("out.2",),
            # A class label is added to the embedding, which then is not the timestep's alone.
            timestep_only=tuple(embedding) if self.num_classes is None else (),
            concat_split=dict(self._concat_split),
            matmuls={f"{n}.{kind}": kind for n in attentions for kind in ("scores", "values")},
            units=tuple(self._units()),
        )

    def _units(self) -> Iterator[str]:
        stages = [(f"input_blocks.{i}", stage) for i, stage in enumerate(self.input_blocks)]
        stages.append(("middle_block", self.middle_block))
        stages += [(f"output_blocks.{i}", stage) for i, stage in enumerate(self.output_blocks)]
        for prefix, stage in stages:
            for name, layer in stage.named_children():
                if any(True for _ in layer.parameters()):  # a mean or a doubling has none
                    yield f"{prefix}.{name}"
        yield "out.2"

"""First stages of latent diffusion: VQ (codebook) and KL autoencoders.

Parameter names and arithmetic are those of CompVis/latent-diffusion (Esser et al. 2021, appendix A;
Rombach et al. 2022, appendix G), so `load_state_dict(strict=True)` works on the public files once
their `loss.*` tensors are left out.

Shapes: image (B, 3, R, R) in [-1, 1]; latent z (B, embed_dim, r, r), r = R / 2**(levels - 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ddim_unet import AttnBlock, Downsample, Stage
from .ops import Upsample
from .protocols import ModuleList

# Keys of the public configurations that do not change what the network computes.
TRAINING_ONLY = ("lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key")


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with a residual connection; no timestep."""

    def __init__(self, c_in: int, c_out: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, c_in, H, W) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def _middle(channels: int, dropout: float, groups: int) -> nn.Module:
    """The lowest resolution: a residual block on each side of one attention."""
    middle = nn.Sequential()
    middle.add_module("block_1", ResnetBlock(channels, channels, dropout, groups))
    middle.add_module("attn_1", AttnBlock(channels, groups))
    middle.add_module("block_2", ResnetBlock(channels, channels, dropout, groups))
    return middle


class Encoder(nn.Module):
    """Image (B, in_channels, R, R) -> features (B, z_channels, r, r); twice as many if double_z.

    attn_resolutions are sizes of feature maps. Arguments carry the upstream's names.
    """

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        c = ch
        self.down: ModuleList[Stage] = ModuleList()
        for level, multiplier in enumerate(ch_mult):
            stage = Stage()
            for _ in range(num_res_blocks):
                stage.block.append(ResnetBlock(c, ch * multiplier, dropout, norm_groups))
                c = ch * multiplier
                if resolution in attn_resolutions:
                    stage.attn.append(AttnBlock(c, norm_groups))
            if level != len(ch_mult) - 1:
                stage.downsample = Downsample(c, resamp_with_conv)
                resolution //= 2
            self.down.append(stage)
        self.mid = _middle(c, dropout, norm_groups)
        self.norm_out = nn.GroupNorm(norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for i, block in enumerate(stage.block):
                h = block(h)
                if len(stage.attn):
                    h = stage.attn[i](h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, z_channels, r, r) -> image (B, out_ch, R, R). Arguments as in Encoder."""

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        out_ch: int,
        resolution: int,
        z_channels: int,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        norm_groups: int = 32,
    ):
        super().__init__()
        c = ch * ch_mult[-1]
        resolution //= 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = _middle(c, dropout, norm_groups)
        self.up: ModuleList[Stage] = ModuleList()
        for level in reversed(range(len(ch_mult))):
            stage = Stage()
            for _ in range(num_res_blocks + 1):
                stage.block.append(ResnetBlock(c, ch * ch_mult[level], dropout, norm_groups))
                c = ch * ch_mult[level]
                if resolution in attn_resolutions:
                    stage.attn.append(AttnBlock(c, norm_groups))
            if level != 0:
                stage.upsample = Upsample(c, resamp_with_conv)
                resolution *= 2
            self.up.insert(0, stage)
        self.norm_out = nn.GroupNorm(norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, out_ch, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for i, block in enumerate(stage.block):
                h = block(h)
                if len(stage.attn):
                    h = stage.attn[i](h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _coders(ddconfig: Mapping[str, Any], double_z: bool) -> tuple[Encoder, Decoder]:
    """Both networks from one upstream `ddconfig`. Raises ValueError for an unsuitable double_z."""
    if bool(ddconfig.get("double_z", True)) != double_z:
        raise ValueError(f"this autoencoder needs double_z: {str(double_z).lower()}")
    shared = {k: v for k, v in ddconfig.items() if k not in ("double_z", "in_channels", "out_ch")}
    encoder = Encoder(**shared, in_channels=ddconfig["in_channels"], double_z=double_z)
    return encoder, Decoder(**shared, out_ch=ddconfig["out_ch"])


@dataclass(frozen=True)
class Quantized:
    """Nearest codewords: values (B, embed_dim, r, r), indices (B, r, r) int64, scalar loss."""

    values: torch.Tensor
    indices: torch.Tensor
    commit_loss: torch.Tensor


class Codebook(nn.Module):
    """Vector quantization (van den Oord et al. 2017): each latent pixel becomes its codeword."""

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta  # weight of the codebook's term in the loss
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def indices(self, z: torch.Tensor) -> torch.Tensor:
        """(B, D, r, r) -> (B, r, r) int64, one image at a time: distances are r * r * n_embed."""
        codes = self.embedding.weight  # (n_embed, D)
        found = []
        for pixels in z.flatten(2).transpose(1, 2):  # (r * r, D)
            # |z|^2 is the same for every code and left out.
            distance = codes.square().sum(1) - 2 * pixels @ codes.T
            found.append(distance.argmin(dim=1))
        return torch.stack(found).unflatten(1, z.shape[2:])

    def forward(self, z: torch.Tensor) -> Quantized:
        """Gradients pass straight through to z; the loss is eq. 3 of the paper without its decoder
        term, with beta on the codebook as the public models were trained."""
        indices = self.indices(z)
        codes = self.embedding(indices).permute(0, 3, 1, 2)
        loss = F.mse_loss(z, codes.detach()) + self.beta * F.mse_loss(codes, z.detach())
        return Quantized(z + (codes - z).detach(), indices, loss)


class VQAutoencoder(nn.Module):
    """Autoencoder with a codebook, as latent diffusion uses it.

    `encode` stops before the codebook, `decode` begins with it: the diffusion works on continuous
    latents. Raises ValueError if `ddconfig` does not fit.
    """

    def __init__(self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int):
        super().__init__()
        self.encoder, self.decoder = _coders(ddconfig, double_z=False)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) -> (B, embed_dim, r, r), not quantized."""
        return self.quant_conv(self.encoder(image))

    def latent(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The latents of images, as `encode` gives them; the noise of the KL autoencoder has no
        counterpart here."""
        return self.encode(image)

    def decode(self, z: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
        """(B, embed_dim, r, r) -> (B, 3, R, R)."""
        z = z if force_not_quantize else self.quantize(z).values
        return self.decoder(self.post_quant_conv(z))


@dataclass(frozen=True)
class DiagonalGaussian:
    """Posterior of the KL autoencoder: mean and clamped logvar, both (B, embed_dim, r, r)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def mode(self) -> torch.Tensor:
        """The latent of highest density: the mean."""
        return self.mean

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """A draw; noise is standard normal, shaped like the mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class KLAutoencoder(nn.Module):
    """Autoencoder with a Gaussian posterior. Raises ValueError if `ddconfig` does not fit."""

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int):
        super().__init__()
        self.encoder, self.decoder = _coders(ddconfig, double_z=True)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, image: torch.Tensor) -> DiagonalGaussian:
        """(B, 3, R, R) -> the posterior of its latent."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def latent(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """A draw of the posterior from `noise`, or its mode: (B, embed_dim, r, r)."""
        posterior = self.encode(image)
        return posterior.mode() if noise is None else posterior.sample(noise)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, embed_dim, r, r) -> (B, 3, R, R)."""
        return self.decoder(self.post_quant_conv(z))


def first_stage_from_upstream(config: Mapping[str, Any]) -> VQAutoencoder | KLAutoencoder:
    """Build from a public configuration {"target": class path, "params": {...}}.

    Raises ValueError for another class.
    """
    classes = {
        "VQModel": VQAutoencoder,
        "VQModelInterface": VQAutoencoder,
        "AutoencoderKL": KLAutoencoder,
    }
    target = config["target"].rpartition(".")[2]
    if target not in classes:
        raise ValueError(f"unknown first stage '{target}' (one of {', '.join(classes)})")
    params = {k: v for k, v in config["params"].items() if k not in TRAINING_ONLY}
    return classes[target](**params)


def decode_first_stage(
    first_stage: VQAutoencoder | KLAutoencoder, latent: torch.Tensor, scale_factor: float = 1.0
) -> torch.Tensor:
    """The diffusion's latent -> image around [-1, 1], not clamped."""
    return first_stage.decode(latent / scale_factor)

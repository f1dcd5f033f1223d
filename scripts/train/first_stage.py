"""Training of a small VQ first stage (Rombach et al. 2022, appendix G), without its adversary.

Two runs of the shared loop: a plain autoencoder first, then with the codebook, which starts as
latents that the encoder already gives, so that no code is dead from the beginning. Both see
quarters of the images: more steps in the same time, and all but one attention is convolution.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...models.autoencoder import VQAutoencoder
from ...models.checkpoint_files import State
from ..common.errors import ConfigError
from ..common.images import grid, to_uint8
from .loop import LoopSettings, fit, identity_of

PLAIN_SHARE = 0.35  # of the first stage's training: without the codebook
EDGE_WEIGHT = 0.5  # of the differences between neighbouring pixels, which keep outlines sharp
COLOUR_WEIGHT = 2.0  # of the means of 4 x 4 pixels: outlines alone come first, colours much later
HUE_WEIGHT = 6.0  # of their differences to grey: two latents of brightness leave one for all hues
CELLS = 24  # per standard deviation, where distinct latents are looked for
ENCODED_TOGETHER = 32


def reconstruction_loss(found: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels, of their differences to the next ones, of means of 4 x 4 and of hues."""
    error = found - image  # (B, 3, R, R); differences and means are linear
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    colours = F.avg_pool2d(error, 4)  # (B, 3, R/4, R/4)
    hues = colours - colours.mean(dim=1, keepdim=True)
    coarse = COLOUR_WEIGHT * colours.abs().mean() + HUE_WEIGHT * hues.abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges + coarse


def _pixels(images: torch.Tensor, index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (N, 3, R, R) -> (len(index), 3, R, R) in [-1, 1]."""
    x = images[index].to(device).float() / 127.5 - 1
    return x.to(memory_format=torch.channels_last)


def _loss(
    model: VQAutoencoder,
    images: torch.Tensor,
    batch: int,
    codebook: bool,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    index = torch.randint(0, len(images), (batch,), generator=generator)
    x = _pixels(images, index, device)
    side = x.shape[2] // 2
    top, left = torch.randint(0, side + 1, (2,), generator=generator).tolist()
    x = x[:, :, top : top + side, left : left + side]
    z = model.encode(x)
    if not codebook:
        return reconstruction_loss(model.decode(z, force_not_quantize=True), x)
    quantized = model.quantize(z)
    found = model.decode(quantized.values, force_not_quantize=True)
    return reconstruction_loss(found, x) + quantized.commit_loss


@torch.no_grad()
def encode_all(model: VQAutoencoder, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Latents of all images, (N, D, r, r) float32 on the CPU, not scaled."""
    order = torch.arange(len(images))
    return torch.cat(
        [model.encode(_pixels(images, i, device)).cpu() for i in order.split(ENCODED_TOGETHER)]
    )


@torch.no_grad()
def start_codebook(model: VQAutoencoder, latents: torch.Tensor, seed: int) -> None:
    """Set the codes to latents (N, D, r, r) spread over where there are any.

    Backgrounds repeat one latent a thousand times: of each small cell one latent is eligible.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = latents.movedim(1, -1).flatten(0, 2)  # (N * r * r, D)
    pixels = pixels[torch.randperm(len(pixels), generator=generator)]
    cells = (pixels / pixels.std() * CELLS).round()
    _, cell = torch.unique(cells, dim=0, return_inverse=True)
    first = torch.full((int(cell.max()) + 1,), len(pixels)).scatter_reduce_(
        0, cell, torch.arange(len(pixels)), "amin"
    )
    chosen = pixels[first.sort().values]
    codes = model.quantize.embedding.weight
    if len(chosen) < len(codes):
        found, codes = len(chosen), len(codes)
        raise ConfigError(
            f"the images have {found} distinct latents, too few for the {codes} codes of "
            "model.first_stage.params.n_embed; give more images or fewer codes"
        )
    codes.copy_(chosen[: len(codes)])


def train_first_stage(
    model: VQAutoencoder,
    images: torch.Tensor,
    settings: LoopSettings,
    out: Path,
    device: torch.device,
    info: dict[str, Any],
) -> None:
    """Train `model` in place, (N, 3, R, R) uint8 images; it ends with the averaged weights.

    OUT/autoencoder and OUT/first_stage receive what `fit` writes.
    """

    def draw(ema: State, codebook: bool) -> np.ndarray:
        """Images above their reconstructions."""
        raw = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(ema)
        x = _pixels(images, torch.linspace(0, len(images) - 1, 16).long(), device)
        with torch.no_grad():
            found = model.decode(model.encode(x), force_not_quantize=not codebook)
        model.load_state_dict(raw)
        return grid(to_uint8(torch.cat([x, found])).numpy(), 16)

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    identity = identity_of(images, sorted(shapes.items()))
    for name, share, codebook in (
        ("autoencoder", PLAIN_SHARE, False),
        ("first_stage", 1 - PLAIN_SHARE, True),
    ):
        if not codebook and (out / "first_stage" / "state.pt").exists():
            continue  # the codebook's run has begun: other lengths of a resumed run change it alone
        minutes = None if settings.minutes is None else share * settings.minutes
        iterations = max(round(share * settings.iterations), 1)
        part = replace(settings, iterations=iterations, minutes=minutes)
        if codebook and not (out / name / "state.pt").exists():
            some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1024]
            start_codebook(model, encode_all(model, images[some], device), settings.seed)
        loss = partial(_loss, model, images, settings.batch_size, codebook, device)
        picture = partial(draw, codebook=codebook)
        ema = fit(model, loss, part, out / name, device, info, picture, identity=identity)
        model.load_state_dict(ema)

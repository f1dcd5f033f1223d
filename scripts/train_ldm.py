"""Train a class-conditional latent diffusion model: VQ first stage, then its denoiser.

    python scripts/train_ldm.py --config configs/emoji64.yaml --data DATA.npz --out runs/train

DATA.npz holds x (N, H, W, 3) uint8 and y (N,) class numbers. Architectures and schedule are those
of the configuration. Writes OUT/model.pt, which sample_diffusion.py reads (--ckpt): the averaged
weights of both in float16, names as in latent diffusion's files. OUT/autoencoder,
OUT/first_stage and OUT/denoiser hold what the loop writes: the same command continues where a
killed run stopped. The latents are computed once (OUT/latents.pt).

--warm-start MODEL takes a file of this script or of latent diffusion instead of random weights: its
first stage stays as it is, its denoiser and its embedder are trained further.

Classes are drawn evenly; a tenth of the labels is replaced by the null class for classifier-free
guidance (Ho & Salimans 2022, algorithm 1).
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
from pathlib import Path

# isort: split
import numpy as np
import torch
from torch import nn

from tinydm.models.attention import SpatialTransformer
from tinydm.models.autoencoder import VQAutoencoder, first_stage_from_upstream
from tinydm.models.checkpoint import load_into, load_state_dict, sha256_of
from tinydm.models.checkpoint_files import State
from tinydm.models.conditioning import ClassEmbedder
from tinydm.models.ldm_unet import LDMUNet, ResBlock
from tinydm.models.pipeline import build_pipeline, sampling_plan
from tinydm.scripts.common.arrays import opened
from tinydm.scripts.common.errors import ConfigError, ImageError
from tinydm.scripts.common.files import refuse_overwriting, remove_stale, save_tensors
from tinydm.scripts.common.images import grid, load_images, to_uint8
from tinydm.scripts.experiment.assembly import build_checked
from tinydm.scripts.experiment.cli import add_config, input_path, make_parser, output_folder
from tinydm.scripts.experiment.config import Config, load_config
from tinydm.scripts.experiment.config_sections import number_of_classes
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.train.diffusion import eps_loss
from tinydm.scripts.train.first_stage import encode_all, train_first_stage
from tinydm.scripts.train.loop import (
    add_loop_options,
    fit,
    identity_of,
    profits_from_bfloat16,
    read_state,
    settings_of,
)

FIRST_STAGE = "first_stage_"
NULL_SHARE = 0.1  # of the labels
GRID_PER_CLASS = 6


class ConditionalDenoiser(nn.Module):
    """Denoiser and class embedder under the names of latent diffusion's files."""

    def __init__(self, denoiser: LDMUNet, embedder: ClassEmbedder):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = denoiser
        self.cond_stage_model = embedder

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model.diffusion_model(x, t, context=self.cond_stage_model(labels))


def start_residuals_at_zero(denoiser: LDMUNet) -> None:
    """The last layer of each residual branch and of the network, as upstream starts them."""
    last = [denoiser.out[-1]]
    for module in denoiser.modules():
        if isinstance(module, ResBlock):
            last.append(module.out_layers[-1])
        elif isinstance(module, SpatialTransformer):
            last.append(module.proj_out)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config(parser, options=())
    parser.add_argument(
        "--data", type=input_path, required=True, help=".npz with x (N,H,W,3) uint8 and y (N,)"
    )
    parser.add_argument("--out", type=output_folder, required=True, help="run folder")
    parser.add_argument("--warm-start", type=input_path, metavar="MODEL", help="file to start from")
    often = {"save_every": 200, "grid_every": 1000}
    add_loop_options(parser, iterations=30000, batch_size=32, lr=1e-3, **often)
    add_loop_options(
        parser, FIRST_STAGE, iterations=8000, batch_size=8, lr=2e-3, warmup=50, ema=0.99, **often
    )
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if args.warm_start and name.startswith(FIRST_STAGE) and value != parser.get_default(name):
            option = name.replace("_", "-")
            parser.error(f"--{option}: --warm-start keeps the first stage as it is; leave it out")
    return args


def read_labels(source: str, count: int, classes: int) -> torch.Tensor:
    """y of the .npz, (N,) int64. Raises ImageError."""
    with opened(source, ImageError) as archive:
        y = archive.read("y", most=8 * count + 8)
    if y.dtype.kind not in "iu":
        raise ImageError(f"{source}: y is {y.dtype}, not class numbers")
    y = torch.from_numpy(y.astype(np.int64))
    if y.shape != (count,) or not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ImageError(f"{source}: y must be {count} class numbers within 0..{classes - 1}")
    if len(torch.unique(y)) < classes:
        raise ImageError(f"{source}: y does not hold each of the {classes} classes")
    return y


class Classes:
    """Draws a class evenly, then one of its images; then drops labels."""

    def __init__(self, labels: torch.Tensor, classes: int):
        self.order = labels.argsort(stable=True)  # images, class by class
        self.sizes = torch.bincount(labels, minlength=classes)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.null = classes

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of images and their labels, (batch,) each; the null class is the last one."""
        labels = torch.randint(0, len(self.sizes), (batch,), generator=generator)
        place = torch.rand(batch, generator=generator) * self.sizes[labels]
        index = self.order[self.starts[labels] + place.long()]
        dropped = torch.rand(batch, generator=generator) < NULL_SHARE
        return index, labels.masked_fill(dropped, self.null)


def load_both(first_stage: VQAutoencoder, model: ConditionalDenoiser, source: str) -> None:
    """The weights of `source` into both. Raises CheckpointError."""
    load_into(first_stage, load_state_dict(source, prefix="first_stage_model"), source)
    state = load_state_dict(source)
    parts = ("model.diffusion_model.", "cond_stage_model.")
    load_into(model, {n: v for n, v in state.items() if n.startswith(parts)}, source)


def latents_of(
    first_stage: VQAutoencoder,
    images: torch.Tensor,
    out: Path,
    trained: str | Path,
    device: torch.device,
) -> torch.Tensor:
    """Latents of all images, from OUT/latents.pt if they are of these and of the first stage of
    `trained`."""
    path, of = out / "latents.pt", {"first_stage": sha256_of(trained), "data": identity_of(images)}
    if path.exists():
        saved = read_state(path)
        if {name: saved.get(name) for name in of} == of:
            return saved["latents"]
    latents = encode_all(first_stage, images, device)
    save_tensors(path, of | {"latents": latents})
    return latents


def class_grid(
    config: Config, model: ConditionalDenoiser, first_stage: VQAutoencoder, scale: float
) -> np.ndarray:
    """One row for each class, with the configuration's sampler and guidance."""
    count = model.cond_stage_model.null_class
    pipeline = build_pipeline(
        config.model.arch,
        config.model.params,
        vars(config.schedule),
        vars(config.sampler),
        first_stage=first_stage,
        embedder=model.cond_stage_model,
        scale_factor=scale,
    )
    classes = [c for c in range(count) for _ in range(GRID_PER_CLASS)]
    device = next(model.parameters()).device
    denoiser = model.model.diffusion_model
    with torch.inference_mode():
        x = pipeline.sample(
            denoiser, range(len(classes)), config.sampling.seed, classes, device=device
        )
    return grid(to_uint8(x, truncate=True).numpy(), 2 * GRID_PER_CLASS)


def write_model(path: Path, first_stage: VQAutoencoder, trained: State, scale: float) -> None:
    """Everything in one file, float16 as far as it holds weights."""
    state = {f"first_stage_model.{n}": v for n, v in first_stage.state_dict().items()} | trained
    halves = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    save_tensors(path, {"state_dict": halves | {"scale_factor": torch.tensor(scale)}})


def build(config: Config, device: torch.device) -> tuple[VQAutoencoder, ConditionalDenoiser]:
    """Both networks, not trained. Raises ConfigError for a configuration without them."""
    model = config.model
    if model.first_stage is None or model.conditioning is None or model.conditioning.prompts:
        raise ConfigError(f"{config.name}: model.first_stage and conditioning.n_classes are needed")
    first_stage = build_checked(
        f"{config.name}: model.first_stage cannot be built",
        lambda: first_stage_from_upstream(vars(model.first_stage)),
    )
    if not isinstance(first_stage, VQAutoencoder):
        raise ConfigError(f"{config.name}: only VQ first stages are trained here")
    denoiser = build_checked(
        f"{config.name}: model.params build no denoiser",
        lambda: LDMUNet.from_upstream(model.params),
    )
    start_residuals_at_zero(denoiser)
    embedder = ClassEmbedder(model.conditioning.n_classes, model.conditioning.embed_dim)
    both = ConditionalDenoiser(denoiser, embedder)
    return tuple(m.to(device, memory_format=torch.channels_last) for m in (first_stage, both))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config, device = load_config(args.config, args.overrides), resolve_device(args.device)
    out, settings = Path(args.out), settings_of(args)
    refuse_overwriting("--out", out / "model.pt", args.warm_start)
    torch.manual_seed(args.seed)
    remove_stale(out)
    first_stage, model = build(config, device)
    images = load_images(args.data, config.model.first_stage.params["ddconfig"]["resolution"])
    count = number_of_classes(config.model)
    labels = read_labels(args.data, len(images), count)
    classes = Classes(labels, count)
    info = {"config": config.name, "data": Path(args.data).name}
    if args.warm_start:
        load_both(first_stage, model, args.warm_start)
        info["warm_start"] = Path(args.warm_start).name
    else:
        train_first_stage(first_stage, images, settings_of(args, FIRST_STAGE), out, device, info)
    first_stage.eval().requires_grad_(False)
    trained = args.warm_start or out / "first_stage" / "ema.pt"
    latents = latents_of(first_stage, images, out, trained, device)  # (N, D, r, r)
    scale = 1 / float(latents.std())
    sampler = config.sampler
    _, table = sampling_plan(sampler.name, sampler.steps, sampler.skip, **vars(config.schedule))
    abar = torch.from_numpy(table.astype(np.float32)).to(device)
    bfloat16 = profits_from_bfloat16(device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        index, drawn = classes.draw(settings.batch_size, generator)
        x0, given = scale * latents[index].to(device), drawn.to(device)
        return eps_loss(lambda x, t: model(x, t, given), x0, abar, generator, bfloat16)

    def draw(ema: State) -> np.ndarray:
        write_model(out / "model.pt", first_stage, ema, scale)
        _, averaged = build(config, device)
        averaged.load_state_dict(ema)
        return class_grid(config, averaged.eval(), first_stage, scale)

    info |= {"scale_factor": scale, "null_share": NULL_SHARE}
    warm = bool(args.warm_start)
    identity = identity_of(latents, config.model.params, labels.tolist())
    place = (out / "denoiser", device, info, draw)
    ema = fit(model, loss, settings, *place, identity=identity, warm=warm)
    write_model(out / "model.pt", first_stage, ema, scale)
    print(f"{out / 'model.pt'}: {(out / 'model.pt').stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    run(main, less="--batch-size 8")

"""Train a pixel-space DDIM/DDPM denoiser on any image folder or .npz.

    python scripts/train_ddim.py --data DATA --out runs/train --iterations 20000 \
        --set ch=32 norm_groups=8

Writes OUT/ema.pt (plain state dict of the EMA weights, which sample_diffusion.py reads),
OUT/state.pt (everything a resumed run needs), OUT/training.json and OUT/grid.png (samples).
The same command continues where a killed run stopped. --minutes ends a run by its training time.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
from pathlib import Path
from typing import Any

# isort: split
import numpy as np
import torch

from tinydm.models import samplers, schedule
from tinydm.models.checkpoint import load_into, load_state_dict
from tinydm.models.checkpoint_files import State
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import refuse_overwriting
from tinydm.scripts.common.images import grid, load_images, to_uint8
from tinydm.scripts.common.schema import check_arguments, read_value
from tinydm.scripts.experiment.assembly import build_checked
from tinydm.scripts.experiment.cli import add_device, input_path, make_parser, output_folder
from tinydm.scripts.experiment.config_sections import check_image_size, check_sizes
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.train.diffusion import eps_loss
from tinydm.scripts.train.loop import (
    add_loop_options,
    fit,
    identity_of,
    profits_from_bfloat16,
    settings_of,
)


def read_params(pairs: list[str]) -> dict[str, Any]:
    """key=value pairs of the denoiser's arguments. Raises ConfigError."""
    tree = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: must be key=value")
        tree[key] = read_value(text, f"--set {key}")
    check_arguments(DDIMUNet, tree, lambda key: "--set", (), ())
    return tree


def build(params: dict[str, Any]) -> DDIMUNet:
    """Raises ConfigError for parameters that make no denoiser of RGB images."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"--set: {key.rpartition('.')[2]} {why}")

    check_sizes(params, ("--set",), refuse)
    check_image_size(params, refuse)
    model = build_checked("--set: these build no denoiser", lambda: DDIMUNet(**params))
    if (model.in_channels, model.conv_out.out_channels) != (3, 3):
        raise ConfigError("--set: in_channels and out_ch must be 3, images are read as RGB")
    return model


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data", type=input_path, required=True, help="folder of images, or .npz with x (N,H,W,3)"
    )
    parser.add_argument("--out", type=output_folder, required=True, help="run folder")
    add_loop_options(parser, iterations=20000)
    parser.add_argument(
        "--warm-start", type=input_path, metavar="FILE", help="state dict to start from"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="model params")
    parser.add_argument("--no-flip", action="store_true", help="no random horizontal flips")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, settings = resolve_device(args.device), settings_of(args)
    params = read_params(args.set)
    refuse_overwriting("--out", Path(args.out) / "ema.pt", args.warm_start)
    torch.manual_seed(args.seed)
    model = build(params).to(device, memory_format=torch.channels_last)
    if args.warm_start:
        load_into(model, load_state_dict(args.warm_start), args.warm_start)
    images = load_images(args.data, model.image_size)  # (N, 3, R, R) uint8
    table = schedule.alphas_cumprod(schedule.make_betas())
    abar = torch.from_numpy(table).to(device)
    step_model = torch.compile(model) if args.compile else model
    bfloat16 = profits_from_bfloat16(device) and not args.float32

    def loss(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(0, len(images), (settings.batch_size,), generator=generator)
        x0 = images[index].to(device).float() / 127.5 - 1
        if not args.no_flip:
            flip = torch.rand(settings.batch_size, generator=generator) < 0.5
            x0[flip] = x0[flip].flip(3)
        return eps_loss(step_model, x0, abar, generator, bfloat16)

    def draw(ema: State) -> np.ndarray:
        ema_model = DDIMUNet(**params).to(device).eval()
        ema_model.load_state_dict(ema)
        shape = (16, model.in_channels, model.image_size, model.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1234)).to(device)
        steps = schedule.sampling_timesteps(50, "quad")
        with torch.inference_mode():
            x = samplers.ddim(ema_model, noise, steps, table, clip_denoised=True)
        return grid(to_uint8(x).numpy(), 8)

    info = {"params": params, "warm_start": args.warm_start, "data": Path(args.data).name}
    identity = identity_of(images, sorted(params.items()), args.no_flip)
    place = (Path(args.out), device, info, draw)
    fit(model, loss, settings, *place, identity=identity, warm=bool(args.warm_start))


if __name__ == "__main__":
    run(main, less="--batch-size 8")

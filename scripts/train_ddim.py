"""Train a pixel-space DDIM/DDPM denoiser on any image folder or .npz.

    python scripts/train_ddim.py --data DATA --out runs/train --iterations 20000 \
        --set ch=32 norm_groups=8

Writes OUT/ema.pt (plain state dict of the EMA weights, which sample_diffusion.py reads),
OUT/state.pt (everything a resumed run needs), OUT/training.json and OUT/grid.png (samples).
The same command continues where a killed run stopped.

The loss is the simple eps loss (Ho et al. 2020, eq. 14) with antithetic timesteps.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import samplers, schedule  # noqa: E402
from models.checkpoint import CheckpointError, load_into, load_state_dict  # noqa: E402
from models.ddim_unet import DDIMUNet  # noqa: E402
from models.samplers import SamplingError  # noqa: E402
from scripts.common.cli import make_parser, run  # noqa: E402
from scripts.common.files import save_tensors, write_json  # noqa: E402
from scripts.common.images import grid, load_images, to_uint8, write_png  # noqa: E402
from scripts.common.strict import ConfigError, check_arguments, read_value  # noqa: E402


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine to zero at the last iteration."""
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * min(step / args.iterations, 1.0)))


def antithetic_timesteps(batch: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pairs t and T - 1 - t, (batch,): lower variance of the loss at the same cost."""
    t = torch.randint(0, count, (batch // 2 + 1,), generator=generator)
    return torch.cat([t, count - 1 - t])[:batch]


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


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """The state of an interrupted run. Raises CheckpointError."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # torch has many exceptions for a damaged file
        raise CheckpointError(f"{path}: damaged; delete it to start anew") from error


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of images, or .npz with x (N,H,W,3)")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--iterations", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-start", help="state dict to start from")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="model params")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--grid-every", type=int, default=2000)
    parser.add_argument("--no-flip", action="store_true", help="no random horizontal flips")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    out, device = Path(args.out), torch.device(args.device)
    params = read_params(args.set)
    torch.manual_seed(args.seed)
    model = DDIMUNet(**params).to(device, memory_format=torch.channels_last)
    if args.warm_start:
        load_into(model, load_state_dict(args.warm_start), args.warm_start)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    step, seconds, running = 0, 0.0, float("nan")
    if (out / "state.pt").exists():
        state = read_state(out / "state.pt", device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step = state["ema"], state["step"]
        seconds, running = state["seconds"], state["loss"]
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_rng"].cpu())
        print(f"resumed at iteration {step}")

    images = load_images(args.data, model.image_size)  # (N, 3, R, R) uint8
    table = schedule.alphas_cumprod(schedule.make_betas())
    abar = torch.from_numpy(table).to(device)
    step_model = torch.compile(model) if args.compile else model

    def save() -> None:
        save_tensors(
            out / "state.pt",
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step,
                "seconds": seconds,
                "loss": running,
                "generator": generator.get_state(),
                "torch_rng": torch.get_rng_state(),
            },
        )
        save_tensors(out / "ema.pt", {k: v.contiguous().cpu() for k, v in ema.items()})
        info = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "params": params,
            "iterations": step,
            "images_seen": step * args.batch_size,
            "running_loss": running,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **{k: getattr(args, k) for k in ("batch_size", "lr", "ema", "seed", "warm_start")},
        }
        write_json(out / "training.json", info | {"data": Path(args.data).name})

    def sample_grid() -> None:
        ema_model = DDIMUNet(**params).to(device).eval()
        ema_model.load_state_dict(ema)
        noise = torch.randn(
            (16, model.in_channels, model.image_size, model.image_size),
            generator=torch.Generator().manual_seed(1234),
        ).to(device)
        steps = schedule.sampling_timesteps(50, "quad")
        with torch.inference_mode():
            x = samplers.ddim(ema_model, noise, steps, table, clip_denoised=True)
        write_png(out / "grid.png", grid(to_uint8(x).numpy(), 8))

    model.train()
    bar = tqdm(total=args.iterations, initial=step, unit="it", mininterval=5)
    while step < args.iterations:
        began = time.perf_counter()
        index = torch.randint(0, len(images), (args.batch_size,), generator=generator)
        x0 = images[index].to(device).float() / 127.5 - 1
        if not args.no_flip:
            flip = torch.rand(args.batch_size, generator=generator) < 0.5
            x0[flip] = x0[flip].flip(3)
        t = antithetic_timesteps(args.batch_size, len(abar), generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        a = abar[t][:, None, None, None]
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=not args.float32):
            eps = step_model(x_t, t)
        loss = F.mse_loss(eps.float(), noise)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        if args.warm_start:
            decay = args.ema
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        running = loss.item() if math.isnan(running) else 0.99 * running + 0.01 * loss.item()
        if not math.isfinite(running):
            raise SamplingError(f"iteration {step}: the loss is not finite; lower --lr, resume")
        step, seconds = step + 1, seconds + time.perf_counter() - began
        bar.update()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step % args.save_every == 0 or step == args.iterations:
            save()
        if step % args.grid_every == 0 or step == args.iterations:
            sample_grid()
    print(f"{out / 'ema.pt'}: {step} iterations, loss {running:.5f}, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)

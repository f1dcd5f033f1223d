"""Sample images with a full-precision or a quantized denoiser.

    python sample_diffusion.py --config configs/emoji32.yaml --out runs/emoji32/images-fp
    python sample_diffusion.py --config configs/emoji32.yaml \\
        --quantized runs/emoji32/quantized.safetensors --out runs/emoji32/images-w4a8
    torchrun --nproc-per-node 8 sample_diffusion.py --config ... --out ...

OUT receives 000000.png, 000001.png, ... and nothing else. Beside it lie OUT.config.yaml,
OUT.report.json, OUT.log.txt and OUT.identity.json. The same command continues a killed run: whole
files are kept, missing ones are made. An image depends on the seed and its number only, not on the
count, the batch size, the number of processes or a resume.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import argparse
import dataclasses
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from quant.packed import PackedFileError, read_metadata
from scripts.common.backend import Backend, add_backend, check_backend, compiled_code
from scripts.common.cli import add_config, add_out, make_parser, resolve_device, run
from scripts.common.config import (
    Config,
    calls_per_image,
    load_config,
    parse_config,
    resolved_yaml,
)
from scripts.common.files import write_json, write_text
from scripts.common.images import grid, is_whole_png, to_uint8, write_png
from scripts.common.processes import rank_and_world
from scripts.common.runs import beside, claim, locked, missing_images, png_name, surplus_images
from scripts.common.strict import ConfigError
from scripts.common.wiring import Assembly, assemble

GRID_IMAGES, GRID_COLUMNS = 64, 8


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config(parser, required=False)
    add_out(parser, "folder of the images")
    parser.add_argument("--quantized", metavar="FILE", help="quantized.safetensors of calibrate.py")
    add_backend(parser)
    parser.add_argument("--overwrite", action="store_true", help="remove another run's images")
    parser.add_argument("--grid", metavar="FILE", help="also write one picture of the first images")
    return parser.parse_args(argv)


def read_config(args: argparse.Namespace) -> Config:
    """--config, or what the quantized file holds. Raises ConfigError or PackedFileError."""
    if args.config is not None:
        return load_config(args.config, args.overrides)
    if args.quantized is None:
        raise ConfigError("give --config FILE, or --quantized FILE, which holds its own")
    text = read_metadata(args.quantized).get("config")
    if text is None:
        raise PackedFileError(f"{args.quantized}: holds no configuration; give --config FILE")
    return parse_config(text, args.quantized, args.overrides)


def identity_of(config: Config, assembly: Assembly, backend: str | None) -> dict[str, Any]:
    """Everything that an image depends on besides its number."""
    model, sampling = dataclasses.asdict(config.model), config.sampling
    for place in (model, model["first_stage"] or {}):  # names of files say nothing
        place.pop("checkpoint", None)
        place.pop("url", None)
    return {
        "model": model | {"scale_factor": assembly.pipeline.scale_factor},
        "files_sha256": assembly.sources,
        "schedule": vars(config.schedule),
        "sampler": vars(config.sampler),
        "seed": sampling.seed,
        "classes": None if sampling.classes is None else list(sampling.classes),
        "micro_batch": sampling.micro_batch,
        "backend": backend,
    }


def make_images(
    config: Config,
    assembly: Assembly,
    indices: list[int],
    folder: Path,
    device: torch.device,
    quiet: bool,
) -> None:
    """Sample `indices` in batches and write each image as soon as it is there."""
    sampling = config.sampling
    truncate = config.model.arch != "ddim_unet"  # as each family's own scripts do
    with tqdm(total=len(indices), unit="image", disable=quiet, delay=1) as bar:
        for start in range(0, len(indices), sampling.batch_size):
            batch = indices[start : start + sampling.batch_size]
            x = assembly.pipeline.sample(
                assembly.denoiser, batch, sampling.seed, sampling.classes, device=device
            )
            for index, image in zip(batch, to_uint8(x, truncate).numpy(), strict=True):
                write_png(folder / png_name(index), image)
            bar.update(len(batch))


def write_grid(folder: Path, count: int, file: str) -> None:
    """The first images that are there, in one picture."""
    paths = [folder / png_name(index) for index in range(min(count, GRID_IMAGES))]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths if is_whole_png(path)]
    if images:
        write_png(file, grid(np.stack(images), GRID_COLUMNS))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    rank, world = rank_and_world()
    config, device = read_config(args), resolve_device(args.device)
    folder = Path(args.out)
    check_paths(args, folder)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:  # the compiler runs while the file is read
        compiling = pool.submit(compiled_code, rank == 0) if args.compile else None
        chosen = Backend(args.backend, None if compiling is None else compiling.result)
        assembly = assemble(config, args.quantized, chosen.name, device, chosen.code)
    backend = chosen.label if args.quantized else None
    loaded = time.perf_counter() - began
    with locked(beside(folder, "lock")) if rank == 0 else nullcontext():
        claim(folder, identity_of(config, assembly, backend), args.overwrite, rank)
        if rank != 0:
            missing = missing_images(folder, config.sampling.count)
            make_images(config, assembly, share(missing, rank, world), folder, device, quiet=True)
            return
        fill(args, config, assembly, backend, device, world, loaded)


def share(missing: list[int], rank: int, world: int) -> list[int]:
    """By number, not by place in the list: the ranks list while others already write."""
    return [index for index in missing if index % world == rank]


def fill(
    args: argparse.Namespace,
    config: Config,
    assembly: Assembly,
    backend: str | None,
    device: torch.device,
    world: int,
    loaded: float,
) -> None:
    """What rank 0 does: its images, the log and the report. loaded: seconds that loading took."""
    folder, sampling, log = Path(args.out), config.sampling, []

    def say(line: str) -> None:
        log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        print(line, flush=True)

    if any(str(getattr(o, "key", o)).startswith("quant.") for o in args.overrides):
        say("note: quant.* changes nothing here; calibrate.py uses it")
    missing = missing_images(folder, sampling.count)
    todo, found = share(missing, 0, world), sampling.count - len(missing)
    write_text(beside(folder, "config.yaml"), resolved_yaml(config))
    if found:
        say(f"{folder}: {found} of {sampling.count} images are there already")
    padded = not getattr(assembly.denoiser, "independent_rows", False)
    if padded and 0 < min(len(todo), sampling.batch_size) < sampling.micro_batch:
        rows = sampling.micro_batch
        say(
            f"note: each network call is padded to {rows} rows; fewer images take as long, unless "
            "--set sampling.micro_batch=N, which changes the last bits"
        )
    began = time.perf_counter()
    make_images(config, assembly, todo, folder, device, quiet=False)
    seconds = time.perf_counter() - began
    if args.grid is not None:
        write_grid(folder, sampling.count, args.grid)
    if surplus := surplus_images(folder, sampling.count):
        say(f"note: {folder} holds {surplus} more PNG files, which a score would count")
    rate = f", {len(todo) / seconds:.3g} images/s" if todo else ""
    by = f" by the first of {world} processes" if world > 1 else ""
    say(f"{folder}: {len(todo)} images made{by} in {seconds:.1f} s{rate}")
    with beside(folder, "log.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in log)
    note = beside(folder, "report.json")
    if todo or not note.exists():  # killed between the last image and its report
        report = report_of(config, assembly, backend, device, world)
        report["images"] = {"count": sampling.count, "made": len(todo), "found": found}
        report["seconds"] = {"load": loaded, "sample": seconds}
        report["images_per_second"] = len(todo) / seconds if todo else None
        write_json(note, report)


def check_paths(args: argparse.Namespace, folder: Path) -> None:
    """Raises ConfigError for outputs that cannot be what they should be."""
    if args.backend != "fake" and args.quantized is None:
        raise ConfigError(f"--backend {args.backend}: needs --quantized FILE")
    check_backend(args)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file, not a folder")
    if args.grid is not None and Path(args.grid).resolve().parent == folder.resolve():
        raise ConfigError(f"--grid {args.grid}: must not lie among the images")


def report_of(
    config: Config, assembly: Assembly, backend: str | None, device: torch.device, world: int
) -> dict[str, Any]:
    """What was run; seconds and images are those of this process."""
    return {
        "name": config.name,
        "backend": backend or "full precision",
        "seed": config.sampling.seed,
        "calls_per_image": calls_per_image(config),
        "files_sha256": assembly.sources,
        "files_bytes": assembly.bytes,
        "batch_size": config.sampling.batch_size,
        "micro_batch": config.sampling.micro_batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": world,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


if __name__ == "__main__":
    run(main)

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

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from tinydm.quant.runtime.packed_file import PackedFileError, read_metadata
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import check_output
from tinydm.scripts.experiment.assembly import assemble, unread_note
from tinydm.scripts.experiment.backend import (
    Backend,
    add_backend,
    check_backend,
    compiled_code,
    simulated_note,
    slow_backend,
)
from tinydm.scripts.experiment.cli import (
    QUANT_OPTIONS,
    SAMPLER_OPTIONS,
    SAMPLING_OPTIONS,
    add_config,
    add_out,
    input_path,
    make_parser,
)
from tinydm.scripts.experiment.config import (
    Config,
    Override,
    keep_written,
    load_config,
    parse_config,
)
from tinydm.scripts.experiment.device_defaults import SAMPLED, device_memory
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.experiment.folder_config import config_of_folder
from tinydm.scripts.experiment.precision import (
    PRECISIONS,
    add_precision,
    check_precision,
    precision_note,
)
from tinydm.scripts.experiment.processes import rank_and_world
from tinydm.scripts.experiment.runs import beside, claim, locked
from tinydm.scripts.experiment.sampling_run import (
    SamplingRun,
    check_channels,
    check_there,
    fill,
    make_images,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config(parser, (*SAMPLER_OPTIONS, *SAMPLING_OPTIONS), required=False, hidden=QUANT_OPTIONS)
    add_out(parser, "folder of the images")
    parser.add_argument(
        "--quantized",
        type=input_path,
        metavar="FILE",
        help="quantized.safetensors of calibrate.py",
    )
    add_backend(parser)
    add_precision(parser)
    parser.add_argument("--overwrite", action="store_true", help="remove another run's images")
    parser.add_argument("--grid", metavar="FILE", help="also write one picture of the first images")
    return parser.parse_args(argv)


def read_config(args: argparse.Namespace, memory: float | None) -> Config:
    """--config, what the quantized file holds, or what a folder of diffusers needs. memory: GiB of
    a GPU. Raises ConfigError, PackedFileError or CheckpointError."""
    if args.config is not None:
        return load_config(args.config, args.overrides, memory)
    if args.quantized is None:
        if not any(getattr(o, "key", "") == "model.checkpoint" for o in args.overrides):
            raise ConfigError("give --config FILE, --quantized FILE or --ckpt FOLDER of diffusers")
        return config_of_folder(args.overrides, memory)
    text = read_metadata(args.quantized).get("config")
    if text is None:
        raise PackedFileError(f"{args.quantized}: holds no configuration; give --config FILE")
    # The rows of the device that it was calibrated on are not those of a GPU here.
    own = [] if memory is None else [f"{'.'.join(key)}=auto" for key in SAMPLED]
    return parse_config(text, args.quantized, [*own, *args.overrides], memory=memory)


def check_paths(args: argparse.Namespace, folder: Path) -> None:
    """Raises ConfigError for outputs that cannot be what they should be."""
    if args.backend != "fake" and args.quantized is None:
        raise ConfigError(f"--backend {args.backend}: needs --quantized FILE")
    if args.quantized is not None:
        check_backend(args)
    elif args.compile and args.precision != PRECISIONS[0]:
        raise ConfigError("--compile: computes in float32; leave --precision out")
    if args.grid is None:
        return
    if Path(args.grid).suffix.lower() != ".png" or Path(args.grid).is_dir():
        raise ConfigError(f"--grid {args.grid}: must be a file that ends in .png")
    check_output(args.grid)
    if os.path.dirname(os.path.realpath(args.grid)) == os.path.realpath(folder):
        raise ConfigError(f"--grid {args.grid}: must not lie among the images")


def idle_notes(overrides: Sequence[str | Override]) -> list[str]:
    """A line for each kind of key that was given and is of calibrations alone."""
    keys = [o.key if isinstance(o, Override) else o for o in overrides]
    kinds = {"quant.": "quant.*", "calibration.": "calibration.*", "model.bundle": "model.bundle"}
    given = [name for start, name in kinds.items() if any(k.startswith(start) for k in keys)]
    return [f"note: {name} changes nothing here; calibrate.py uses it" for name in given]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    rank, world = rank_and_world()
    device = resolve_device(args.device)
    config = read_config(args, device_memory(device))
    folder = Path(args.out)
    check_paths(args, folder)
    check_precision(args.precision, device, args.backend)
    ours = args.overwrite or beside(folder, "identity.json").exists()
    keep_written(beside(folder, "config.yaml"), config, args.config, ours)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:  # the compiler runs while the file is read
        compiling = pool.submit(compiled_code, rank == 0) if args.compile else None
        name = None if args.quantized is None else args.backend
        chosen = Backend(name, None if compiling is None else compiling.result)
        source = config, args.quantized, args.backend, device, chosen.code
        assembly = assemble(*source, precision=args.precision)
    backend = chosen.label
    loaded = time.perf_counter() - began
    made_of = config, assembly, folder, device, backend, args.precision
    sampling = SamplingRun(*made_of, rank, world)
    check_channels(sampling)
    with locked(beside(folder, "lock")) if rank == 0 else nullcontext():
        claim(folder, sampling.identity, args.overwrite, rank)
        if rank != 0:
            own = sampling.share(sampling.missing())
            make_images(sampling, own)
            check_there(sampling, own)
            return
        said = simulated_note(assembly.denoiser), precision_note(assembly.denoiser)
        said = (*said, unread_note(args.overrides, assembly.sources))
        notes = [note for note in said if note is not None]
        notes += idle_notes(args.overrides)
        note = slow_backend(args)
        if note is not None:
            notes.append(note)
        fill(sampling, loaded, notes, args.grid)


if __name__ == "__main__":
    run(main)

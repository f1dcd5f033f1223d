"""Quantize a full-precision checkpoint.

    python calibrate.py --config configs/emoji32.yaml --out runs/emoji32-w4a8
    python calibrate.py --config configs/emoji32.yaml --out runs/emoji32-w8a8 --weight_bit 8
    python calibrate.py --config configs/cifar10.yaml --out runs/cifar10-w4a8 --resume
    python calibrate.py --ckpt path/to/folder-of-diffusers --out runs/mine
    torchrun --nproc-per-node 8 calibrate.py --config configs/cifar10.yaml --out ...

A folder of diffusers needs no configuration: what is used is written to OUT/config.yaml.
OUT receives quantized.safetensors (the denoiser, packed), config.yaml, report.json (times,
errors, layer table), layers.txt and log.txt. calibration.pt holds finished phases while it runs:
--resume goes on after the last one, and gives the same file as an uninterrupted run. So does
torchrun, whose processes share the work.

Exit codes: 0 done, 2 bad input, 130 interrupted (resumable).
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
from pathlib import Path

from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.calibration_run import (
    LOCK,
    RESULT,
    CalibrationRun,
    calibrate_run,
    check_files,
    help_calibrate,
)
from tinydm.scripts.experiment.cli import (
    HOW_OPTIONS,
    QUANT_OPTIONS,
    SAMPLER_OPTIONS,
    WHAT_OPTIONS,
    add_config,
    add_out,
    make_parser,
    refuse_options,
)
from tinydm.scripts.experiment.config import Override, load_config
from tinydm.scripts.experiment.device_defaults import device_memory, for_calibration
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.experiment.folder_config import config_of_folder
from tinydm.scripts.experiment.processes import team_of_processes
from tinydm.scripts.experiment.runs import locked

# What the options of sampling are called here, where they would change nothing.
CALIBRATION_KEYS = {
    "sampling.count": "calibration.trajectories",
    "sampling.batch_size": "calibration.batch_size",
    "sampling.seed": "calibration.seed",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config(parser, (*SAMPLER_OPTIONS, *WHAT_OPTIONS, *QUANT_OPTIONS), required=False)
    refuse_options(parser, HOW_OPTIONS, CALIBRATION_KEYS)
    add_out(parser, "run folder")
    parser.add_argument("--resume", action="store_true", help="go on after the last phase")
    parser.add_argument("--overwrite", action="store_true", help="calibrate anew into OUT")
    parser.add_argument(
        "--bundle", action="store_true", help="the file also carries first stage, text towers, ..."
    )
    args = parser.parse_args(argv)
    if args.bundle:
        args.overrides = [*args.overrides, Override("model.bundle", "true", "--bundle")]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = resolve_device(args.device)
    memory = device_memory(device)
    if args.config is None:
        config = config_of_folder(args.overrides, memory)
    else:
        config = load_config(args.config, args.overrides, memory)
    config = for_calibration(config)
    folder = Path(args.out)
    assembly = assemble(config, device=device)
    with team_of_processes() as team:
        calibration = CalibrationRun(config, assembly, folder, device, team)
        if team.rank != 0:
            help_calibrate(calibration)
            return
        check_files(calibration, args.config, args.overwrite)
        with locked(folder / LOCK):
            lines = calibrate_run(calibration, resume=args.resume, overwrite=args.overwrite)
    if lines is None:
        print(f"{folder / RESULT}: is there already, from the same configuration and checkpoint")
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    run(main, again="the same command with --resume, and without --overwrite, continues")

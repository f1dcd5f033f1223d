"""Write a quantized denoiser as a file of ONNX, for other runtimes.

    python scripts/export.py runs/emoji32-w4a8 --format onnx
    python scripts/export.py runs/emoji32-w4a8/quantized.safetensors --out model.onnx \\
        --check onnxruntime

RUN is a run folder of calibrate.py, or its quantized.safetensors. --out is RUN/quantized.onnx by
default. Then each runtime of --check computes the calls of a short trajectory, and the
signal-to-noise ratio of all outputs to those of the fake backend is printed: at least 45 dB, or
what float rounding leaves (docs/export.md). One that is not installed is named. --images N also
samples the first N images of the run with each of them: at least 45 dB of PSNR to those of the fake
backend, or what float rounding leaves. Example inputs come from the pipeline, so that it needs what
sampling needs.

    pip install onnx onnxscript onnxruntime openvino

Exit codes: 0 done, 2 bad input or another output, 130 interrupted.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tinydm.models.checkpoint_files import is_out_of_memory
from tinydm.quant.backends.graph import as_graph
from tinydm.quant.runtime.packed_file import PackedFileError, read_metadata
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.common.files import refuse_overwriting
from tinydm.scripts.common.schema import printable
from tinydm.scripts.experiment.assembly import assemble, unread_note
from tinydm.scripts.experiment.calibration_run import RESULT
from tinydm.scripts.experiment.cli import (
    CHECKPOINT_OPTION,
    WHAT_OPTIONS,
    add_config,
    input_path,
    make_parser,
    output_file,
)
from tinydm.scripts.experiment.config import Config, checkpoints_of, load_config, parse_config
from tinydm.scripts.experiment.folder_config import config_of_folder
from tinydm.scripts.exporting.calls import (
    LOWEST,
    MARGIN,
    Call,
    decibels,
    few_steps,
    of_images,
    record_calls,
)
from tinydm.scripts.exporting.images import Images
from tinydm.scripts.exporting.onnx_file import ANY, OPSET, check_packages, write_onnx
from tinydm.scripts.exporting.runtimes import RUNTIMES, Inputs, not_installed, prepare


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "run", type=input_path, metavar="RUN", help="run folder, or its quantized.safetensors"
    )
    parser.add_argument("--format", default="onnx", choices=("onnx",), help="of the file")
    parser.add_argument(
        "--out", type=output_file(".onnx"), metavar="FILE", help="RUN/quantized.onnx by default"
    )
    parser.add_argument(
        "--check",
        metavar="NAMES",
        default=",".join(RUNTIMES),
        help=f"runtimes to check, {','.join(RUNTIMES)} by default, or none",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="also sample N images with each runtime and compare them, with all steps",
    )
    add_config(parser, (CHECKPOINT_OPTION, *WHAT_OPTIONS), required=False, device=False)
    args = parser.parse_args(argv)
    args.check = [] if args.check == "none" else args.check.split(",")
    for name in args.check:
        if name not in RUNTIMES:
            parser.error(f"--check {name}: is none of {', '.join(RUNTIMES)}, none")
    if args.images is not None and (args.images < 1 or not args.check):
        parser.error(f"--images {args.images}: give a number from 1 on, and no --check none")
    return args


def read_config(args: argparse.Namespace, file: Path) -> Config:
    """--config, what the quantized file holds (those of tinydm.calibrate hold none), or what the
    folder of --ckpt needs. Raises ConfigError, PackedFileError or CheckpointError."""
    if args.config is not None:
        return load_config(args.config, args.overrides)
    text = read_metadata(file).get("config")
    if text is None:
        if any(getattr(o, "key", "") == "model.checkpoint" for o in args.overrides):
            return config_of_folder(args.overrides)
        what = "holds no configuration; give --config FILE, or --ckpt FOLDER of diffusers"
        raise PackedFileError(f"{file}: {what}")
    return parse_config(text, str(file), args.overrides)


def check(runtime: str, path: Path, calls: list[Call]) -> str:
    """The line of a report. Raises RunError where the runtime computes something else."""
    absent = not_installed([runtime])
    if absent is not None:
        return f"{RUNTIMES[runtime]}: not checked, {absent}"
    compute: dict[int, Callable[[Inputs], np.ndarray]] = {}  # by the number of samples
    outputs, seconds = [], 0.0
    for call in calls:
        rows = len(call.x)
        try:
            if rows not in compute:
                compute[rows] = prepare(runtime, path, call.inputs(), torch.get_num_threads(), True)
            began = time.perf_counter()
            outputs.append(torch.from_numpy(compute[rows](call.inputs())))
        except Exception as error:  # a runtime's own kind
            if is_out_of_memory(error):
                raise
            what = f"{RUNTIMES[runtime]} does not run it with {rows} samples"
            raise RunError(f"{path}: {what}: {printable(error, 200)}") from error
        seconds += time.perf_counter() - began
    expected = [call.output for call in calls]
    found, lowest = decibels(torch.cat(outputs), torch.cat(expected)), LOWEST
    each = zip(map(decibels, outputs, expected), (float(call.t) for call in calls), strict=True)
    worst, t = min(each)
    line = f"{RUNTIMES[runtime]}: {found:.1f} dB to the fake backend over {len(calls)} calls, "
    line += f"{worst:.1f} dB in the worst of them (t = {t:g})"
    again = [call.output if call.again is None else call.again for call in calls]
    own = decibels(torch.cat(again), torch.cat(expected))
    if any(call.again is not None for call in calls):
        line += f"; float rounding alone moves the fake backend by {own:.1f} dB"
        lowest = min(LOWEST, own - MARGIN)
    line += f"; {1000 * seconds / len(calls):.1f} ms a call"
    if not found >= lowest:
        raise RunError(f"{path}: {line}; at least {lowest:.1f} dB are expected")
    return line


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_packages()
    source = Path(args.run)
    file = source / RESULT if source.is_dir() else source
    out = file.with_suffix(".onnx") if args.out is None else Path(args.out)
    refuse_overwriting("--out", out, file, args.config)
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder, not a file")
    whole = read_config(args, file)
    config = few_steps(whole)
    refuse_overwriting("--out", out, *checkpoints_of(config))
    assembly = assemble(config, file)
    if (note := unread_note(args.overrides, assembly.sources)) is not None:
        print(note)
    calls = record_calls(assembly, config.sampling.classes, one=not args.check)
    written = write_onnx(as_graph(assembly.denoiser), calls[0], out)
    inputs = ", ".join(f"{n} ({', '.join(map(str, s))})" for n, s in written.inputs.items())
    print(f"{out}: {written.bytes / 2**20:.3f} MiB, opset {OPSET}; inputs {inputs}")
    if written.inputs["x"][0] == ANY:
        calls.append(calls[0].of_rows([1, 0, 1]))
    for runtime in args.check:
        print(check(runtime, out, calls), flush=True)
    if args.images is not None:
        config = of_images(whole, args.images)
        images = Images(config, assemble(config, file), args.images)
        for runtime in args.check:
            print(images.check(runtime, out), flush=True)


if __name__ == "__main__":
    run(main, again="the same command begins anew")

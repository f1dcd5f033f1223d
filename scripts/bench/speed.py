"""Seconds, memory and file size of one denoiser call, full precision against quantized.

    python scripts/benchmark.py --speed --out runs/speed
    python scripts/benchmark.py --speed --configs configs/emoji32.yaml --batches 1,4 --threads 1 \\
        --variants fp32,fake-w4a8,int8-w4a8 --repeats 3 --out runs/speed-small    # under a minute

    python scripts/benchmark.py --speed --quantized runs/emoji32-w4a8/quantized.safetensors \\
        --variants fp32,int8-w4a8-compiled --peers onnxruntime,openvino --out runs/speed-peers

Architectures with random weights; with --quantized the checkpoint and what calibrate.py made of it,
and then the signal-to-noise ratio of eps over ten timesteps stands beside each time. --peers runs
the same float32 network in other runtimes, and quantized by their own tools. Every variant is timed
in turn with fp32 in one process, call by call, so that what else the machine does meets both. The
ratio is the median over the pairs of calls, with the quartiles: of seconds on the clock, and of CPU
time, which waiting for a busy core does not lengthen. Memory is that of a fresh process that loads
the variant and makes one call of the first batch size: at its peak, and afterwards.

OUT receives speed.json, speed.md and the quantized files in models/. The same command continues a
killed run; another processor or another --repeats measures anew. Use an idle machine.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile

from ...quant.runtime.packed_file import PackedFileError, read_metadata
from ..common.errors import ConfigError
from ..common.files import write_text
from ..common.json_files import read_json
from ..common.paths import ROOT
from ..experiment.cli import add_out, input_path, make_parser
from ..experiment.config import load_config, parse_config
from ..experiment.config_sections import calls_per_image
from ..experiment.devices import (
    device_name,
    forget_peak,
    peak_memory,
    resolve_device,
    wait_for,
)
from . import speed_tables
from .environment import environment, processor
from .peers import PEERS
from .plan import read_names, read_numbers
from .record import Record
from .speed_models import CPU, PEER_VARIANTS, VARIANTS, Call, Models, Variant

DEFAULT = tuple(f"configs/{name}.yaml" for name in ("emoji32", "emoji64", "cifar10", "imagenet256"))
FULL = "fp32"  # what all are compared with
SHOWN = 8  # operators of a profile
MOST_THREADS = 1024  # OpenMP ends the process where it finds no room for their stacks
REST = "C++ of --compile and Python"
Values = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """fresh: whether the memory of a fresh process is measured too."""

    variants: list[str]
    batches: list[int]
    threads: list[int]
    repeats: int
    fresh: bool = True


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_out(parser, "folder of the measurement")
    default = [ROOT / path for path in DEFAULT]
    names = ", ".join(path.stem for path in default)
    parser.add_argument(
        "--configs",
        nargs="+",
        type=input_path,
        metavar="FILE",
        default=default,
        help=f"YAML of experiments ({names})",
    )
    known = ",".join(VARIANTS)
    parser.add_argument("--variants", metavar="A,B", default=known, help=f"some of {known} (all)")
    parser.add_argument("--batches", metavar="N,M", default="1,4,16", help="images of one call")
    parser.add_argument("--threads", metavar="N,M", default="1,2", help="of the process")
    known = ",".join(PEERS)
    parser.add_argument("--peers", metavar="A,B", default="", help=f"some of {known} (none)")
    parser.add_argument(
        "--quantized",
        type=input_path,
        metavar="FILE",
        help="in place of random weights, --configs",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="cpu|cuda|cuda:N", help="what is measured (cpu)"
    )
    parser.add_argument(
        "--merge", type=input_path, metavar="JSON", help="of scripts/gpu_check.py: adds its rows"
    )
    parser.add_argument("--repeats", metavar="N", default="7", help="pairs of calls (7)")
    return parser.parse_args(argv)


def seconds_of(call: Call, device: torch.device = CPU) -> tuple[float, float]:
    """Seconds of a call: on the clock, and of CPU time (all threads together). On a CUDA device the
    clock is its own, between two events, from an idle device to the end of the call."""
    if device.type == "cuda":
        wait_for(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        used = time.process_time()
        start.record()
        call()
        end.record()
        used = time.process_time() - used
        wait_for(device)
        return start.elapsed_time(end) / 1000, used
    began, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - used


def timed(full: Call, call: Call | None, repeats: int, device: torch.device = CPU) -> Values:
    """Seconds of each call, the variant's and full precision's (the same without a variant), on the
    clock and of CPU time."""
    for one in (full, call):
        if one is not None:
            one(), one()  # packing, caches, code generation
    own, against = [], []
    for _ in range(repeats):
        against.append(seconds_of(full, device))
        own.append(against[-1] if call is None else seconds_of(call, device))
    (seconds, cpu), (full_seconds, full_cpu) = zip(*own, strict=True), zip(*against, strict=True)
    return {"seconds": seconds, "cpu": cpu, "full_seconds": full_seconds, "full_cpu": full_cpu}


def peak_of(call: Call, device: torch.device) -> int | None:
    """Bytes that tensors take on the device at most during a call, weights included; None on a
    CPU."""
    forget_peak(device)
    call()
    return peak_memory(device)


def operators(call: Call) -> dict[str, float]:
    """The operators that take most of a call -> share of its time on the processor, which on a CUDA
    device is that of launching them; REST: between the operators."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr
    with profile(use_kineto=False) as measured:
        began = time.perf_counter()
        call()
        total = 1e6 * (time.perf_counter() - began)
    events = measured.key_averages()
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN]
    rest = total - sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in largest}
    return {REST: max(rest, 0.0) / total} | shares


class Bench:
    """The cells of one configuration, each measured unless the record has it."""

    def __init__(self, models: Models, record: Record, plan: Plan):
        self.models, self.record, self.plan = models, record, plan
        self._full: nn.Module | None = None  # built when something has to be measured

    def rows(self) -> Iterator[Values]:
        for name in self.plan.variants:
            yield from self.of(name)

    def of(self, name: str) -> Iterator[Values]:
        """The rows of one variant."""
        config, plan, variant = self.models.config, self.plan, (VARIANTS | PEER_VARIANTS)[name]
        start = {"model": config.name, "variant": name, "label": variant.label}
        reason = self.models.obstacle(variant)
        if reason is not None:
            yield start | {"reason": reason}
            return
        size = self.models.bytes(variant)
        given = {"batch": plan.batches[0], "bytes": size}
        first = None
        if plan.fresh:
            first = self._section(
                f"{config.name}/{name}/first call",
                given,
                lambda: self.models.first_call(variant, plan.batches[0]),
            )
        built: list[nn.Module] = []
        for batch in plan.batches:
            for threads in plan.threads:
                cell = f"{config.name}/{name}/{batch} images/{threads} threads"

                def make(batch: int = batch, threads: int = threads) -> Values:
                    return self._measure(variant, built, batch, threads)

                values = self._section(cell, {"repeats": plan.repeats, "bytes": size}, make)
                row = start | {"batch": batch, "threads": threads, "bytes": size}
                yield row | {"calls": calls_per_image(config), "first": first} | values
        built.clear()
        gc.collect()

    def _section(self, name: str, settings: Values, make: Any) -> Values:
        where = {"processor": processor(), "torch": torch.__version__}
        if self.models.device != CPU:
            where["device"] = device_name(self.models.device)
        if self.models.quantized is not None:
            where["quantized"] = self.models.digest
        return self.record.section(name, where | settings, make)

    def _measure(
        self, variant: Variant, built: list[nn.Module], batch: int, threads: int
    ) -> Values:
        """built: the variant's model, once it is there."""
        if self._full is None:
            self._full = self.models.build(VARIANTS[FULL])
        call = None
        if variant != VARIANTS[FULL]:
            if not built:
                built.append(self.models.build(variant))
            call = self.models.call(built[0], batch)
        full = self.models.call(self._full, batch)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            values = timed(full, call, self.plan.repeats, self.models.device)
            values["device_bytes"] = peak_of(call or full, self.models.device)
            values["sqnr"] = None if call is None else self.models.sqnr(built[0])
            return values | {"operators": operators(call or full)}
        finally:
            torch.set_num_threads(before)


def say(row: Values) -> None:
    if "reason" in row:
        print(f"{row['model']} {row['label']}: not here ({row['reason']})", flush=True)
        return
    seconds = statistics.median(row["seconds"])
    where = f"{row['batch']} images, {row['threads']} threads"
    print(f"{row['model']} {row['label']}, {where}: {seconds:.3f} s", flush=True)


def rows_of_report(path: Path) -> list[Values]:
    """The rows of a gpu_report.json, each named after its card. Raises ConfigError, also for rows
    that the tables cannot show: now, and not after the measurement."""
    report = read_json(path, dict[str, Any])
    try:
        rows = [r | {"model": f"{r.get('model')}, {report.get('device')}"} for r in report["speed"]]
        speed_tables.document(rows, "", None, "")
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        what = "is no gpu_report.json of scripts/gpu_check.py, or a damaged one"
        raise ConfigError(f"--merge {path}: {what}") from error
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = resolve_device(args.device)
    merged = [] if args.merge is None else rows_of_report(Path(args.merge))
    peers = read_names("--peers", args.peers, tuple(PEERS)) if args.peers else []
    plan = Plan(
        read_names("--variants", args.variants, tuple(VARIANTS))
        + [name for name, variant in PEER_VARIANTS.items() if variant.peer in peers],
        read_numbers("--batches", args.batches),
        read_numbers("--threads", args.threads, highest=MOST_THREADS),
        read_numbers("--repeats", args.repeats)[0],
    )
    if args.quantized is None:
        configs = [load_config(path, []) for path in args.configs]
    else:
        text = read_metadata(args.quantized).get("config")
        if text is None:
            raise PackedFileError(f"{args.quantized}: holds no configuration")
        configs = [parse_config(text, args.quantized)]
    folder = Path(args.out)
    record, rows = Record(folder / "speed.json"), []
    for config in configs:
        quantized = None if args.quantized is None else Path(args.quantized)
        for row in Bench(Models(config, folder / "models", quantized, device), record, plan).rows():
            say(row)
            rows.append(row)
        gc.collect()
    where = environment()
    machine = f"{where['processor']}, {os.cpu_count()} processors, torch {torch.__version__}"
    weights = "random weights" if args.quantized is None else str(args.quantized)
    if device != CPU:
        machine = f"{device_name(device)}, {machine}"
    text = speed_tables.document([*rows, *merged], machine, where["commit"], weights)
    write_text(folder / "speed.md", text)
    print(f"\n{text}\n{folder / 'speed.md'}")

"""The first look at a graphics card: is everything right on it, and how fast is it?

    python scripts/gpu_check.py --out runs/gpu            # an hour; the same command continues
    python scripts/gpu_check.py --quick --out runs/gpu    # small networks and few calls, minutes
    python scripts/gpu_check.py --quick --device cpu --out runs/gpu-cpu    # tries the script

Checks: sums of integers in TF32; the phases of a calibration; images of full precision, of fake
quantization and of int8 against the CPU's; a file and images made twice; waits for the device by
place; the commands; features for FID; the tests that need a card. Times: float32, TF32, bf16, fp16,
compiled, fake and int8, with and without CUDA graphs, of CIFAR-10, LDM-4 and Stable Diffusion at
three batches, with random weights.

OUT receives gpu_report.md, which ends with a line for each check, and gpu_report.json, which
`benchmark.py --speed --merge` adds to its tables. A check that fails does not keep the others from
being made.

Exit codes: 0 all is well, 1 a check failed, 2 no card or bad input, 130 interrupted.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tinydm.models.checkpoint_files import is_out_of_memory
from tinydm.scripts.bench import card_report
from tinydm.scripts.bench.card_checks import (
    CHECKS,
    Card,
    Verdict,
    check_images,
    tiny_config,
    told,
)
from tinydm.scripts.bench.environment import environment
from tinydm.scripts.bench.record import Record
from tinydm.scripts.bench.speed import Bench, Plan, say
from tinydm.scripts.bench.speed_models import VARIANTS, Models
from tinydm.scripts.common.files import write_json, write_text
from tinydm.scripts.common.paths import ROOT
from tinydm.scripts.experiment.cli import add_out, make_parser
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.device_defaults import device_memory
from tinydm.scripts.experiment.devices import device_name, resolve_device

MEASURED = [
    *("fp32", "tf32", "bf16", "fp16", "fp16-compiled", "fp32-graph", "tf32-graph", "fp16-graph"),
    *("fake-w8a8", "fake-w8a8-tf32", "fake-w4a8-tf32", "int8-w8a8", "int8-w8a8-launches"),
    *("int8-w8a8-fp16", "int8-w4a8"),
]
QUICK = ["fp32", "tf32", "bf16", "fp16-graph", "fake-w8a8", "fake-w8a8-tf32", "int8-w8a8"]
MODELS = {"cifar10": [16, 64, 256], "imagenet256": [4, 16, 64], "sd_v1": [2, 4, 8]}
WIDE = {"imagenet256", "sd_v1"}  # most of their layers have 256 channels and more
REPEATS = 20


def parse_arguments(argv: list[str] | None) -> Any:
    parser = make_parser(__doc__)
    add_out(parser, "folder of the report")
    parser.add_argument(
        "--device", default="cuda", metavar="cuda|cuda:N|cpu", help="what is looked at"
    )
    parser.add_argument("--quick", action="store_true", help="small networks, few calls")
    return parser.parse_args(argv)


def attempt(check: Callable[[Card], list[Verdict]], card: Card) -> list[Verdict]:
    """The verdicts of a check, or that it failed and why."""
    try:
        return check(card)
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        return [Verdict(name, False, told(error), {"traceback": traceback.format_exc()})]


def rows_of(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Those of a variant, and where it breaks one with the reason: the others are measured all the
    same. broken: not for want of memory, which larger batches may not find."""
    try:
        yield from bench.of(name)
    except Exception as error:
        broken = not is_out_of_memory(error)
        start = {"model": bench.models.config.name, "variant": name, "label": VARIANTS[name].label}
        yield start | {"reason": told(error), "broken": broken}


def measured(card: Card, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows as those of benchmark.py --speed. Numbers that are there are not measured again."""
    record = Record(card.folder / "speed.json")
    files = {card.config: [1, 2]} if quick else {}
    files |= {} if quick else {ROOT / f"configs/{n}.yaml": sizes for n, sizes in MODELS.items()}
    for path, batches in files.items():
        plan = Plan(
            QUICK if quick else MEASURED, batches, [1], 2 if quick else REPEATS, fresh=False
        )
        models = Models(load_config(path), card.folder / "models", device=card.device)
        bench = Bench(models, record, plan)
        for name in plan.variants:
            for row in rows_of(bench, name):
                say(row)
                yield row


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device, folder = resolve_device(args.device), Path(args.out)
    config = tiny_config(folder) if args.quick else ROOT / "configs" / "emoji32.yaml"
    size = (16, 8) if args.quick else (256, 32)
    card = Card(device, folder, config, count=2 if args.quick else 16, size=size)
    verdicts: list[Verdict] = []

    def note(found: list[Verdict]) -> None:
        verdicts.extend(found)
        for verdict in found:
            print(verdict.line, flush=True)

    rows: list[dict[str, Any]] = []

    def speed(card: Card) -> list[Verdict]:
        rows.extend(measured(card, args.quick))
        return card_report.verdicts_of_speed(rows, WIDE)

    for check in CHECKS:
        note(attempt(check, card))
    if not args.quick:  # a latent one with classes and guidance
        latent = replace(card, config=ROOT / "configs/emoji64.yaml", folder=folder / "emoji64")
        note(attempt(check_images, latent))
    note(attempt(speed, card))
    memory = device_memory(device)
    report = {
        "device": device_name(device),
        "memory": "a CPU" if memory is None else f"{memory:.1f} GiB",
        "torch": torch.__version__,
        "commit": environment()["commit"],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "speed": rows,
    }
    write_json(folder / "gpu_report.json", report)
    text = card_report.document(report, verdicts)
    write_text(folder / "gpu_report.md", text)
    print(f"\n{text}\n{folder / 'gpu_report.md'}")
    return int(any(verdict.passed is False for verdict in verdicts))


if __name__ == "__main__":
    run(main, less="--quick")

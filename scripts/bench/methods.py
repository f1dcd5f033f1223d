"""What benchmark.py does without --speed: every cell of a plan, its tables and plots."""

import argparse
import math
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from ..common.files import write_json, write_text
from ..common.json_files import DamagedJsonError, check_type, parse_json
from ..common.reports import RowReport
from ..experiment.backend import add_backend, read_backend
from ..experiment.cli import (
    SAMPLER_OPTIONS,
    SAMPLING_OPTIONS,
    add_config,
    add_out,
    input_path,
    make_parser,
)
from ..experiment.device_defaults import device_memory
from ..experiment.devices import resolve_device
from ..experiment.runs import locked
from . import measure, tables
from .ablations import PARTS
from .cells import Bench, Row
from .environment import environment
from .leads import LEAD_TITLE, lead_table
from .plan import (
    ABLATION,
    BENCHMARK,
    METHODS,
    NAMES,
    Plan,
    ablation_cells,
    benchmark_cells,
    read_bits,
    read_names,
    read_numbers,
    study_cells,
)
from .scoring import Scorer
from .studies import BUDGET, STUDIES, TUNING, TUNING_SEEDS

# Kind of the tables -> the file that they are in, its title.
FILES = {
    BENCHMARK: ("results.md", "methods"),
    ABLATION: ("ablation.md", "the parts of tinyDM"),
    TUNING: ("tuning.md", "learning rates by the same small search"),
    BUDGET: ("budget.md", "more iterations of a block or end-to-end steps"),
}
STUDY_OPTIONS = {TUNING: "--tune", BUDGET: "--curve"}


def parse_arguments(argv: list[str], description: str | None) -> argparse.Namespace:
    parser = make_parser(description)
    options = (*SAMPLER_OPTIONS, *SAMPLING_OPTIONS)
    add_config(parser, [option for option in options if option[1] != "sampler.steps"])
    add_out(parser, "folder of the benchmark")
    known = ",".join(NAMES)
    parser.add_argument(
        "--methods", metavar="A,B", help=f"some of {known} (all; with --ablate none)"
    )
    parser.add_argument("--bits", metavar="A,B", default="w8a8,w4a8", help="weights, activations")
    parser.add_argument(
        "--steps", "--timesteps", metavar="N,M", help="sampling steps (sampler.steps)"
    )
    parser.add_argument("--seeds", metavar="A,B", default="0", help="of the calibration (0)")
    parser.add_argument(
        "--noise-seeds", metavar="A,B", help="of the images' noise, each with every calibrated file"
    )
    parser.add_argument("--transfer", metavar="A,B", default="", help="further samplers")
    parser.add_argument(
        "--trajectories", metavar="N", default="32", help="on which eps errors are measured (32)"
    )
    add_backend(parser)
    parser.add_argument("--fid", action="store_true", help="also FID, sFID, IS, precision")
    parser.add_argument(
        "--reference", type=input_path, metavar="FILE", help="statistics or images, for --fid"
    )
    parser.add_argument(
        "--ablate",
        nargs="?",
        const=",".join(PARTS),
        metavar="A,B",
        help=f"some of {','.join(PARTS)}",
    )
    for study, option in STUDY_OPTIONS.items():
        what = f"{FILES[study][1]}; some of {','.join(STUDIES[study])}"
        parser.add_argument(option, dest=study, metavar="A,B", help=what)
    return parser.parse_args(argv)


def read_noises(args: argparse.Namespace, plan: Plan) -> list[int]:
    """Seeds of the images' noise."""
    if args.noise_seeds is None:
        return [plan.noise]
    return read_numbers("--noise-seeds", args.noise_seeds, lowest=0)


def check_tuning(seeds: list[int], noises: list[int], plan: Plan) -> None:
    """Raises ConfigError for seeds that a table may use: what is chosen on them looks too good."""
    allowed = f"{TUNING_SEEDS.start} to {TUNING_SEEDS.stop - 1}"
    for option, numbers in (
        ("--seeds", seeds),
        ("--set sampling.seed (or --noise-seeds)", [*noises, plan.noise]),
    ):
        if wrong := [number for number in numbers if number not in TUNING_SEEDS]:
            raise ConfigError(f"--tune: {option} must be from {allowed}, is {wrong[0]}")


def measure_all(args: argparse.Namespace, bench: Bench) -> list[Row]:
    """Every row that the command asks for, in the order of the work."""
    plan = bench.plan
    bits, seeds = read_bits(args.bits), read_numbers("--seeds", args.seeds, lowest=0)
    steps = [plan.base.sampler.steps] if args.steps is None else read_numbers("--steps", args.steps)
    transfers = {count: plan.transfers(args.transfer, count) for count in steps}
    noises = read_noises(args, plan)
    studies = {s: getattr(args, s) for s in STUDIES if getattr(args, s) is not None}
    methods = [] if args.ablate is not None or studies else list(NAMES)
    if args.methods is not None:
        methods = read_names("--methods", args.methods, METHODS)
    cells = list(benchmark_cells(methods, bits, steps, seeds))
    if args.ablate is not None:
        parts = read_names("--ablate", args.ablate, tuple(PARTS))
        cells += ablation_cells(parts, bits, steps, seeds)
    for study, names in studies.items():
        of = read_names(STUDY_OPTIONS[study], names, tuple(STUDIES[study]))
        if study == TUNING:
            check_tuning(seeds, noises, plan)
        cells += study_cells(study, of, bits, steps, seeds)
    for cell in cells:  # so that a mistake is told before hours of work
        for sampler in (*transfers[cell.steps], None):
            config = plan.config(cell, sampler)
        bench.full(config).trajectories(config)
    rows = []
    if "fp" in methods:
        samplers = [s for count in steps for s in (plan.sampler(count), *transfers[count])]
        rows += [bench.full_row(s, noise) for s in dict.fromkeys(samplers) for noise in noises]
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.title}", flush=True)
        rows += bench.rows(cell, transfers[cell.steps], noises)
    return rows


def earlier_rows(path: Path) -> list[Row]:
    """The rows of an earlier results.json, as far as they can be read."""
    try:
        rows = parse_json(path, dict[str, Any]).get("rows")
    except (OSError, DamagedJsonError):
        return []
    return [row for row in rows if _is_row(row)] if isinstance(rows, list) else []


def _is_row(value: Any) -> bool:
    try:
        check_type(value, RowReport)
    except DamagedJsonError:
        return False
    return True


def summary(line: tables.Line) -> dict[str, Any]:
    """The numbers of one line of a table; null is infinity (no difference at all) or unmeasured."""
    errors, psnr, eps, weighted = line.image_mse, line.psnr(), line.eps(), line.weighted()
    return {
        "cell": line.cell.to_plain(),
        "sampler": line.rows[0]["sampler"],
        "calibrated": line.rows[0]["calibrated"],
        "seeds": line.seeds,
        "noise_seeds": sorted({row["noise"] for row in line.rows if "noise" in row}),
        "images": line.rows[0]["count"],
        "size_mb": line.average("size_mb"),
        "calibration_seconds": line.average("seconds"),
        "calibration_peak_bytes": line.average("peak_bytes"),
        "psnr": psnr and psnr[0],
        "psnr_interval": psnr and psnr[1],
        "psnr_mean": line.mean_psnr(),
        "psnr_median": None if errors is None else measure.median_psnr(errors),
        "psnr_deviation_of_seeds": line.spread(),
        "eps_mse": eps and eps[0],
        "eps_mse_interval": eps and eps[1],
        "eps_weighted": weighted and weighted[0],
        "eps_weighted_interval": weighted and weighted[1],
        **{name: line.score(name) for name in tables.SCORES.values()},
    }


def finite(value: Any) -> Any:
    """A value of JSON with None for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(folder: Path, name: str, rows: list[Row]) -> None:
    """The files of FILES, as far as there is something in them; prints them."""
    for kind, (file, title) in FILES.items():
        if not tables.lines_of(rows, kind):
            continue
        if kind == BENCHMARK:
            table = tables.benchmark_table(rows)
        else:
            in_study = kind in STUDIES
            table = tables.study_table(rows, kind) if in_study else tables.ablation_table(rows)
        if kind == BENCHMARK and (lead := lead_table(rows)):
            table += f"\n\n{LEAD_TITLE}\n\n{lead}"
        title = f"{name}: {title}"
        notes = "\n".join(f"- {note}" for note in tables.notes(rows, kind))
        write_text(folder / file, tables.document(title=title, table=table, notes=notes))
        print(f"\n{table}\n\n{folder / file}")


def main(argv: list[str], description: str | None) -> None:
    args = parse_arguments(argv, description)
    if args.fid and args.reference is None:
        raise ConfigError("--fid: needs --reference FILE, statistics or images")
    device, backend = resolve_device(args.device), read_backend(args)
    (trajectories,) = read_numbers("--trajectories", args.trajectories)[:1]
    plan = Plan(args.config, args.overrides, device_memory(device))
    scorer = Scorer(args.reference, args.device) if args.fid else None
    folder = Path(args.out)
    bench = Bench(folder, plan, device, trajectories, scorer, backend)
    with locked(folder / ".lock"):
        write_all(args, bench)


def write_all(args: argparse.Namespace, bench: Bench) -> None:
    """Measures and writes the tables, results.json and plots."""
    folder, plan = bench.root, bench.plan
    rows = measure_all(args, bench)
    rows = bench.merge(rows, earlier_rows(folder / "results.json"))
    lines = [line for kind in FILES for line in tables.lines_of(rows, kind)]
    result = {
        "name": plan.base.name,
        "environment": environment(),
        "lines": [summary(line) for line in lines],
        "rows": rows,
    }
    write_json(folder / "results.json", finite(result))
    write_tables(folder, plan.base.name, rows)
    if any(row["cell"]["table"] == "benchmark" for row in rows):
        from .plots import write_plots

        write_plots(folder, rows)

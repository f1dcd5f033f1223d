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
    make_parser,
)
from ..experiment.devices import resolve_device
from ..experiment.runs import locked
from . import measure, tables
from .ablations import PARTS
from .cells import Bench, Row
from .environment import environment
from .leads import LEAD_TITLE, lead_table
from .plan import (
    METHODS,
    NAMES,
    Plan,
    ablation_cells,
    benchmark_cells,
    read_bits,
    read_names,
    read_numbers,
)
from .scoring import Scorer


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
    parser.add_argument("--transfer", metavar="A,B", default="", help="further samplers")
    parser.add_argument(
        "--trajectories", metavar="N", default="32", help="on which eps errors are measured (32)"
    )
    add_backend(parser)
    parser.add_argument("--fid", action="store_true", help="also FID, sFID, IS, precision")
    parser.add_argument("--reference", metavar="FILE", help="statistics or images, for --fid")
    parser.add_argument(
        "--ablate",
        nargs="?",
        const=",".join(PARTS),
        metavar="A,B",
        help=f"some of {','.join(PARTS)}",
    )
    return parser.parse_args(argv)


def measure_all(args: argparse.Namespace, bench: Bench) -> list[Row]:
    """Every row that the command asks for, in the order of the work."""
    plan = bench.plan
    bits, seeds = read_bits(args.bits), read_numbers("--seeds", args.seeds, lowest=0)
    steps = [plan.base.sampler.steps] if args.steps is None else read_numbers("--steps", args.steps)
    transfers = {count: plan.transfers(args.transfer, count) for count in steps}
    methods = [] if args.ablate is not None else list(NAMES)
    if args.methods is not None:
        methods = read_names("--methods", args.methods, METHODS)
    cells = list(benchmark_cells(methods, bits, steps, seeds))
    if args.ablate is not None:
        parts = read_names("--ablate", args.ablate, tuple(PARTS))
        cells += ablation_cells(parts, bits, steps, seeds)
    for cell in cells:  # so that a mistake is told before hours of work
        for sampler in (*transfers[cell.steps], None):
            config = plan.config(cell, sampler)
        bench.full(config).trajectories(config)
    rows = []
    if "fp" in methods:
        samplers = [s for count in steps for s in (plan.sampler(count), *transfers[count])]
        rows += [bench.full_row(sampler) for sampler in dict.fromkeys(samplers)]
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.title}", flush=True)
        rows += bench.rows(cell, transfers[cell.steps])
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
    errors, psnr, eps = line.image_mse, line.psnr(), line.eps()
    return {
        "cell": line.cell.to_plain(),
        "sampler": line.rows[0]["sampler"],
        "calibrated": line.rows[0]["calibrated"],
        "seeds": [row["cell"]["seed"] for row in line.rows],
        "images": line.rows[0]["count"],
        "size_mb": line.average("size_mb"),
        "calibration_seconds": line.average("seconds"),
        "psnr": psnr and psnr[0],
        "psnr_interval": psnr and psnr[1],
        "psnr_mean": line.mean_psnr(),
        "psnr_median": None if errors is None else measure.median_psnr(errors),
        "psnr_deviation_of_seeds": line.spread(),
        "eps_mse": eps and eps[0],
        "eps_mse_interval": eps and eps[1],
        **{name: line.score(name) for name in tables.SCORES.values()},
    }


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(folder: Path, name: str, rows: list[Row]) -> None:
    """results.md and ablation.md, as far as there is something in them; prints them."""
    for file, title, ablations in (
        ("results.md", f"{name}: methods", False),
        ("ablation.md", f"{name}: the parts of tinyDM", True),
    ):
        if not tables.lines_of(rows, ablations):
            continue
        table = tables.ablation_table(rows) if ablations else tables.benchmark_table(rows)
        if not ablations and (lead := lead_table(rows)):
            table += f"\n\n{LEAD_TITLE}\n\n{lead}"
        notes = "\n".join(f"- {note}" for note in tables.notes(rows, ablations))
        write_text(folder / file, tables.document(title=title, table=table, notes=notes))
        print(f"\n{table}\n\n{folder / file}")


def main(argv: list[str], description: str | None) -> None:
    args = parse_arguments(argv, description)
    if args.fid and args.reference is None:
        raise ConfigError("--fid: needs --reference FILE, statistics or images")
    device, backend = resolve_device(args.device), read_backend(args)
    (trajectories,) = read_numbers("--trajectories", args.trajectories)[:1]
    plan = Plan(args.config, args.overrides)
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
    lines = [line for ablations in (False, True) for line in tables.lines_of(rows, ablations)]
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

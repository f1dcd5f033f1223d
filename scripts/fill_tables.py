"""The paper's benchmark tables from what scripts/benchmark.py measured.

    python scripts/fill_tables.py runs/bench-lsun/results.json runs/bench-imagenet/results.json
    python scripts/fill_tables.py --published --out tables.md

Each results.json belongs to the table of its configuration (configs/lsun_bedroom.yaml,
configs/imagenet256.yaml, configs/dit_xl2.yaml); several of one configuration fill one table, the
later file wins. What was not measured stays empty. --published adds what other papers printed, in
tables of their own with their sources.

Exit codes: 0 done, 2 bad input.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
from pathlib import Path
from typing import Any

from tinydm.scripts.bench.paper import TITLES, section
from tinydm.scripts.bench.plan import BENCHMARK, NAMES, Cell
from tinydm.scripts.common.errors import RunError
from tinydm.scripts.common.files import write_text
from tinydm.scripts.common.json_files import DamagedJsonError, parse_json
from tinydm.scripts.common.reports import ResultsReport
from tinydm.scripts.common.schema import printable
from tinydm.scripts.experiment.cli import input_path, make_parser, output_file


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "results", nargs="*", type=input_path, metavar="RESULTS.json", help="of benchmark.py"
    )
    parser.add_argument("--published", action="store_true", help="also what others published")
    parser.add_argument(
        "--out", type=output_file(".md"), metavar="FILE", help="Markdown file, instead of printing"
    )
    return parser.parse_args(argv)


def read_results(path: str) -> dict[str, Any]:
    """A results.json of one of the tables' configurations. Raises RunError."""
    try:
        result = parse_json(Path(path), ResultsReport)
    except DamagedJsonError as error:
        raise RunError(f"{path}: not a results.json of benchmark.py ({error})") from error
    name = result["name"]
    for row in result["rows"]:
        cell = Cell.from_plain(row["cell"])
        if cell.table == BENCHMARK and cell.label not in NAMES:
            known = ", ".join(NAMES)
            raise RunError(f"{path}: {printable(cell.label)} is no method (known: {known})")
    if name not in TITLES:
        known = ", ".join(TITLES)
        raise RunError(f"{path}: measured on '{printable(name)}', the tables are of {known}")
    return result


def merged(results: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The results without rows that a later file has again."""
    seen: set[Any] = set()
    kept = []
    for path, result in reversed(results):
        rows = []
        for row in result["rows"]:
            cell, noise = Cell.from_plain(row["cell"]), row.get("noise")
            key = (cell.key, *row["sampler"].values(), noise)
            if key not in seen:
                rows.append(row)
            seen.add(key)
        kept.append((path, result | {"rows": rows}))
    return kept[::-1]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    results = [(path, read_results(path)) for path in args.results]
    parts = []
    for name in TITLES:
        own = [(path, result) for path, result in results if result["name"] == name]
        parts.append(section(name, merged(own), args.published))
    text = "\n\n".join(parts) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        write_text(args.out, text)
        print(args.out)


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)

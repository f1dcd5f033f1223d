"""The paper's tables and that of DiT-XL/2: every row and column is there, measured or empty.

Published numbers stand in tables of their own, each with its source.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..common.markdown import format_table
from .plan import NAMES
from .tables import COLUMNS, SCORES, Line, Row, lines_of, number

PUBLISHED = Path(__file__).with_name("published.json")
TITLES = {
    "lsun_bedroom": "LSUN-Bedrooms 256x256, unconditional, LDM-4",
    "imagenet256": "ImageNet 256x256, class-conditional, LDM-4",
    "dit_xl2": "ImageNet 256x256, class-conditional, DiT-XL/2",
}  # keys are the configurations' names
STEPS = (250, 50)
QUANTIZED_BITS = ((8, 8), (4, 8))
METHODS = ("qdiffusion", "ptqd", "ptq4dm", "tinydm")
SAMPLERS = ("ddim", "ldm_ddim", "scheduler")
MEASURED_COLUMNS = COLUMNS[:8]
PUBLISHED_COLUMNS = (*COLUMNS[:8], "Source")
# Digits as the measured benchmark shows them, but for precision, which is a fraction.
FORMS = {"fid": ".2f", "sfid": ".2f", "is": ".2f", "precision": ".4f"}


def _places() -> Iterable[tuple[int, tuple[int, int], str]]:
    """(steps, bits, method) of each row."""
    for steps in STEPS:
        yield steps, (32, 32), "fp"
        for bits in QUANTIZED_BITS:
            yield from ((steps, bits, method) for method in METHODS)


def measured_table(rows: Sequence[Row]) -> tuple[str, list[Line]]:
    """The paper's layout and the lines that are in it. rows: of results of one configuration."""
    lines = {}
    for line in lines_of(list(rows)):
        if line.sampler[0] in SAMPLERS and not line.transferred:
            lines[line.cell.steps, line.cell.bits, line.cell.label] = line
    table, used = [], []
    for place in _places():
        line = lines.get(place)
        steps, bits, method = place
        values = [str(steps), f"{bits[0]}/{bits[1]}", NAMES[method], *_scores(line)]
        table.append(dict(zip(MEASURED_COLUMNS, values, strict=True)))
        used += [] if line is None else [line]
    return format_table(table, list(MEASURED_COLUMNS)), used


def _scores(line: Line | None) -> list[str]:
    if line is None:
        return [""] * (1 + len(SCORES))
    size = number(line.average("size_mb"), ".1f" if (line.average("size_mb") or 0) > 10 else ".3f")
    return [size, *(number(line.score(name), FORMS[name]) for name in SCORES.values())]


def section(name: str, results: Sequence[tuple[str, dict[str, Any]]], published: bool) -> str:
    """Markdown of one table. results: (where they are from, results.json) of its configuration."""
    rows = [row for _, result in results for row in result["rows"]]
    table, used = measured_table(rows)
    parts = [f"## {TITLES[name]}", f"Measured with this repository.\n\n{table}"]
    if used:
        told = [*_counts(used), *(_origin(source, result) for source, result in results)]
        parts.append("\n".join(f"- {note}" for note in told))
    else:
        parts.append("- Nothing is measured yet.")
    if published:
        parts.append(published_section(name))
    return "\n\n".join(parts)


def _counts(lines: Sequence[Line]) -> list[str]:
    """How many images each score is of; the rows are named where they differ."""
    rows_of: dict[tuple[Any, ...], list[str]] = {}
    for line in lines:
        for row in line.rows:
            scores = row.get("scores") or {}
            if "images" in scores:
                images = scores["images"]
                key = (images["generated"], scores["reference"], images["reference"])
                place = "{} steps {}/{} {}".format(
                    line.cell.steps, *line.cell.bits, NAMES[line.cell.label]
                )
                rows_of.setdefault(key, []).append(f"{place}, seed {line.cell.seed}")
    told = []
    for (count, reference, of), places in rows_of.items():
        where = "" if len(rows_of) == 1 else f" ({'; '.join(places)})"
        known = "an unknown number of" if of is None else f"{of:,}"
        told.append(f"Scores: {count:,} images against {known} of {reference}{where}.")
    return told


def _origin(source: str, result: dict[str, Any]) -> str:
    place = result.get("environment") or {}
    machine = place.get("cuda") or place.get("processor") or "unknown processor"
    return f"{source}: commit {place.get('commit') or 'unknown'}, {machine}."


@cache
def _published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def published_section(name: str) -> str:
    """Numbers that others published, with other settings and evaluation code."""
    data = _published()
    table, keys = [], []
    for entry in data["tables"][name]:
        if entry["source"] not in keys:
            keys.append(entry["source"])
        values = [
            f"{entry['steps']} ({entry['setting']})",
            "{}/{}".format(*entry["bits"]),
            entry["method"],
            number(entry.get("size"), ".1f"),
            *(number(entry.get(key), FORMS[key]) for key in SCORES.values()),
            f"[{keys.index(entry['source']) + 1}]",
        ]
        table.append(dict(zip(PUBLISHED_COLUMNS, values, strict=True)))
    sources = [f"- [{i}] {data['sources'][key]}" for i, key in enumerate(keys, 1)]
    return "\n\n".join(
        (
            "### Published by others, not measured here",
            data["note"],
            format_table(table, list(PUBLISHED_COLUMNS)),
            "\n".join(sources),
        )
    )

"""gpu_report.md: the verdicts, the times and what follows from them."""

import statistics
from typing import Any

from ..common.markdown import format_table
from . import speed_tables
from .card_checks import Verdict

Row = dict[str, Any]
IMAGES = 50_000
HALVES = ("bf16", "fp16", "fp16-compiled", "fp16-graph")
INTEGERS = ("int8-w8a8", "int8-w8a8-fp16", "int8-w4a8")
FASTER_THAN_HALF, FASTER_THAN_FLOAT = 1.3, 3.0


def milliseconds(row: Row) -> float:
    return 1000 * statistics.median(row["seconds"])


def hours(row: Row) -> float:
    """Hours that the denoiser alone takes for 50,000 images."""
    return milliseconds(row) / 3.6e6 * row["calls"] * IMAGES / row["batch"]


def times(rows: list[Row]) -> str:
    """ms, GB and hours of every cell."""
    lines = []
    for row in rows:
        line = {"model": row["model"], "variant": row["label"]}
        if "reason" in row:
            numbers = {"rows": "", "ms": row["reason"], "GB": "", "hours": "", "times fp32": ""}
        else:
            size = row.get("device_bytes")
            numbers = {
                "rows": row["batch"],
                "ms": f"{milliseconds(row):.4g}",
                "GB": "" if size is None else f"{size / 2**30:.2f}",
                "hours": f"{hours(row):.3g}",
                "times fp32": speed_tables.ratio(row["seconds"], row["full_seconds"]),
            }
        lines.append(line | numbers)
    return format_table(lines, ["model", "variant", "rows", "ms", "GB", "hours", "times fp32"])


def fastest(rows: list[Row], names: tuple[str, ...]) -> dict[tuple[str, int], Row]:
    """The fastest of these variants for each model and batch."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        if "reason" in row or row["variant"] not in names:
            continue
        place = row["model"], row["batch"]
        if place not in found or milliseconds(row) < milliseconds(found[place]):
            found[place] = row
    return found


def compared(
    title: str, rows: list[Row], names: tuple[str, ...], others: tuple[str, ...], least: float
) -> Verdict:
    """How many times as fast the first variants are, at the largest batch of each model."""
    own, theirs = fastest(rows, names), fastest(rows, others)
    largest = {model: batch for model, batch in sorted(own) if (model, batch) in theirs}
    if not largest:
        return Verdict(title, None, "nothing measured")
    ratios = {
        model: milliseconds(theirs[model, batch]) / milliseconds(own[model, batch])
        for model, batch in largest.items()
    }
    shown = ", ".join(f"{model} {value:.2f}" for model, value in ratios.items())
    passed = min(ratios.values()) >= least
    return Verdict(title, passed, f"{shown} times as fast, at least {least} expected", ratios)


def verdicts_of_speed(rows: list[Row], wide: set[str]) -> list[Verdict]:
    """wide: models of 256 channels and more, in which integers have to pay."""
    fake = ("fake-w8a8-tf32", "fake-w4a8-tf32")
    integer = [row for row in rows if row["model"] in wide]
    broken = [
        f"{row['model']} {row['label']}: {row['reason']}" for row in rows if row.get("broken")
    ]
    return [
        Verdict("every variant can be timed", not broken, "; ".join(broken) or "none broke"),
        compared("int8 against the best half precision", integer, INTEGERS, HALVES,
                 FASTER_THAN_HALF),
        compared("fake quantization in TF32 against float32", rows, fake,
                 ("fake-w8a8", "fake-w4a8"), FASTER_THAN_FLOAT),
    ]  # fmt: skip


def document(report: dict[str, Any], verdicts: list[Verdict]) -> str:
    lines = "\n".join(f"- {verdict.line}" for verdict in verdicts)
    where = f"{report['device']}, {report['memory']}, torch {report['torch']}"
    return f"""# A first look at a card

{where}; commit {report["commit"]}. Random weights in the table of times.

## Times

ms of one denoiser call between two events of the device, median; GB that tensors take on it at
most, weights included; hours of 50,000 images, the denoiser alone; times fp32: of eager float32 in
channels_last, called in turn with the variant, median of the pairs and quartiles.

{times(report["speed"])}

## Verdicts

{lines}
"""

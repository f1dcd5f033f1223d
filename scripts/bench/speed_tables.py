"""Rows of speed.py -> Markdown."""

import statistics
from typing import Any

from ..common.markdown import format_table

Row = dict[str, Any]
MB = 2**20
COLUMNS = [
    *("model", "variant", "batch", "threads", "ms per call", "s per image", "times fp32"),
    *("SQNR, dB", "by CPU time", "device MB", "peak MB", "MB", "of Python", "file MB"),
    "load s (CPU)",
]


def ratio(own: list[float], full: list[float]) -> str:
    """How many times as fast as full precision: median over the pairs (quartiles)."""
    pairs = [theirs / ours for theirs, ours in zip(full, own, strict=True)]
    if len(pairs) < 2:
        return f"{pairs[0]:.2f}"
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / MB:.0f}"


def cells(row: Row) -> Row:
    """The texts of one line."""
    line = dict.fromkeys(COLUMNS, "") | {"model": row["model"], "variant": row["label"]}
    if "reason" in row:
        return line | {"times fp32": row["reason"]}
    seconds, first = statistics.median(row["seconds"]), row["first"]
    if first is not None:
        line |= {
            "peak MB": megabytes(first["peak"]),
            "MB": megabytes(first["after"]),
            "of Python": megabytes(first["before"]),
            "load s (CPU)": f"{first['load'] + first['first']:.1f} ({first['cpu']:.1f})",
        }
    return line | {
        "batch": row["batch"],
        "threads": row["threads"],
        "ms per call": f"{1000 * seconds:.4g}",
        "s per image": f"{seconds / row['batch'] * row['calls']:.3g}",
        "times fp32": ratio(row["seconds"], row["full_seconds"]),
        "SQNR, dB": "" if row.get("sqnr") is None else f"{row['sqnr']:.1f}",
        "by CPU time": ratio(row["cpu"], row["full_cpu"]),
        "device MB": megabytes(row.get("device_bytes")),
        "file MB": f"{row['bytes'] / MB:.2f}",
    }


def profiles(rows: list[Row]) -> str:
    """The operators of each variant's first cell, in percent of the call."""
    seen, lines = set(), []
    for row in rows:
        name = row["model"], row["label"]
        if "reason" in row or name in seen:
            continue
        seen.add(name)
        shares = ", ".join(f"{k} {100 * v:.0f}" for k, v in row["operators"].items())
        lines.append(f"- {row['model']}, {row['label']}: {shares}")
    return "\n".join(lines)


def document(rows: list[Row], machine: str, commit: str | None, weights: str) -> str:
    return f"""# Speed

{format_table([cells(row) for row in rows], COLUMNS)}

- {machine}; commit {commit}; {weights}.
- times fp32: of the eager float32 model in channels_last, called in turn with the variant; median
  of the pairs and quartiles. s per image: the denoiser alone, all steps of the configuration.
- device MB: what tensors take at most during a call on a device that is not the CPU.
- SQNR: of eps against float32 over ten timesteps of fresh trajectories (--quantized).
- peak MB, MB, load s: a fresh process with one thread that loads the model and makes its first
  call, with the smallest number of images: its memory at most and at the end, and what Python and
  PyTorch take of it.

Share of the operators in percent (first batch size and number of threads):

{profiles(rows)}
"""

"""Rows of cells -> Markdown: the paper's table and the ablations'.

A line of a table stands for one cell over its calibration seeds. What was not measured is empty.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..common.markdown import format_table
from . import measure
from .ablations import PARTS
from .plan import BENCHMARK, NAMES, Cell

Row = dict[str, Any]
Interval = tuple[float, float] | None
COLUMNS = (
    *("Timesteps", "Bit-width (W/A)", "Method", "Size (MB)", "FID", "sFID", "IS", "Precision"),
    *("PSNR (dB)", "mean (dB)", "eps-MSE", "calibration s"),
)
SCORES = {"FID": "fid", "sFID": "sfid", "IS": "is", "Precision": "precision"}
PRESET = "preset"  # the ablations' first cell


@dataclass(frozen=True)
class Line:
    """The rows of one cell and sampler over its seeds, in the order of the seeds."""

    rows: tuple[Row, ...]

    @property
    def cell(self) -> Cell:
        return Cell.from_plain(self.rows[0]["cell"])

    @property
    def sampler(self) -> tuple[str, int]:
        return self.rows[0]["sampler"]["name"], self.rows[0]["sampler"]["steps"]

    @property
    def transferred(self) -> bool:
        return self.sampler != tuple(self.rows[0]["calibrated"].values())

    @property
    def image_mse(self) -> np.ndarray | None:  # (seeds, images)
        return self._stack("image_mse")

    @property
    def eps_mse(self) -> np.ndarray | None:  # (seeds, trajectories)
        return self._stack("eps_mse_of_trajectories")

    def psnr(self) -> tuple[float, Interval] | None:
        errors = self.image_mse
        if errors is None:
            return None
        return measure.pooled_psnr(errors), measure.interval(measure.psnr_of_means, errors)

    def mean_psnr(self) -> float | None:
        errors = self.image_mse
        return None if errors is None else measure.mean_psnr(errors)

    def eps(self) -> tuple[float, Interval] | None:
        errors = self.eps_mse
        if errors is None:
            return None
        return float(errors.mean()), measure.interval(lambda means: means.mean(-1), errors)

    def spread(self) -> float | None:
        """Standard deviation of the seeds' PSNR."""
        errors = self.image_mse
        if errors is None or len(errors) < 2:
            return None
        return float(np.std([measure.pooled_psnr(row[None]) for row in errors], ddof=1))

    def average(self, name: str) -> float | None:
        return self._average([row.get(name) for row in self.rows])

    def score(self, name: str) -> float | None:
        return self._average([(row.get("scores") or {}).get(name) for row in self.rows])

    @staticmethod
    def _average(values: list[float | None]) -> float | None:
        return None if None in values else float(np.mean(values))

    def _stack(self, name: str) -> np.ndarray | None:
        values = [row.get(name) for row in self.rows]
        return None if None in values else np.array(values)


def lines_of(rows: list[Row], ablations: bool) -> list[Line]:
    """The lines of one table, in its order."""
    together: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["cell"]["seed"]):
        cell = Cell.from_plain(row["cell"])
        if (cell.table != BENCHMARK) == ablations:
            together.setdefault((*cell.key[:-1], *row["sampler"].values()), []).append(row)
    lines = [Line(tuple(group)) for group in together.values()]
    return sorted(lines, key=_place_in_ablations if ablations else _place)


def _bits_place(bits: tuple[int, int]) -> tuple[int, int]:
    return -bits[0], -bits[1]  # from fine to coarse


def _place(line: Line) -> tuple[Any, ...]:
    cell = line.cell
    method = tuple(NAMES).index(cell.label)
    name, steps = line.sampler
    return (name != "ddim", name, -steps, _bits_place(cell.bits), method, -cell.steps)


def _place_in_ablations(line: Line) -> tuple[Any, ...]:
    cell = line.cell
    part = 0 if cell.table == PRESET else 1 + tuple(PARTS).index(cell.table)
    labels = [variant.label for variant in PARTS.get(cell.table, ())]
    variant = labels.index(cell.label) if cell.label in labels else -1
    return (-cell.steps, _bits_place(cell.bits), part, variant, line.transferred, line.sampler)


# ---- numbers as text ----


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def with_interval(value: tuple[float, Interval] | None, form: str) -> str:
    if value is None:
        return ""
    middle, around = value
    if around is None:
        return format(middle, form)
    return f"{middle:{form}} [{around[0]:{form}}, {around[1]:{form}}]"


def _psnr_text(line: Line) -> str:
    text, spread = with_interval(line.psnr(), ".2f"), line.spread()
    return text if spread is None else f"{text} ± {spread:.2f}"


def timesteps_text(line: Line) -> str:
    """The sampler's steps, its name where it is another than DDIM, where it was calibrated."""
    name, steps = line.sampler
    text = str(steps) if name == "ddim" else f"{steps} {name}"
    calibrated = line.rows[0]["calibrated"]
    if not line.transferred:
        return text
    other = "" if calibrated["name"] == name else f" {calibrated['name']}"
    return f"{text} (calibrated at {calibrated['steps']}{other})"


def benchmark_table(rows: list[Row]) -> str:
    """The paper's layout with the paired metrics behind it."""
    lines = []
    for line in lines_of(rows, ablations=False):
        cell = line.cell
        values = [
            timesteps_text(line),
            f"{cell.bits[0]}/{cell.bits[1]}",
            NAMES[cell.label],
            number(line.average("size_mb"), ".3f"),
            *(number(line.score(name)) for name in SCORES.values()),
            _psnr_text(line),
            number(line.mean_psnr(), ".2f"),
            with_interval(line.eps(), ".2e"),
            number(line.average("seconds"), ".0f"),
        ]
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return format_table(lines, list(COLUMNS))


def ablation_table(rows: list[Row]) -> str:
    """Each variant with its difference from the preset on the same images."""
    lines = lines_of(rows, ablations=True)
    presets = {place_of(line): line for line in lines if line.cell.table == PRESET}
    table = []
    for line in lines:
        cell, own = line.cell, line.cell.table == PRESET
        preset = None if own else presets.get(place_of(line))
        table.append(
            {
                "Timesteps": timesteps_text(line),
                "Bit-width (W/A)": f"{cell.bits[0]}/{cell.bits[1]}",
                "Part": cell.table.replace("_", " "),
                "Choice": cell.label,
                "Size (MB)": number(line.average("size_mb"), ".3f"),
                "PSNR (dB)": _psnr_text(line),
                "seeds": seeds_text(line),
                "against preset (dB)": with_interval(_gain_of_common(line, preset), "+.2f"),
                "eps-MSE": with_interval(line.eps(), ".2e"),
                "FID": number(line.score("fid")),
                "calibration s": number(line.average("seconds"), ".0f"),
            }
        )
    return format_table(table, list(table[0]))


def place_of(line: Line) -> tuple[Any, ...]:
    """The key by which lines are compared: bits, calibrated steps, sampler."""
    return (line.cell.bits, line.cell.steps, *line.sampler)


def seeds_text(line: Line) -> str:
    return ", ".join(str(row["cell"]["seed"]) for row in line.rows)


def common(own: Line, other: Line) -> tuple[Line, Line]:
    """Both over the seeds that both have images of."""

    def seeds(line: Line) -> set[int]:
        return {row["cell"]["seed"] for row in line.rows if row.get("image_mse") is not None}

    shared = seeds(own) & seeds(other)

    def those(line: Line) -> Line:
        return replace(line, rows=tuple(row for row in line.rows if row["cell"]["seed"] in shared))

    return those(own), those(other)


def _gain_of_common(line: Line, preset: Line | None) -> tuple[float, Interval] | None:
    if preset is None:
        return None
    line, preset = common(line, preset)
    return gain(line, preset) if line.rows else None


def gain(line: Line, other: Line | None) -> tuple[float, Interval] | None:
    """PSNR of one less that of another, with the interval over the images of both."""
    if other is None or line.image_mse is None or other.image_mse is None:
        return None

    def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        ours, theirs = measure.psnr_of_means(ours), measure.psnr_of_means(theirs)
        with np.errstate(invalid="ignore"):
            return np.where(ours == theirs, 0.0, ours - theirs)  # both may be infinite

    return paired(difference, line.image_mse, other.image_mse)


def paired(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> tuple[float, Interval]:
    """A statistic of means and its interval. samples: each (seeds, n), of the same n."""
    value = statistic(*(sample.mean(1) for sample in samples))
    return float(value), measure.interval(statistic, *samples)


def notes(rows: list[Row], ablations: bool) -> list[str]:
    """Remarks that a reader of the tables needs, one line each."""
    lines = lines_of(rows, ablations)
    every = [row for line in lines for row in line.rows]
    seeds = sorted({row["cell"]["seed"] for row in every if row["cell"]["label"] != "fp"})
    found = [
        f"Calibration seeds: {', '.join(map(str, seeds)) or 'none'}. In brackets the 95% bootstrap "
        "interval, over images for PSNR, over trajectories for eps-MSE; ± is the standard "
        "deviation over the seeds' PSNR.",
        f"PSNR: to the full-precision images of the same noise, {every[0]['count']} images, error "
        "pooled; mean: of each image's PSNR, at most 58.9 dB, below which images of 8 bits show "
        f"nothing. eps-MSE: on {every[0]['trajectories']} full-precision trajectories that no "
        "calibration saw (rounded up to whole network calls).",
    ]
    quantized = [line for line in lines if line.cell.label != "fp" and not ablations]
    for line in (line for line in quantized if len(line.rows) < len(seeds)):
        what = f"{timesteps_text(line)} steps, {'/'.join(map(str, line.cell.bits))}"
        found.append(f"{what}, {NAMES[line.cell.label]}: seeds {seeds_text(line)} alone.")
    backends = {row.get("backend") for row in every} - {None, "fake"}
    found += [f"Quantized models ran on the backend {name}." for name in sorted(backends)]
    scores = [row["scores"] for row in every if row.get("scores")]
    for n, reference, of in sorted(
        {(s["images"]["generated"], s["reference"], s["images"]["reference"] or 0) for s in scores}
    ):
        known = str(of) if of else "an unknown number of"
        found.append(f"FID and the like: {n} images against {known} of {reference}.")
    repeated = {
        (line.sampler, r["calls"], r["distinct_calls"]) for line in lines for r in line.rows
    }
    for (name, steps), calls, distinct in sorted(repeated):
        if (calls, distinct) != (steps, steps):
            found.append(
                f"{name} with {steps} steps: {calls} calls, {distinct} distinct timesteps."
            )
    if len({row["code"] for row in every if "code" in row}) > 1:
        found.append(
            "Cells were calibrated with different versions of the program; delete their folders in "
            "cells/ to make them anew (results.json has `code` for each)."
        )
    return found


document = partial("# {title}\n\n{table}\n\n{notes}\n".format)

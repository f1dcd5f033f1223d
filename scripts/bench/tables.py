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
from .plan import ABLATION, BENCHMARK, NAMES, Cell, variants_of
from .studies import TUNING

Row = dict[str, Any]
Interval = tuple[float, float] | None
COLUMNS = (
    *("Timesteps", "Bit-width (W/A)", "Method", "Size (MB)", "FID", "sFID", "IS", "Precision"),
    *("PSNR (dB)", "mean (dB)", "eps-MSE", "eps weighted", "calibration s", "peak MiB"),
)
SCORES = {"FID": "fid", "sFID": "sfid", "IS": "is", "Precision": "precision"}
PRESET = "preset"  # the ablations' first cell


@dataclass(frozen=True)
class Line:
    """The rows of one cell and sampler over its seeds, those of calibration and those of the
    images' noise, in their order."""

    rows: tuple[Row, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the calibration, each once."""
        return list(dict.fromkeys(row["cell"]["seed"] for row in self.rows))

    @property
    def cell(self) -> Cell:
        """The cell with the first of the seeds."""
        return Cell.from_plain(self.rows[0]["cell"])

    @property
    def sampler(self) -> tuple[str, int]:
        """Name and steps of the sampler of the images."""
        return self.rows[0]["sampler"]["name"], self.rows[0]["sampler"]["steps"]

    @property
    def transferred(self) -> bool:
        """Whether the images have another sampler than the calibration had."""
        return self.sampler != tuple(self.rows[0]["calibrated"].values())

    @property
    def image_mse(self) -> np.ndarray | None:
        """(seeds, images): images of all noise seeds that every calibration seed has."""
        of_seeds: dict[int, dict[int, list[float]]] = {}
        for row in self.rows:
            if row.get("image_mse") is None:
                return None
            of_seeds.setdefault(row["cell"]["seed"], {})[noise_of(row)] = row["image_mse"]
        common = sorted(set.intersection(*map(set, of_seeds.values())))
        if not common:
            return None
        return np.array([np.concatenate([of[n] for n in common]) for of in of_seeds.values()])

    @property
    def eps_mse(self) -> np.ndarray | None:
        """(seeds, trajectories): mean squared error of the predicted noise."""
        return self._of_seeds("eps_mse_of_trajectories")

    @property
    def eps_weighted(self) -> np.ndarray | None:
        """(seeds, trajectories): the same with each step weighted by its importance."""
        return self._of_seeds("eps_weighted_of_trajectories")

    def psnr(self) -> tuple[float, Interval] | None:
        """PSNR pooled over the images, mean over seeds, with its interval."""
        errors = self.image_mse
        if errors is None:
            return None
        return measure.pooled_psnr(errors), measure.interval(measure.psnr_of_means, errors)

    def mean_psnr(self) -> float | None:
        """Mean of each image's own PSNR."""
        errors = self.image_mse
        return None if errors is None else measure.mean_psnr(errors)

    def eps(self) -> tuple[float, Interval] | None:
        """Mean of eps_mse with its interval."""
        return mean_with_interval(self.eps_mse)

    def weighted(self) -> tuple[float, Interval] | None:
        """Mean of eps_weighted with its interval."""
        return mean_with_interval(self.eps_weighted)

    def spread(self) -> float | None:
        """Standard deviation of the seeds' PSNR."""
        errors = self.image_mse
        if errors is None or len(errors) < 2:
            return None
        return float(np.std([measure.pooled_psnr(row[None]) for row in errors], ddof=1))

    def average(self, name: str) -> float | None:
        """Mean of a value over the rows, None where a row has none."""
        return self._average([row.get(name) for row in self.rows])

    def score(self, name: str) -> float | None:
        """Mean of a score over the rows, None where a row has none."""
        return self._average([(row.get("scores") or {}).get(name) for row in self.rows])

    @staticmethod
    def _average(values: list[float | None]) -> float | None:
        return None if None in values else float(np.mean(values))

    def _of_seeds(self, name: str) -> np.ndarray | None:
        """Values of a calibration seed, which the noise of the images does not change."""
        values = {row["cell"]["seed"]: row.get(name) for row in self.rows}
        return None if None in values.values() else np.array(list(values.values()))


def noise_of(row: Row) -> int:
    """Seed of the images' noise; -1 in rows of earlier versions, which had one alone."""
    return row.get("noise", -1)


def mean_with_interval(errors: np.ndarray | None) -> tuple[float, Interval] | None:
    """errors (seeds, n)."""
    if errors is None:
        return None
    return float(errors.mean()), measure.interval(lambda means: means.mean(-1), errors)


def lines_of(rows: list[Row], kind: str = BENCHMARK) -> list[Line]:
    """The lines of the tables of one kind (Cell.kind), in their order."""
    together: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["cell"]["seed"], noise_of(row))):
        cell = Cell.from_plain(row["cell"])
        if cell.kind == kind:
            together.setdefault((*cell.key[:-1], *row["sampler"].values()), []).append(row)
    lines = [Line(tuple(group)) for group in together.values()]
    return sorted(lines, key=_place if kind == BENCHMARK else _place_of_variant)


def _bits_place(bits: tuple[int, int]) -> tuple[int, int]:
    return -bits[0], -bits[1]  # from fine to coarse


def _place(line: Line) -> tuple[Any, ...]:
    cell = line.cell
    method = tuple(NAMES).index(cell.label)
    name, steps = line.sampler
    return (name != "ddim", name, -steps, _bits_place(cell.bits), method, -cell.steps)


def _place_of_variant(line: Line) -> tuple[Any, ...]:
    cell = line.cell
    if cell.kind == ABLATION:
        part = 0 if cell.table == PRESET else 1 + tuple(PARTS).index(cell.table)
    else:
        part = tuple(NAMES).index(cell.method)
    labels = [variant.label for variant in variants_of(cell)]
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
    for line in lines_of(rows):
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
            with_interval(line.weighted(), ".2e"),
            number(line.average("seconds"), ".0f"),
            _peak_text(line),
        ]
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return format_table(lines, list(COLUMNS))


def _peak_text(line: Line) -> str:
    peak = line.average("peak_bytes")
    return number(None if peak is None else peak / 2**20, ".0f")


def study_table(rows: list[Row], study: str) -> str:
    """The variants of each method of a study (studies.STUDIES)."""
    lines = lines_of(rows, study)
    best = chosen(lines)
    table = []
    for line in lines:
        cell = line.cell
        table.append(
            {
                "Timesteps": timesteps_text(line),
                "Bit-width (W/A)": f"{cell.bits[0]}/{cell.bits[1]}",
                "Method": NAMES[cell.method],
                "Choice": cell.label,
                "seeds": seeds_text(line),
                "PSNR (dB)": _psnr_text(line),
                "mean (dB)": number(line.mean_psnr(), ".2f"),
                "eps-MSE": with_interval(line.eps(), ".2e"),
                "eps weighted": with_interval(line.weighted(), ".2e"),
                "calibration s": number(line.average("seconds"), ".0f"),
                "peak MiB": _peak_text(line),
            }
        )
        if study == TUNING:
            table[-1]["chosen"] = "yes" if cell.label == best.get(cell.method) else ""
    return format_table(table, list(table[0]))


def chosen(lines: list[Line]) -> dict[str, str]:
    """Method -> its variant with the least weighted eps error: geometric mean over the places that
    all variants of the method have. lines: of one study."""
    errors: dict[str, dict[str, dict[Any, float]]] = {}
    for line in lines:
        if (weighted := line.weighted()) is not None:
            of_method = errors.setdefault(line.cell.method, {})
            of_method.setdefault(line.cell.label, {})[place_of(line)] = np.log(weighted[0])
    best = {}
    for method, variants in errors.items():
        places = sorted(set.intersection(*map(set, variants.values())))
        if places:
            sums = {label: sum(of[p] for p in places) for label, of in variants.items()}
            best[method] = min(sums, key=sums.__getitem__)
    return best


def ablation_table(rows: list[Row]) -> str:
    """Each variant with its difference from the preset on the same images."""
    lines = lines_of(rows, ABLATION)
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
                "eps weighted": with_interval(line.weighted(), ".2e"),
                "FID": number(line.score("fid")),
                "calibration s": number(line.average("seconds"), ".0f"),
                "peak MiB": _peak_text(line),
            }
        )
    return format_table(table, list(table[0]))


def place_of(line: Line) -> tuple[Any, ...]:
    """The key by which lines are compared: bits, calibrated steps, sampler."""
    return (line.cell.bits, line.cell.steps, *line.sampler)


def seeds_text(line: Line) -> str:
    return ", ".join(map(str, line.seeds))


def common(own: Line, other: Line) -> tuple[Line, Line]:
    """Both over the seeds, of calibration and noise, that both have images of."""

    def both_seeds(row: Row) -> tuple[int, int]:
        return row["cell"]["seed"], noise_of(row)

    def there(line: Line) -> set[tuple[int, int]]:
        return {both_seeds(row) for row in line.rows if row.get("image_mse") is not None}

    shared = there(own) & there(other)

    def those(line: Line) -> Line:
        return replace(line, rows=tuple(row for row in line.rows if both_seeds(row) in shared))

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


def notes(rows: list[Row], kind: str = BENCHMARK) -> list[str]:
    """Remarks that a reader of the tables needs, one line each."""
    lines = lines_of(rows, kind)
    every = [row for line in lines for row in line.rows]
    seeds = sorted({row["cell"]["seed"] for row in every if row["cell"]["label"] != "fp"})
    noises = sorted({noise_of(row) for row in every} - {-1})
    of_noise = f" of each of the noise seeds {', '.join(map(str, noises))}" if noises else ""
    found = [
        f"Calibration seeds: {', '.join(map(str, seeds)) or 'none'}. In brackets the 95% bootstrap "
        "interval, over images for PSNR, over trajectories for eps errors, and over the "
        "calibration seeds as well where there are several (hierarchical); ± is the standard "
        "deviation over the calibration seeds' PSNR.",
        f"PSNR: to the full-precision images of the same noise, {every[0]['count']} images"
        f"{of_noise}, error pooled; mean: of each image's PSNR, at most 58.9 dB, below which "
        "images of 8 bits show "
        f"nothing. eps-MSE: on {every[0]['trajectories']} full-precision trajectories that no "
        "calibration saw (rounded up to whole network calls); weighted: by how far an error at a "
        "step moves the image, weights of mean 1.",
        "calibration s: with the trajectories and all phases; peak MiB: of the process while it "
        "calibrates.",
    ]
    for samples, of in sorted(
        {(r["samples"], r["calibration_trajectories"]) for r in every if r.get("samples")}
    ):
        found.append(f"Calibrated on {samples:,} different samples of {of:,} trajectories.")
    quantized = [line for line in lines if line.cell.label != "fp" and kind == BENCHMARK]
    for line in quantized:
        own = sorted({noise_of(row) for row in line.rows} - {-1})
        if line.seeds == seeds and own == noises:
            continue
        what = f"{timesteps_text(line)} steps, {'/'.join(map(str, line.cell.bits))}"
        of = f", noise seeds {', '.join(map(str, own))}" if own else ""
        found.append(f"{what}, {NAMES[line.cell.label]}: seeds {seeds_text(line)}{of} alone.")
    if any(line.cell.label == "tinydm" and min(line.cell.bits) < 8 for line in quantized):
        found.append(
            f"The preset of {NAMES['tinydm']} has bits of their own for layers and for groups of "
            "timesteps: W is what every layer would have in a file of the same size, and A the "
            "mean over the sampling steps."
        )
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

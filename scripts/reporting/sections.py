"""The sections about one run, from its files and from what was measured."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ...models.pipeline import sampling_plan
from ..common.reports import Plain
from ..common.units import duration, mebibytes
from ..experiment.config import Config
from .contents import Quantizers, bytes_by_kind
from .figures import data_uri, eps_error, group_map, largest_errors, map_size, samples_per_step
from .measurements import Measured
from .page import Section, bar, missing, paragraph, picture, table, text
from .panels import legend, range_panels
from .run_folder import Run

CALIBRATE = "calibrate.py writes it."


def summary_section(run: Run) -> Section:
    report, parts = run.report, []
    if report is None:
        parts.append(missing("report.json.", CALIBRATE))
    else:
        bits = f"{report.get('weight_bits')}/{report.get('activation_bits')}"
        rows = [
            ("method", report.get("method")),
            ("bits of weights/activations", bits),
            ("size of the quantized file", mebibytes(report.get("size_mb"), 3)),
            ("of float32", f"{report.get('ratio_to_float32', 0):.1%} of "
             f"{mebibytes(report.get('float32_mb'), 3)}"),
            ("weights in integers", f"{report.get('weights_quantized', 0):.2%}"),
            ("MACs in integers", f"{report.get('macs_quantized', 0):.2%}"),
            ("calibration", f"{duration(report.get('seconds'))}, seed {report.get('seed')}"),
        ]  # fmt: skip
        parts.append(table((), rows, kind="facts"))
    if rows := [row for row in (run.comparison or {}).get("rows") or () if row]:
        parts.append("<h3>As scripts/compare.py saw it</h3>")
        parts.append(_comparison(rows))
    else:
        parts.append(missing("comparison.json with FID.", "scripts/compare.py writes it."))
    return Section("summary", "Summary", "".join(parts))


def _comparison(rows: Sequence[Plain]) -> str:
    """A column for each row of compare.py, so that a phone is wide enough; what no row has is left
    out."""
    first, *columns = rows[0]
    shown = [c for c in columns if any(row.get(c, "") not in ("", None) for row in rows)]
    cells = [[row.get(c) for c in shown] for row in rows]
    return _side_by_side(shown, [row.get(first, "") for row in rows], cells)


def _side_by_side(names: Sequence[str], titles: Sequence[str], columns: Sequence[Sequence]) -> str:
    """A line for each name, a column for each title."""
    lines = [[name, *values] for name, *values in zip(names, *columns, strict=True)]
    shown = [["–" if value in ("", None) else value for value in line] for line in lines]
    return table(["", *titles], shown, range(1, len(titles) + 1), kind="facts")


def eps_section(measured: Measured) -> Section:
    title = "eps error over timesteps"
    if measured.values is None:
        return Section("eps", title, missing("eps errors:", measured.reason))
    v = measured.values
    errors = v["eps_mse_of_steps"]
    words = (
        f"Mean squared error of the predicted noise on the states of {v['trajectories']} fresh "
        f"full-precision trajectories; mean over the steps {np.mean(errors):.3e}."
    )
    draw = partial(eps_error, timesteps=v["timesteps"], errors=errors)
    return Section("eps", title, picture(data_uri(draw), words))


def ranges_section(quantizers: Quantizers | None, measured: Measured) -> Section:
    title, parts = "Activation ranges over timesteps", []
    if quantizers is None or not quantizers.layers:
        lack = missing("activation quantizers in a quantized file.", CALIBRATE)
        return Section("ranges", title, lack)
    low = high = None
    words = (
        "One drawing for each activation quantizer, sampling from the left to the right. Filled: "
        "the range that the codes reach, in the colour of the timestep's group. "
    )
    if measured.values is None:
        parts.append(missing("the ranges that activations take:", measured.reason))
    else:
        low, high = (np.array(measured.values[n], dtype=np.float64) for n in ("low", "high"))
        words += (
            "Lines: smallest and largest activation in the quantized network, on the states of "
            f"{measured.values['trajectories']} fresh trajectories; what lies outside is clipped."
        )
    parts += [paragraph(words), legend(quantizers.groups), range_panels(quantizers, low, high)]
    return Section("ranges", title, "".join(parts))


def groups_section(quantizers: Quantizers | None) -> Section:
    title = "Groups of timesteps"
    if quantizers is None or not quantizers.layers:
        return Section("groups", title, missing("a quantized file with groups.", CALIBRATE))
    switches = (np.diff(quantizers.rank, axis=1) != 0).sum(1)
    words = (
        f"Group of each of {len(quantizers.layers)} activation quantizers at each of "
        f"{len(quantizers.timesteps)} calibrated timesteps, numbered by its scale; up to "
        f"{quantizers.groups} groups are in use, and a quantizer changes its group "
        f"{switches.mean():.1f} times over the timesteps on average."
    )
    uri = data_uri(partial(group_map, quantizers=quantizers), map_size(quantizers))
    return Section("groups", title, picture(uri, words))


def timesteps_section(run: Run) -> Section:
    title = "Timesteps of the calibration samples"
    counts = ((run.report or {}).get("phases") or {}).get("tuples_per_step")
    if not counts:
        lack = "how many calibration samples each timestep gave (tuples_per_step in report.json)."
        return Section("timesteps", title, missing(lack))
    timesteps = None if run.config is None else _timesteps(run.config, len(counts))
    words = f"{sum(counts)} calibration samples over {len(counts)} sampling steps"
    if run.config is not None:
        words += f", selection: {run.config.calibration.timesteps}"
    draw = partial(samples_per_step, timesteps=timesteps, counts=counts)
    return Section("timesteps", title, picture(data_uri(draw), words + "."))


def _timesteps(config: Config, steps: int) -> list[int] | None:
    """Timesteps in the order of sampling; None where steps and calls differ, as for PLMS."""
    s = config.sampler
    calls, _ = sampling_plan(s.name, s.steps, s.skip, **vars(config.schedule))
    calls = sorted((int(t) for t in calls), reverse=True)
    return calls if len(calls) == steps else None


def layers_section(run: Run, measured: Measured) -> Section:
    title, parts = "Layers: bits and sensitivity", []
    values = measured.values or {}
    alone: dict[str, float] = values.get("eps_mse", {})
    if measured.values is None:
        parts.append(missing("the layers' sensitivity:", measured.reason))
    else:
        words = (
            "Sensitivity: eps-MSE of the full-precision network when this one layer is replaced by "
            f"its quantized form, weights and input, on {len(values['timesteps'])} states at t = "
            f"{', '.join(map(str, values['timesteps']))}. All layers quantized: "
            f"{values['eps_mse_of_all']:.3e}. Where calibration trained layers together, one alone "
            "lacks the others it was trained with, and its error can exceed that of all."
        )
        parts.append(picture(data_uri(partial(largest_errors, errors=alone), (4.8, 5.2)), words))
    layers = (run.report or {}).get("layers")
    if not layers:
        parts.append(missing("the layers' table in report.json.", CALIBRATE))
        return Section("layers", title, "".join(parts))
    measured_columns = ["eps-MSE alone", ""] if alone else []
    header = ["layer", "W bits", "A bits", *measured_columns, "kind", "weights", "MMACs", "note"]
    largest = max(alone.values(), default=0.0) or 1.0
    rows = [_layer_row(row, alone, largest) for row in layers]
    numbers = [i for i, name in enumerate(header) if name not in ("layer", "", "kind", "note")]
    parts.append(table(header, rows, numbers))
    return Section("layers", title, "".join(parts))


def _layer_row(row: Plain, alone: dict[str, float], largest: float) -> list[Any]:
    inputs = "+".join(f"{bits:.3g}" for bits in row["activation_bits"]) or "32"
    weight = row["weight_bits"] or (32 if row["weights"] else "")
    cells = [row["name"], weight, inputs]
    if alone:
        error = alone.get(row["name"])
        cells += ["", ""] if error is None else [f"{error:.2e}", bar(error / largest)]
    macs = f"{row['macs'] / 1e6:.2f}"
    return [*cells, row["kind"], f"{row['weights']:,}", macs, row["note"]]


def size_section(run: Run) -> Section:
    title = "Size"
    if run.metadata is None:
        return Section("size", title, missing(f"{run.file.name}.", CALIBRATE))
    sizes = bytes_by_kind(run.file)
    total = sum(sizes.values())
    rows = [
        (kind, f"{size:,}", f"{size / total:.1%}", bar(size / max(sizes.values())))
        for kind, size in sizes.items()
    ]
    rows.append(("the whole file", f"{total:,}", "100%", ""))
    words = f"{run.file.name}: {mebibytes(total / 2**20, 3)} (of 2^20 bytes)."
    return Section(
        "size", title, paragraph(words) + table(("what", "bytes", "share", ""), rows, (1, 2))
    )


def speed_section(run: Run) -> Section:
    parts = ["<h3>Sampling</h3>"]
    titles, columns = [], []
    for images, label in ((run.full, "full precision"), (run.quantized, "quantized")):
        report = None if images is None else images.report
        if report is None:
            lack = f"how fast the {label} images were made."
            parts.append(missing(lack, "sample_diffusion.py writes it beside them."))
            continue
        titles.append(label)
        columns.append(
            (
                report.get("backend"),
                report.get("images", {}).get("made"),
                duration(report.get("seconds", {}).get("sample")),
                f"{rate:.3g}" if (rate := report.get("images_per_second")) else None,
                report.get("calls_per_image"),
                f"{report.get('device')}, {report.get('threads')} threads, "
                f"{report.get('processes')} processes",
            )
        )
    names = ("backend", "images made", "time", "images/s", "calls per image", "on")
    if columns:
        parts.append(_side_by_side(names, titles, columns))
    return Section("speed", "Speed", "".join(parts) + _phases(run.report))


def _phases(report: Plain | None) -> str:
    phases = {k: v for k, v in ((report or {}).get("phases") or {}).items() if isinstance(v, dict)}
    if not phases:
        return "<h3>Calibration</h3>" + missing("the phases of the calibration.", CALIBRATE)
    rows = []
    for name, values in phases.items():
        rest = "; ".join(f"{k} {_short(v)}" for k, v in values.items() if k != "seconds")
        rows.append((name, duration(_seconds(values)), rest))
    total = f"{duration(report.get('seconds'))} in all, {report.get('threads')} threads"
    return f"<h3>Calibration</h3>{paragraph(total)}" + table(
        ("phase", "time", "what it did"), rows, (1,), kind="facts"
    )


def _seconds(values: Plain) -> float | None:
    found = values.get("seconds")
    return found if isinstance(found, int | float) else None


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"({len(value)} values)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def config_section(run: Run) -> Section:
    if run.config_text is None:
        return Section("config", "Configuration", missing("config.yaml.", CALIBRATE))
    words = paragraph("As it was resolved, every key written out.")
    return Section("config", "Configuration", f"{words}<pre>{text(run.config_text)}</pre>")


def versions_section(run: Run) -> Section:
    rows: list[Sequence[Any]] = []
    for label, report in (
        ("calibration", run.report),
        ("full-precision images", run.full and run.full.report),
        ("quantized images", run.quantized and run.quantized.report),
    ):
        versions = (report or {}).get("versions")
        told = ", ".join(f"{k} {v}" for k, v in versions.items()) if versions else "not in this run"
        rows.append((label, told))
    for name, digest in ((run.report or {}).get("sources") or {}).items():
        rows.append((f"sha256 of {name}", digest))
    if run.metadata is not None:
        rows.append(("checksum of the quantized tensors", run.metadata.get("digest", "")))
    rows.append(("identity of the calibration", (run.report or {}).get("identity", "")))
    told = [row for row in rows if row[1] != ""]
    return Section("versions", "Versions and identity", table((), told, kind="facts"))

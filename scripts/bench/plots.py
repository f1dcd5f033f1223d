"""Pictures of a benchmark folder, written to plots/*.png."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from safetensors import safe_open

from ...quant.runtime.packed_file import read_metadata
from ..common.files import atomic
from ..experiment.calibration_run import RESULT
from .plan import NAMES
from .tables import Line, Row, lines_of, timesteps_text

PALETTE = (
    *("#000000", "#999999", "#009e73", "#882255", "#44aa99", "#e69f00", "#cc79a7", "#56b4e9"),
    *("#d55e00", "#0072b2"),
)
COLOURS = dict(zip(NAMES, PALETTE, strict=True))


def _save(path: Path, draw: Callable[[Axes], None], size: tuple[float, float] = (6.4, 4)) -> None:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    try:
        draw(axes)
        with atomic(path) as temporary:
            # Without the version of matplotlib, so that the same numbers give the same file.
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    finally:
        plt.close(figure)


def write_plots(folder: Path, rows: list[Row]) -> list[str]:
    """All plots of the benchmark's rows; returns their names."""
    lines = [line for line in lines_of(rows) if line.cell.label != "fp"]
    own = [line for line in lines if not line.transferred]
    written = []

    def save(name: str, *arguments: object, **options: tuple[float, float]) -> None:
        _save(folder / "plots" / f"{name}.png", *arguments, **options)
        written.append(f"plots/{name}.png")

    for (steps, bits), group in _groups(own, lambda n: (n.cell.steps, n.cell.bits)).items():
        text = f"{steps}-w{bits[0]}a{bits[1]}"
        save(f"eps-mse-{text}", lambda axes, g=group: eps_over_timesteps(axes, g))
        save(f"timesteps-{text}", lambda axes, g=group: selected_timesteps(axes, g))
    for text, group in _groups(lines, timesteps_text).items():
        name = text.replace("(", "").replace(")", "").replace(" ", "-")
        save(f"psnr-{name}", lambda axes, g=group: psnr_of_methods(axes, g))
        for bits, alike in _groups(group, lambda n: n.cell.bits[1]).items():
            if len({line.cell.bits for line in alike}) > 1:
                save(f"size-{name}-a{bits}", lambda axes, g=alike: psnr_of_sizes(axes, g))
    for line in own:
        row = line.rows[0]
        ranks, timesteps, layers = group_ranks(folder / row["folder"] / RESULT)
        if ranks is not None and ranks.max() > 0:
            name = f"groups-{line.cell.name}"
            height = max(3.0, 1.5 + 0.055 * len(layers))
            save(
                name,
                lambda axes, r=ranks, t=timesteps: groups_over_timesteps(axes, r, t),
                size=(6.4, height),
            )
    return written


def _groups(lines: list[Line], key: Callable[[Line], object]) -> dict:
    groups = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    return groups


def _label(line: Line) -> str:
    return NAMES[line.cell.label]


def eps_over_timesteps(axes: Axes, lines: list[Line]) -> None:
    """Mean squared eps error at each timestep, mean over the seeds."""
    for line in lines:
        timesteps = np.array(line.rows[0]["eps_timesteps"])
        errors = np.mean([row["eps_mse_of_steps"] for row in line.rows], axis=0)
        axes.plot(timesteps, errors, color=COLOURS[line.cell.label], label=_label(line), lw=1.2)
    cell = lines[0].cell
    axes.set(xlabel="timestep t", ylabel="eps-MSE to full precision", yscale="log")
    axes.set_title(f"W{cell.bits[0]}A{cell.bits[1]}, {cell.steps} steps", fontsize=10)
    axes.invert_xaxis()  # in the order of sampling
    axes.legend(fontsize=8)


def psnr_of_methods(axes: Axes, lines: list[Line]) -> None:
    """PSNR with 95% intervals, methods side by side for each bit width."""
    widths = list(dict.fromkeys(line.cell.bits for line in lines))
    methods = list(dict.fromkeys(line.cell.label for line in lines))
    for line in lines:
        value, around = line.psnr()
        if not np.isfinite(value):
            continue
        low, high = around or (value, value)
        offset = (methods.index(line.cell.label) - (len(methods) - 1) / 2) * 0.8 / len(methods)
        x = widths.index(line.cell.bits) + offset
        error = [[value - low], [min(high, value + 20) - value]]
        axes.errorbar(x, value, error, fmt="o", ms=4, capsize=3, color=COLOURS[line.cell.label])
    for method in methods:
        axes.plot([], [], "o", color=COLOURS[method], label=NAMES[method])
    axes.set_xticks(range(len(widths)), [f"W{w}A{a}" for w, a in widths])
    axes.set(ylabel="PSNR to full precision (dB)", xlim=(-0.6, len(widths) - 0.4))
    axes.set_title(f"timesteps: {timesteps_text(lines[0])}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def psnr_of_sizes(axes: Axes, lines: list[Line]) -> None:
    """Mean PSNR over the size of the file, a curve for each method."""
    for method, own in _groups(lines, lambda n: n.cell.label).items():
        points = [(line.rows[0]["size_mb"], line.mean_psnr(), line.cell.bits[0]) for line in own]
        points = sorted(p for p in points if p[1] is not None and np.isfinite(p[1]))
        sizes, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(sizes, values, "o-", ms=4, color=COLOURS[method], label=NAMES[method])
        for size, value, bits in points:
            axes.annotate(f"W{bits}", (size, value), (3, -10), textcoords="offset points", size=8)
    axes.set(xlabel="size of the file (MB)", ylabel="mean PSNR to full precision (dB)")
    axes.set_title(f"A{lines[0].cell.bits[1]}, timesteps: {timesteps_text(lines[0])}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def selected_timesteps(axes: Axes, lines: list[Line]) -> None:
    """How many calibration samples each timestep gave, first seed."""
    for line in lines:
        row = line.rows[0]
        counts = row.get("tuples_per_step")
        if counts is not None and len(counts) == len(row["eps_timesteps"]):
            style = {"where": "mid", "color": COLOURS[line.cell.label], "lw": 1.2}
            axes.step(row["eps_timesteps"], counts, label=_label(line), **style)
    cell = lines[0].cell
    axes.set(xlabel="timestep t", ylabel="calibration samples")
    axes.set_title(f"W{cell.bits[0]}A{cell.bits[1]}, {cell.steps} steps", fontsize=10)
    axes.invert_xaxis()
    if axes.has_data():
        axes.legend(fontsize=8)


def group_ranks(path: Path) -> tuple[np.ndarray | None, list[int], list[str]]:
    """From a quantized file: group (L, S) of each activation quantizer at each timestep, numbered
    by its scale from 0, the finest; the timesteps (S,); the quantizers' layers (L,).

    None instead of ranks if the file is not there any more.
    """
    if not path.exists():
        return None, [], []
    metadata = read_metadata(path)
    with safe_open(path, framework="np") as handle:
        group, scale = (handle.get_tensor(f"activations.{n}") for n in ("group", "scale"))
    ranks = np.zeros(group.shape, dtype=np.int64)
    for row in range(len(group)):
        used = scale[row][group[row]]  # (S,)
        ranks[row] = np.unique(used, return_inverse=True)[1]
    names = [entry["name"] for entry in metadata["layers"] for _ in entry["inputs"]]
    return ranks, metadata["timesteps"], names


def groups_over_timesteps(axes: Axes, ranks: np.ndarray, timesteps: list[int]) -> None:
    """Heat map, one row a quantizer in the order of the layers."""
    count = int(ranks.max()) + 1
    colours = plt.get_cmap("viridis", count)
    picture = axes.imshow(
        ranks[:, ::-1], aspect="auto", cmap=colours, interpolation="nearest", vmin=-0.5,
        vmax=count - 0.5,
    )  # fmt: skip
    ticks = np.unique(np.linspace(0, len(timesteps) - 1, 6).round().astype(int))
    axes.set_xticks(ticks, [timesteps[::-1][i] for i in ticks])
    axes.set(xlabel="timestep t", ylabel="activation quantizer, input to output")
    label = "group, from the finest scale"
    axes.figure.colorbar(picture, ax=axes, label=label, shrink=0.6, ticks=range(count))

"""Plots as SVG within a data URI, which takes the page's light or dark colours, or as PNG files."""

import base64
import io
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..bench.plots import groups_over_timesteps
from ..common.files import atomic
from .contents import Quantizers

Draw = Callable[[Axes], None]
INK = "#010203"  # stands for the colour of text until the SVG is there
BLUE, ORANGE = "#3f8fd6", "#e08a2e"  # legible on white and on black
STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d7dce1}}</style>"
SMALLEST = 1e-300  # whose logarithm and reciprocal are numbers
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def data_uri(draw: Draw, size: tuple[float, float] = (4.8, 3.2)) -> str:
    """size: inches, at 10 points of text: wide as a phone, so that it need not shrink there."""
    look = dict.fromkeys(INKED, INK) | {"svg.hashsalt": "report", "legend.framealpha": 0.0}
    with plt.rc_context(look):
        text = _render(draw, size, "svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    end = text.index(">") + 1
    encoded = base64.b64encode((text[:end] + STYLE + text[end:]).encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


def write_png(path: Path, draw: Draw, size: tuple[float, float] = (4.8, 3.2)) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(_render(draw, size, "png", dpi=150, metadata={"Software": None}))


def _render(draw: Draw, size: tuple[float, float], form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    with plt.rc_context({"text.parse_math": False}):  # names of layers are no formulas
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        try:
            draw(axes)
            figure.savefig(buffer, format=form, **options)
        finally:
            plt.close(figure)
    return buffer.getvalue()


def sorted_psnr(axes: Axes, psnr: np.ndarray, pooled: float) -> None:
    """psnr (N,): of each image, infinite for equal ones, which are drawn at the top."""
    finite = psnr[np.isfinite(psnr)]
    top = finite.max() + 3 if finite.size else 100.0
    axes.plot(np.sort(np.minimum(psnr, top)), ".", color=BLUE, ms=4)
    for value, name, style in ((np.median(psnr), "median", "-"), (pooled, "pooled", "--")):
        if np.isfinite(value):
            axes.axhline(value, color=ORANGE, ls=style, lw=1.2, label=f"{name} {value:.1f} dB")
    axes.set(xlabel="images, sorted", ylabel="PSNR to full precision (dB)")
    axes.grid(axis="y", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def eps_error(axes: Axes, timesteps: list[int], errors: list[float]) -> None:
    axes.plot(timesteps, errors, color=BLUE, marker=".", ms=4, lw=1.2)
    axes.set(xlabel="timestep t, in the order of sampling", ylabel="eps-MSE to full precision")
    if min(errors) > SMALLEST:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0e}")  # the default one writes formulas
        axes.yaxis.set_minor_formatter("")
    axes.invert_xaxis()
    axes.grid(alpha=0.25)


def samples_per_step(axes: Axes, timesteps: list[int] | None, counts: list[int]) -> None:
    """Bars over the sampling steps, labelled by their timesteps where those are known."""
    axes.bar(range(len(counts)), counts, color=BLUE, width=0.85)
    label = "sampling step"
    if timesteps is not None:
        ticks = np.unique(np.linspace(0, len(counts) - 1, 8).round().astype(int))
        axes.set_xticks(ticks, [timesteps[i] for i in ticks])
        label = "timestep t, in the order of sampling"
    axes.set(xlabel=label, ylabel="calibration samples")
    axes.grid(axis="y", alpha=0.25)


def group_map(axes: Axes, quantizers: Quantizers) -> None:
    """Heat map of the group of each quantizer and timestep, with the names of the blocks."""
    groups_over_timesteps(axes, quantizers.rank, quantizers.timesteps)
    starts = _labelled(quantizers)
    axes.set_yticks([i - 0.5 for i in starts], starts.values(), va="top", fontsize=8)
    axes.set(ylabel="", xlabel="timestep t, in the order of sampling")


def _labelled(quantizers: Quantizers) -> dict[int, str]:
    """First row -> name of the blocks whose labels have room, large blocks first."""
    blocks, row = [], 0
    for name, members in groupby(quantizers.layers, key=block_of):
        size = len(list(members))
        blocks.append((size, row, name))
        row += size
    room = row / (map_size(quantizers)[1] * 6)  # rows that a line of text takes
    kept: dict[int, str] = {}
    for _, start, name in sorted(blocks, key=lambda block: -block[0]):
        if all(abs(start - other) > room for other in kept):
            kept[start] = name
    return kept


def map_size(quantizers: Quantizers) -> tuple[float, float]:
    return 4.8, max(3.0, 1.2 + 0.05 * len(quantizers.layers))


def block_of(layer: str) -> str:
    """down.0 of down.0.block.1.conv2, mid of mid.attn_1.q."""
    first, _, rest = layer.partition(".")
    number = rest.partition(".")[0]
    return f"{first}.{number}" if number.isdecimal() else first


def largest_errors(axes: Axes, errors: dict[str, float], shown: int = 20) -> None:
    names = sorted(errors, key=lambda name: -errors[name])[:shown][::-1]
    largest = max(errors.values(), default=0.0)
    unit = 10.0 ** np.floor(np.log10(largest)) if largest > SMALLEST else 1.0
    axes.barh(names, [errors[name] / unit for name in names], color=BLUE)
    axes.set(xlabel=f"eps-MSE with it alone quantized ({unit:.0e})")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.25)

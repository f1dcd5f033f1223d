"""Activation ranges over timesteps, one small drawing a quantizer, as SVG within the page.

The filled steps are the range that the codes reach, in the colour of the timestep's group; the two
lines are the smallest and the largest value seen.
"""

from html import escape
from itertools import groupby

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from .contents import Quantizers
from .figures import block_of

WIDTH, HEIGHT = 150, 60


def colours(groups: int) -> list[str]:
    """One colour for each group, those of the heat map."""
    return [to_hex(c) for c in matplotlib.colormaps["viridis"].resampled(groups)(range(groups))]


def legend(groups: int) -> str:
    chips = "".join(
        f'<span class="chip"><i style="background:{colour}"></i>{number}</span>'
        for number, colour in enumerate(colours(groups))
    )
    return f'<p class="legend">group, from the finest scale: {chips}</p>'


def range_panels(quantizers: Quantizers, low: np.ndarray | None, high: np.ndarray | None) -> str:
    """All panels block by block. low, high (L, S): what was seen, NaN or None where nothing was."""
    parts = []
    rows = range(len(quantizers.layers))
    for block, members in groupby(rows, key=lambda row: block_of(quantizers.layers[row])):
        panels = "".join(
            _panel(quantizers, row, *(None if v is None else v[row] for v in (low, high)))
            for row in members
        )
        parts.append(
            f"<details open><summary>{escape(block)}</summary>"
            f'<div class="panels">{panels}</div></details>'
        )
    return "".join(parts)


def _panel(q: Quantizers, row: int, low: np.ndarray | None, high: np.ndarray | None) -> str:
    seen = np.array([]) if low is None else np.concatenate([low, high])
    seen = seen[np.isfinite(seen)]
    lines = [] if low is None else [low, high]
    label, fewest, most = escape(q.labels[row]), q.bits[row].min(), q.bits[row].max()
    bits = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    short = label.removeprefix(f"{escape(block_of(q.layers[row]))}.").replace(".", ".<wbr>")
    extremes = "" if not seen.size else f"; seen {seen.min():.3g} .. {seen.max():.3g}"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="ranges of {label}">{_drawing(q, row, lines, seen)}</svg>'
        f"<figcaption>{short}<small>{bits} bits{extremes}</small></figcaption></figure>"
    )


def _drawing(q: Quantizers, row: int, lines: list[np.ndarray], seen: np.ndarray) -> str:
    """lines: (S,) each; seen: their finite values."""
    bottom, top = np.append(seen, q.low[row]).min(), np.append(seen, q.high[row]).max()
    unit = HEIGHT / max(top - bottom, 1e-12)
    step = WIDTH / len(q.timesteps)
    palette = colours(q.groups)
    order = range(len(q.timesteps))[::-1]  # of sampling, from the left

    def y(value: float) -> float:
        return round((top - value) * unit, 1)

    drawn = [f'<path d="M0 {y(0)}H{WIDTH}" class="zero"/>']
    # Groups of one scale can differ in their zero points.
    for _, run in groupby(enumerate(order), key=lambda i: (q.rank[row, i[1]], q.low[row, i[1]])):
        places = list(run)
        column = places[0][1]
        x, width = round(places[0][0] * step, 1), round(len(places) * step, 1)
        above, below = y(q.high[row, column]), y(q.low[row, column])
        drawn.append(
            f'<rect x="{x}" y="{above}" width="{width}" height="{round(below - above, 1)}" '
            f'fill="{palette[q.rank[row, column]]}"/>'
        )
    for values in lines:
        points = [
            f"{round((place + 0.5) * step, 1)},{y(values[column])}"
            for place, column in enumerate(order)
            if np.isfinite(values[column])
        ]
        drawn.append(f'<polyline points="{" ".join(points)}"/>')
    return "".join(drawn)

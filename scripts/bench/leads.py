"""TinyDM against each other method, image by image: rows of cells -> Markdown.

Images of one number have the same noise, so that their differences say more than two intervals of
which each has the spread of the images in it.
"""

import numpy as np

from ..common.markdown import format_table
from . import measure
from .plan import NAMES
from .tables import (
    Interval,
    Line,
    Row,
    common,
    gain,
    lines_of,
    paired,
    seeds_text,
    timesteps_text,
    with_interval,
)

OURS = "tinydm"
LEAD_TITLE = (
    "TinyDM's lead, paired, with 95% intervals; eps: TinyDM's as a part of the other's; images "
    "won: of all seeds:"
)


def _pairs(lines: list[Line]) -> list[tuple[Line, Line]]:
    """TinyDM and another with the same sampler and bits, over the seeds that both have.

    The other is calibrated where TinyDM is, or with the sampler itself.
    """
    found = []
    for own in (line for line in lines if line.cell.label == OURS):
        for other in lines:
            same = (other.sampler, other.cell.bits) == (own.sampler, own.cell.bits)
            fair = not other.transferred or other.rows[0]["calibrated"] == own.rows[0]["calibrated"]
            if same and fair and other.cell.label not in (OURS, "fp"):
                found.append(common(own, other))
    return [(a, b) for a, b in found if a.rows and a.image_mse is not None]


def _mean_gain(own: Line, other: Line) -> tuple[float, Interval]:
    difference = measure.image_psnr(own.image_mse) - measure.image_psnr(other.image_mse)
    return paired(lambda means: means.mean(-1), difference)


def _part(ours: np.ndarray | None, theirs: np.ndarray | None) -> tuple[float, Interval] | None:
    """The part that the mean of our errors (seeds, n) is of theirs, with its interval."""
    if ours is None or theirs is None:
        return None
    return paired(lambda a, b: a.mean(-1) / b.mean(-1), ours, theirs)


def lead_table(rows: list[Row]) -> str:
    """Empty where there is nothing to compare."""
    table = []
    for own, other in _pairs(lines_of(rows)):
        there = "" if other.transferred or not own.transferred else ", calibrated there"
        won, of = np.sum(own.image_mse < other.image_mse), own.image_mse.size
        table.append(
            {
                "Timesteps": timesteps_text(own),
                "Bit-width (W/A)": "{}/{}".format(*own.cell.bits),
                "against": NAMES[other.cell.label] + there,
                "seeds": seeds_text(own),
                "PSNR (dB)": with_interval(gain(own, other), "+.2f"),
                "mean (dB)": with_interval(_mean_gain(own, other), "+.2f"),
                "images won": f"{won} of {of}",
                "eps-MSE": with_interval(_part(own.eps_mse, other.eps_mse), ".3f"),
                "eps weighted": with_interval(_part(own.eps_weighted, other.eps_weighted), ".3f"),
            }
        )
    return format_table(table, list(table[0])) if table else ""

"""The numbers of a cell: paired image errors, eps errors, and their bootstrap intervals.

Images that are compared have the same noise, so that each pair has an error of its own and no
reference is needed. Intervals are of 95 percent, by resampling images (or trajectories); the draws
depend on the number of samples only, so that intervals of differences pair the same images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from quant.bank import Bank
from scripts.common.runs import png_name
from scripts.common.trajectories import answer
from scripts.metrics.inputs import read_image
from scripts.metrics.scores import psnr

RESAMPLES, LEVEL = 2000, 0.95


def image_errors(folder: Path, reference: Path, count: int) -> list[float]:
    """Mean squared error of each of the first `count` images, on the scale of 0..255."""
    errors = []
    for name in map(png_name, range(count)):
        a, b = (read_image(side / name).astype(np.int32) for side in (folder, reference))
        errors.append(float(np.mean((a - b) ** 2, dtype=np.float64)))
    return errors


def eps_errors(
    model: nn.Module, bank: Bank, batch_size: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean squared eps error on full-precision states: per sampling step (S,), per trajectory (N,).

    bank: states with full-precision answers.
    """
    error = (answer(bank, model, batch_size, device).eps - bank.eps).double().square()
    error = error.flatten(2).mean(2)  # (S, N)
    return error.mean(1).tolist(), error.mean(0).tolist()


def pooled_psnr(errors: np.ndarray) -> float:
    """errors (seeds, images): PSNR of the error pooled over images, mean over seeds, in dB."""
    return float(np.mean([psnr(value) for value in errors.mean(1)]))


def median_psnr(errors: np.ndarray) -> float:
    return float(np.mean([np.median([psnr(value) for value in row]) for row in errors]))


def mean(errors: np.ndarray) -> float:
    return float(errors.mean())


def interval(
    statistic: Callable[..., float], *samples: Sequence[Sequence[float]]
) -> tuple[float, float] | None:
    """Percentile bootstrap of statistic(*samples) over the last axis, the same draws for all.

    None with fewer than two samples. Values may be infinite (images without any difference).
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    count = arrays[0].shape[-1]
    if count < 2:
        return None
    random = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        index = random.integers(count, size=count)
        values.append(statistic(*(array[..., index] for array in arrays)))
    rest = (1 - LEVEL) / 2
    low, high = np.quantile(values, [rest, 1 - rest], method="nearest")
    return float(low), float(high)

"""The numbers of a cell: paired image errors, eps errors, and their bootstrap intervals.

Images that are compared have the same noise, so that each pair has an error of its own and no
reference is needed. Intervals are of 95 percent, by resampling images (or trajectories) and, where
there are several, the calibration seeds (hierarchical bootstrap). The draws depend on the numbers
of both only, so that intervals of differences pair the same images and seeds. Noise seeds are no
level of their own: images of one have nothing more in common than those of two.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...models.pipeline import Pipeline
from ...quant.calibration.states import CalibrationStates
from ..experiment.runs import png_name
from ..experiment.trajectories import mean_of_halves, predicted_by
from ..metrics.inputs import read_image
from ..metrics.scores import psnr, squared_error

RESAMPLES, LEVEL = 2000, 0.95
LARGEST_DRAW = 1_000_000  # indices at a time
SMALLEST_SEEN = 1 / 12  # mean squared error of rounding to 8 bits: 58.9 dB


def image_errors(folder: Path, reference: Path, count: int) -> list[float]:
    """Mean squared error of each of the first `count` images, on the scale of 0..255."""
    errors = []
    for name in map(png_name, range(count)):
        errors.append(squared_error(read_image(folder / name), read_image(reference / name)))
    return errors


def eps_error_table(
    model: nn.Module, states: CalibrationStates, pipeline: Pipeline
) -> torch.Tensor:
    """Mean squared eps error at each sampling step of each trajectory, (S, N) float64.

    states: states with full-precision outputs, recorded with this pipeline. With guidance the error
    of a trajectory is the mean of its two halves.
    """
    error = (predicted_by(states, model, pipeline.micro_batch).eps - states.eps).double().square()
    return mean_of_halves(pipeline, error.flatten(2).mean(2))


def eps_errors(
    model: nn.Module, states: CalibrationStates, pipeline: Pipeline
) -> tuple[list[float], list[float]]:
    """The means of eps_error_table: per sampling step (S,), per trajectory (N,)."""
    error = eps_error_table(model, states, pipeline)
    return error.mean(1).tolist(), error.mean(0).tolist()


def weighted_mean(error: torch.Tensor, importance: torch.Tensor) -> list[float]:
    """error (S, N), importance (S,) of the steps -> of each trajectory, weights of mean 1."""
    weight = (importance / importance.mean()).double()
    return (error * weight[:, None]).mean(0).tolist()


def psnr_of_means(means: np.ndarray) -> np.ndarray:
    """means (..., seeds): error pooled over the images of each seed. PSNR, mean over seeds."""
    return psnr(means).mean(-1)


def pooled_psnr(errors: np.ndarray) -> float:
    """errors (seeds, images) -> dB."""
    return float(psnr_of_means(errors.mean(1)))


def image_psnr(errors: np.ndarray) -> np.ndarray:
    """PSNR of each image. Images of 8 bits do not tell smaller errors than their rounding apart,
    and a mean must not hang on the one that happens to be equal: there it is 58.9 dB."""
    return psnr(np.maximum(errors, SMALLEST_SEEN))


def mean_psnr(errors: np.ndarray) -> float:
    """errors (seeds, images) -> dB, each image's own PSNR averaged."""
    return float(image_psnr(errors).mean())


def median_psnr(errors: np.ndarray) -> float:
    """errors (seeds, images) -> dB, the median image of each seed, mean over seeds."""
    return float(np.median(psnr(errors), axis=1).mean())


def interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray
) -> tuple[float, float] | None:
    """Percentile bootstrap over both axes of samples (seeds, n), the same draws for all.

    All calibration seeds have the same n images, so that images and seeds are drawn apart from each
    other. statistic: means (resamples, seeds) of each sample -> (resamples,), may be infinite. None
    with fewer than two images to draw from.
    """
    seeds, count = samples[0].shape
    if count < 2:
        return None
    random, random_seeds = np.random.default_rng(0), np.random.default_rng(1)
    size = max(1, LARGEST_DRAW // count)
    values = []
    for start in range(0, RESAMPLES, size):
        index = random.integers(count, size=(min(size, RESAMPLES - start), count))
        drawn = random_seeds.integers(seeds, size=(len(index), seeds))
        means = [sample[:, index].mean(-1).T for sample in samples]  # (resamples, seeds)
        values.append(statistic(*(np.take_along_axis(each, drawn, 1) for each in means)))
    rest = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(values), [rest, 1 - rest], method="nearest")
    return float(low), float(high)

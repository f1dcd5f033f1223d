"""The numbers: features in, scores out. Knows neither files nor networks.

Shapes: N, M images; D features; K classes. Statistics are float64, features float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..common.errors import MetricError

PEAK = 255.0  # largest value of an 8-bit image
NOISE = 1e-6  # float32 rounding of a squared distance, relative to the squared norms
BLOCK_BYTES = 128 * 2**20  # largest block of pairwise distances held at once


class Moments:
    """Running mean and covariance of feature vectors, in float64, without keeping the vectors.

    The first batch's mean is subtracted from everything, so that the sum of squares does not
    lose the variance to cancellation.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.shift = torch.zeros(dim, dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Add a batch of features (N, D)."""
        x = features.detach().cpu().double()  # (N, D)
        if not torch.isfinite(x).all():
            raise MetricError("the Inception features hold NaN or infinity: damaged weights?")
        if self.count == 0:
            self.shift = x.mean(0)
        x = x - self.shift
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    @property
    def mean(self) -> np.ndarray:
        """The mean of all features added so far, (D,)."""
        return (self.shift + self.sum / self.count).numpy()

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (D, D) with the N - 1 of `numpy.cov`."""
        if self.count < 2:
            raise MetricError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.sum / self.count
        return ((self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)).numpy()


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians with means (D,) and covariances (D, D).

    |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). The last trace is the sum of the singular
    values of A1^T A2 where S = A A^T, so nothing is squared and a rank-deficient S (fewer images
    than features) is exact.
    """
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise MetricError(f"{len(mu1)} and {len(mu2)} features cannot be compared")
    gap = mu1.astype(np.float64) - mu2.astype(np.float64)
    with _one_thread():
        a1, a2 = _factor(sigma1), _factor(sigma2)  # (D, rank1), (D, rank2)
        overlap = float(torch.linalg.svdvals(a1.T @ a2).sum())
    distance = gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave -1e-13


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK on one thread: 1.4 s for D = 2048, where two on busy cores took up to 20 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(sigma: np.ndarray) -> torch.Tensor:
    """A (D, rank) with A A^T = sigma; directions that are only rounding noise are left out."""
    matrix = torch.as_tensor(sigma, dtype=torch.float64)
    if not torch.isfinite(matrix).all():
        raise MetricError("a covariance holds NaN or infinity")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)  # ascending
    smallest, largest = float(values[0]), max(float(values[-1]), 0.0)
    if smallest < -1e-5 * largest or largest == 0 > smallest:
        raise MetricError(f"a covariance has the negative eigenvalue {smallest:.3g}")
    keep = values > largest * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, keep] * values[keep].sqrt()


class InceptionScore:
    """Inception score over splits of consecutive images, as in the ADM evaluator.

    Each split scores exp(mean_x KL(p(y|x) || p(y))); the score is the mean over splits, of which
    the last may be short. Only sums are kept: sum p log p and sum p of each split.
    """

    def __init__(self, split_size: int = 5000):
        self.split_size = split_size
        self.filled = 0  # images in the open split
        self.negentropy = 0.0  # sum over images of sum_y p log p
        self.marginal: torch.Tensor | float = 0.0  # (K,) sum of p
        self.closed: list[float] = []

    def update(self, logits: torch.Tensor) -> None:
        """Add a batch of classifier outputs (N, K), before the softmax."""
        log_p = logits.detach().cpu().double().log_softmax(1)  # (N, K)
        while len(log_p):
            room = self.split_size - self.filled
            part, log_p = log_p[:room], log_p[room:]
            p = part.exp()
            self.negentropy += float((p * part).sum())
            self.marginal = self.marginal + p.sum(0)
            self.filled += len(part)
            if self.filled == self.split_size:
                self.closed.append(self._score())
                self.filled, self.negentropy, self.marginal = 0, 0.0, 0.0

    def _score(self) -> float:
        p = self.marginal / self.filled  # (K,)
        return math.exp(self.negentropy / self.filled - float(torch.special.xlogy(p, p).sum()))

    @property
    def splits(self) -> list[float]:
        """Score of each split, the open one included."""
        return self.closed + ([self._score()] if self.filled else [])

    @property
    def value(self) -> float:
        """Mean score of the splits."""
        return float(np.mean(self.splits))


def precision_recall(
    reference: torch.Tensor, generated: torch.Tensor, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall of features (N, D) and (M, D), both in [0, 1].

    Every point spans a ball that reaches its k-th neighbour in its own set (itself not counted).
    Precision is the share of generated points inside some reference ball; recall the mirror.
    Distances are float32 and computed in blocks; both sets are centred first, for accuracy.
    """
    for name, points in (("reference", reference), ("generated", generated)):
        if len(points) <= k:
            raise MetricError(
                f"precision and recall need more than {k} {name} images, got {len(points)}"
            )
    centre = reference.float().mean(0)
    reference, generated = reference.float() - centre, generated.float() - centre
    reach_ref = _squared_radii(reference, k)  # (N,)
    reach_gen = _squared_radii(generated, k)  # (M,)
    inside_ref = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows in _blocks(len(generated), len(reference)):
        d2 = _squared_distances(generated[rows], reference)  # (b, N)
        inside_ref += int((d2 <= reach_ref).any(1).sum())
        covered |= (d2 <= reach_gen[rows, None]).any(0)
    return inside_ref / len(generated), int(covered.sum()) / len(reference)


def _squared_radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance (N,) of each point to its k-th neighbour in its own set."""
    radii = torch.empty(len(points), device=points.device)
    for rows in _blocks(len(points), len(points)):
        d2 = _squared_distances(points[rows], points)  # (b, N)
        own = torch.arange(len(d2), device=d2.device)
        d2[own, own + rows.start] = 0.0
        radii[rows] = d2.kthvalue(k + 1, dim=1).values
    return radii


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances (n, m) of points (n, D) and (m, D); rounding noise becomes 0."""
    norms = (a * a).sum(1)[:, None] + (b * b).sum(1)[None]  # (n, m)
    d2 = torch.addmm(norms, a, b.T, alpha=-2.0)
    return d2.masked_fill_(d2 < NOISE * norms, 0.0)


def _blocks(rows: int, columns: int) -> list[slice]:
    """Slices over `rows` such that a float32 block with that many columns stays small."""
    size = max(1, BLOCK_BYTES // (4 * columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error of two uint8 images of one shape, on the scale of 0..255."""
    return float(np.mean((a.astype(np.int32) - b) ** 2, dtype=np.float64))


def psnr(mean_squared_error: np.ndarray | float) -> np.ndarray:
    """Peak signal-to-noise ratios in dB of mean squared errors on the 0..255 scale; infinite for
    0."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / np.asarray(mean_squared_error, np.float64))

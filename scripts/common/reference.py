"""Statistics of reference images, small enough to lie in the repository.

The covariance of 2048 features is symmetric: its upper triangle in float32 takes 8 MB instead of
32. `full_statistics` unfolds it once into a file that pytorch-fid reads.
"""

from pathlib import Path

import numpy as np

from .arrays import opened
from .errors import ImageError
from .files import atomic
from .paths import CACHE

LARGEST_MEAN = 8 * 2048  # bytes of Inception's features
LARGEST_TRIANGLE = 8 * 2048 * 2049 // 2


def full_statistics(path: str | Path) -> Path:
    """A .npz with mu and sigma (float64) for a compact file; any other path is returned as it is.

    Raises ImageError for a damaged file.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return path
    with opened(path, ImageError) as archive:
        if "triangle" not in archive.names:
            return path
        mu = archive.read("mu", most=LARGEST_MEAN).astype(np.float64)
        triangle = archive.read("triangle", most=LARGEST_TRIANGLE)
        count = archive.read("n", most=8)
    kinds = mu.dtype.kind + triangle.dtype.kind
    if kinds != "ff" or mu.ndim != 1 or triangle.shape != (len(mu) * (len(mu) + 1) // 2,):
        raise ImageError(f"{path}: damaged statistics (mu and triangle do not fit)")
    target = CACHE / path.name
    if target.exists() and target.stat().st_mtime >= path.stat().st_mtime:
        return target
    sigma = np.zeros((len(mu), len(mu)))
    sigma[np.triu_indices(len(mu))] = triangle
    sigma += np.triu(sigma, 1).T
    with atomic(target) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mu, sigma=sigma, n=count)
    return target

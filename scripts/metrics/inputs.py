"""What the metrics read: image folders, npz image arrays and npz statistics.

Images are streamed as uint8 batches (B, 3, H, W) in the order of their names; no more than two
batches are in memory. Every bad input raises `MetricError` with one line that says what is wrong
and where.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..common.errors import MetricError
from ..common.files import atomic

# What pytorch-fid counts as an image: these endings in lower case, not in sub-folders.
IMAGE_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAY_KEYS = ("x", "arr_0")
LARGEST_STATISTIC = 1e100  # of a mean or a covariance, so that its distances are finite too
MOST_INFLATED = 1100  # bytes that a byte of an archive can stand for, a little more than 1032


@dataclass(frozen=True)
class Statistics:
    """Gaussian of the pool features (2048) and, if known, of the spatial features (2023)."""

    mu: np.ndarray  # (2048,)
    sigma: np.ndarray  # (2048, 2048)
    mu_s: np.ndarray | None = None  # (2023,)
    sigma_s: np.ndarray | None = None  # (2023, 2023)
    n: int | None = None  # images behind the statistics
    preprocess: str | None = None  # resize that was used


@dataclass(frozen=True)
class Source:
    """One side of a comparison: stored statistics, images, or both (ADM reference batches)."""

    path: Path
    statistics: Statistics | None = None
    images: FolderImages | ArrayImages | None = None


class FolderImages:
    """The images of a folder, sorted by name."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.files = list_images(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[torch.Tensor]:
        """Yield uint8 batches (B, 3, H, W): first, first + step, ...; the next one is decoded
        while this one is used."""
        chunks = [self.files[i : i + size] for i in range(0, len(self.files), size)][first::step]
        if not chunks:
            return
        pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        try:
            pending = [pool.submit(read_image, file) for file in chunks[0]]
            shape = read_image(self.files[0]).shape
            for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
                images = [future.result() for future in pending]
                pending = [pool.submit(read_image, file) for file in following]
                for file, image in zip(chunk, images, strict=True):
                    if image.shape != shape:
                        raise MetricError(
                            f"{file}: size {_size(image)} differs from {_size_of(shape)} of "
                            f"{self.files[0].name}; all images of a folder must have one size"
                        )
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class ArrayImages:
    """The uint8 images (N, H, W, 3) of one array in an npz file, read as a stream."""

    def __init__(self, path: str | Path, key: str):
        self.path, self.member = Path(path), f"{key}.npy"
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            with archive.open(self.member) as stream:
                self.shape = self._header(stream)
                claimed = archive.getinfo(self.member).file_size - stream.tell()
                room = min(claimed, MOST_INFLATED * self.path.stat().st_size)
                if math.prod(self.shape) > room:
                    whole = room // math.prod(self.shape[1:])
                    raise EOFError(f"array ends inside image {whole}")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[torch.Tensor]:
        """Yield uint8 batches (B, 3, H, W): first, first + step, ... All are read."""
        each = int(np.prod(self.shape[1:]))  # bytes of one image
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            self._header(stream)
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                with _reading(self.path):
                    data = stream.read(count * each)
                    if len(data) != count * each:
                        raise EOFError(f"array ends inside image {start + len(data) // each}")
                if (start // size - first) % step == 0 and start // size >= first:
                    batch = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    yield batch.view(count, *self.shape[1:]).permute(0, 3, 1, 2)
            with _reading(self.path):
                stream.read(1)  # at the end of the member its checksum is compared

    def _header(self, stream) -> tuple[int, ...]:
        """Read and check the npy header; the stream then stands at the first pixel."""
        old = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise MetricError(
                f"{self.path}: array {self.member[:-4]} is {dtype} {shape}; "
                "expected uint8 (N, H, W, 3) with N > 0 in C order"
            )
        return shape


def list_images(folder: str | Path) -> list[Path]:
    """Image files of a folder sorted by name; sub-folders are not searched."""
    folder = Path(folder)
    if not folder.is_dir():
        problem = "not a folder of images" if folder.exists() else "no such folder"
        raise MetricError(f"{folder}: {problem}")
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix in IMAGE_SUFFIXES)
    except OSError as error:
        raise MetricError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not files:
        raise MetricError(
            f"{folder}: no images (endings in lower case: {' '.join(IMAGE_SUFFIXES)})"
        )
    return files


def read_image(file: Path) -> np.ndarray:
    """Decode one image to uint8 RGB (H, W, 3)."""
    if not file.is_file():  # a pipe would wait for a writer
        raise MetricError(f"{file}: is no file; take it out of the folder")
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise many kinds; each means the same to the user
        raise MetricError(f"{file}: cannot be decoded as an image ({_line(error)})") from error


def open_source(path: str | Path) -> Source:
    """Look at a folder or an npz file and say what it offers."""
    path = Path(path)
    if path.suffix != ".npz":
        return Source(path, images=FolderImages(path))
    if not path.is_file():
        raise MetricError(f"{path}: no such file")
    with _reading(path), np.load(path, allow_pickle=False) as data:
        keys = set(data.files)
        statistics = _read_statistics(path, data) if {"mu", "sigma"} <= keys else None
    key = next((k for k in ARRAY_KEYS if k in keys), None)
    images = ArrayImages(path, key) if key else None
    if statistics is None and images is None:
        raise MetricError(
            f"{path}: holds {', '.join(sorted(keys)) or 'nothing'}; expected mu and sigma "
            "(statistics), or x or arr_0 (images)"
        )
    return Source(path, statistics, images)


def _read_statistics(path: Path, data: np.lib.npyio.NpzFile) -> Statistics:
    """Statistics of an open npz file, checked for shape and finite values."""
    found = {}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in data.files or covariance not in data.files:
            continue
        mu, sigma = data[mean], data[covariance]
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise MetricError(
                f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape} do not fit together"
            )
        for name, array in ((mean, mu), (covariance, sigma)):
            if array.dtype.kind != "f" or not np.abs(array).max() < LARGEST_STATISTIC:
                raise MetricError(f"{path}: {name} is not finite real numbers; make it again")
        if (sigma.diagonal() < 0).any() or not np.allclose(sigma, sigma.T):
            raise MetricError(f"{path}: {covariance} is not a covariance; make it again")
        found |= {mean: mu.astype(np.float64), covariance: sigma.astype(np.float64)}
    if "n" in data.files:
        n = data["n"]
        if n.shape != () or n.dtype.kind not in "iu" or n < 1:
            raise MetricError(f"{path}: n is not a number of images; make it again")
        found["n"] = int(n)
    if "preprocess" in data.files:
        found["preprocess"] = str(data["preprocess"])
    return Statistics(**found)


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write statistics as an npz file that pytorch-fid reads too, all at once or not at all."""
    arrays = {name: value for name, value in vars(statistics).items() if value is not None}
    try:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # to a bare path numpy would append .npz
    except OSError as error:
        raise MetricError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged or hostile npz file raises into one line that names the file."""
    try:
        yield
    except MetricError:
        raise
    except (OSError, ValueError, LookupError, EOFError, TypeError, SyntaxError) as error:
        raise MetricError(f"{path}: not a readable npz file ({_line(error)})") from error
    except MemoryError as error:
        raise MetricError(f"{path}: claims more than memory holds ({_line(error)})") from error
    except (RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise MetricError(f"{path}: damaged npz file ({_line(error)})") from error


def _line(error: BaseException) -> str:
    """First line of an exception's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _size(image: np.ndarray) -> str:
    return _size_of(image.shape)


def _size_of(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"

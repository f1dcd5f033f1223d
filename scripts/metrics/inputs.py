"""What the metrics read: image folders, npz image arrays and npz statistics.

Images are streamed as uint8 batches (B, 3, H, W) in the order of their names; no more than two
batches are in memory. Every bad input raises `MetricError` with one line that says what is wrong
and where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.arrays import Archive, check_images, opened
from ..common.errors import ImageError, MetricError
from ..common.files import atomic
from ..common.images import (
    ENDINGS,
    LARGEST_PICTURE,
    is_other_picture,
    is_picture,
    picture_size,
    read_rgb,
    refuse_root,
)

ARRAY_KEYS = ("x", "arr_0")
LARGEST_STATISTIC = 1e100  # of a mean or a covariance, so that its distances are finite too
MOST_FEATURES = 2048  # of Inception's pool layer; the spatial ones are fewer
LARGEST_WORD = 256  # bytes of a number or of a word


@dataclass(frozen=True)
class Statistics:
    """Gaussian of the pool features (2048) and, if known, of the spatial features (2023)."""

    mu: np.ndarray  # (2048,)
    sigma: np.ndarray  # (2048, 2048)
    mu_s: np.ndarray | None = None  # (2023,)
    sigma_s: np.ndarray | None = None  # (2023, 2023)
    n: int | None = None  # images behind the statistics
    preprocess: str | None = None  # resize that was used
    precision: str | None = None  # of the network that was used


@dataclass(frozen=True)
class Source:
    """One side of a comparison: stored statistics, images, or both (ADM reference batches)."""

    path: Path
    statistics: Statistics | None = None
    images: FolderImages | ArrayImages | None = None


class FolderImages:
    """The images of a folder, sorted by name. notes: where pytorch-fid would count others."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.files, self.notes = _listed(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[torch.Tensor]:
        """Yield uint8 batches (B, 3, H, W): first, first + step, ...; the next one is decoded
        while this one is used. All images have the size of the first one, or are not decoded."""
        chunks = [self.files[i : i + size] for i in range(0, len(self.files), size)][first::step]
        if not chunks:
            return
        shape = _told(picture_size, self.files[0])
        read = partial(self._read, size=shape)
        pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        try:
            pending = [pool.submit(read, file) for file in chunks[0]]
            for following in [*chunks[1:], []]:
                images = [future.result() for future in pending]
                pending = [pool.submit(read, file) for file in following]
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, file: Path, size: tuple[int, int]) -> np.ndarray:
        try:
            return read_image(file, size)
        except MetricError as error:
            if "differs from" not in str(error):
                raise
            rule = f"of {self.files[0].name}; all images of a folder must have one size"
            raise MetricError(f"{error} {rule}") from error


class ArrayImages:
    """The uint8 images (N, H, W, 3) of one array in an npz file, read as a stream."""

    def __init__(self, path: str | Path, key: str):
        self.path, self.key, self.notes = Path(path), key, []
        with opened(self.path, MetricError) as archive:
            self.shape = check_images(archive, key).shape
            if math.prod(self.shape[1:3]) > LARGEST_PICTURE:
                archive.refuse(key, f"holds images of more than {LARGEST_PICTURE:,} pixels")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[torch.Tensor]:
        """Yield uint8 batches (B, 3, H, W): first, first + step, ... All are read."""
        each = math.prod(self.shape[1:])  # bytes of one image
        with ExitStack() as stack:
            archive = stack.enter_context(opened(self.path, MetricError))
            stream, _ = stack.enter_context(archive.open(self.key))
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                data = stream.read(count * each)
                if len(data) != count * each:
                    archive.refuse(self.key, f"ends inside image {start + len(data) // each}")
                if (start // size - first) % step == 0 and start // size >= first:
                    batch = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    yield batch.view(count, *self.shape[1:]).permute(0, 3, 1, 2)
            stream.read(1)  # at the end of the member its checksum is compared


def list_images(folder: str | Path) -> list[Path]:
    """Image files of a folder sorted by name; where it has none, those of its sub-folders."""
    return _listed(Path(folder))[0]


def _listed(folder: Path) -> tuple[list[Path], list[str]]:
    """The images that count, and in what pytorch-fid would differ."""
    if not folder.is_dir():
        problem = "not a folder of images" if folder.exists() else "no such folder"
        raise MetricError(f"{folder}: {problem}")
    _told(refuse_root, folder)
    try:
        entries = sorted(folder.iterdir())
        files = [f for f in entries if is_picture(f) and not f.is_dir()]
        below = [
            f
            for inner in entries
            if inner.is_dir()
            for f in sorted(inner.rglob("*"))
            if is_picture(f) and not f.is_dir()
        ]
    except OSError as error:
        raise MetricError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not files and not below:
        raise MetricError(f"{folder}: no images ({' '.join(ENDINGS)}, small or capital letters)")
    notes = []
    if not files:
        notes.append(f"{len(below)} images of sub-folders, which pytorch-fid does not search")
        files = below
    elif below:
        notes.append(f"{len(below)} more images in sub-folders are not counted")
    others = [f for f in entries if is_other_picture(f) and not f.is_dir()]
    if others:
        notes.append(
            f"{len(others)} files are not counted for their endings, such as {others[0].name}"
        )
    capital = [f for f in files if f.suffix not in ENDINGS]
    if capital:
        such = f"endings in capitals ({capital[0].name})"
        notes.append(f"{len(capital)} of {len(files)} images have {such}, which pytorch-fid skips")
    return files, notes


def read_image(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode one image to uint8 RGB (H, W, 3). size: width and height that it must have."""
    return np.asarray(_told(read_rgb, file, size=size))


def _told(read: Callable, file: Path, **options: Any) -> Any:
    """What `read` gives; an image that cannot be read cannot be scored."""
    try:
        return read(file, **options)
    except ImageError as error:
        raise MetricError(str(error)) from error


def open_source(path: str | Path) -> Source:
    """Look at a folder or an npz file and say what it offers."""
    path = Path(path)
    if path.suffix != ".npz" or path.is_dir():
        return Source(path, images=FolderImages(path))
    if not path.is_file():
        raise MetricError(f"{path}: no such file")
    with opened(path, MetricError) as archive:
        keys = archive.names
        statistics = _read_statistics(archive) if {"mu", "sigma"} <= keys else None
    key = next((k for k in ARRAY_KEYS if k in keys), None)
    images = ArrayImages(path, key) if key else None
    if statistics is None and images is None:
        raise MetricError(
            f"{path}: holds {', '.join(sorted(keys)) or 'nothing'}; expected mu and sigma "
            "(statistics), or x or arr_0 (images)"
        )
    return Source(path, statistics, images)


def _read_statistics(archive: Archive) -> Statistics:
    """Statistics of an open npz file, checked for shape and finite values."""
    path = archive.path
    found: dict[str, Any] = {}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if not {mean, covariance} <= archive.names:
            continue
        shape, square = (archive.header(name).shape for name in (mean, covariance))
        if len(shape) != 1 or square != 2 * shape:
            raise MetricError(
                f"{path}: {mean} {shape} and {covariance} {square} do not fit together"
            )
        if not 0 < shape[0] <= MOST_FEATURES:
            archive.refuse(mean, f"has {shape[0]} features; they are at most {MOST_FEATURES}")
        arrays = []
        for name in (mean, covariance):
            if archive.header(name).dtype.kind != "f":
                raise MetricError(f"{path}: {name} is not finite real numbers; make it again")
            arrays.append(archive.read(name, most=16 * MOST_FEATURES**2).astype(np.float64))
            if not np.abs(arrays[-1]).max() < LARGEST_STATISTIC:
                raise MetricError(f"{path}: {name} is not finite real numbers; make it again")
        mu, sigma = arrays
        if (sigma.diagonal() < 0).any() or not np.allclose(sigma, sigma.T):
            raise MetricError(f"{path}: {covariance} is not a covariance; make it again")
        found |= {mean: mu, covariance: sigma}
    if "n" in archive.names:
        n = archive.read("n", most=LARGEST_WORD)
        if n.shape != () or n.dtype.kind not in "iu" or n < 1:
            raise MetricError(f"{path}: n is not a number of images; make it again")
        found["n"] = int(n)
    for name in ("preprocess", "precision"):
        if name in archive.names:
            found[name] = str(archive.read(name, most=LARGEST_WORD))
    return Statistics(**found)


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write statistics as an npz file that pytorch-fid reads too, all at once or not at all."""
    arrays = {name: value for name, value in vars(statistics).items() if value is not None}
    try:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # to a bare path numpy would append .npz
    except OSError as error:
        raise MetricError(f"{path}: cannot be written ({error.strerror or error})") from error

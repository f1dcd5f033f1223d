"""Arrays in .npz files that others made: their headers are looked at before anything is read.

    with opened(path, MetricError) as archive:
        header = archive.header("x")
        x = archive.read("x", most=2**20)

Nothing is unpickled, and memory is taken for no more than a header and the archive both say.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

MOST_INFLATED = 1100  # bytes that a byte of an archive can stand for, a little more than 1032
LIKELY_INFLATED = 200  # of images: flat drawings are at 30
SMALL = 64 * 2**20  # bytes that may be inflated from whatever there is
LARGEST_HEADER = 10_000
# Of bzip2 and LZMA zipfile inflates 4 kB at once, whatever they stand for.
COMPRESSED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Header:
    """What an array says about itself; inflated: bytes of it for each that is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int  # of the values, in bytes
    inflated: float

    @property
    def nbytes(self) -> int:
        """Bytes of the array's values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """An open .npz. names: of its arrays."""

    def __init__(self, path: Path, file: zipfile.ZipFile, error: type[Exception]):
        self.path, self.file, self.error = path, file, error
        self._members = {name.removesuffix(".npy"): name for name in file.namelist()}

    @property
    def names(self) -> set[str]:
        return set(self._members)

    def refuse(self, name: str, why: str) -> NoReturn:
        raise self.error(f"{self.path}: member {self._members.get(name, name)} {why}")

    def header(self, name: str) -> Header:
        with self.open(name) as (_, header):
            return header

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[IO[bytes], Header]]:
        """A stream that stands at the first value, and the header before it."""
        if name not in self._members:
            there = ", ".join(sorted(self.names)[:8]) or "nothing"
            self.refuse(name, f"is missing; the file holds {there}")
        info = self.file.getinfo(self._members[name])
        if info.compress_type not in COMPRESSED:
            self.refuse(name, "is compressed as NumPy compresses none; save it with numpy.savez")
        with self.file.open(info) as stream:
            yield stream, self._header(name, stream, info)

    def _header(self, name: str, stream: IO[bytes], info: zipfile.ZipInfo) -> Header:
        try:
            old = np.lib.format.read_magic(stream) == (1, 0)
            form = np.lib.format
            read = form.read_array_header_1_0 if old else form.read_array_header_2_0
            shape, fortran, dtype = read(stream, max_header_size=LARGEST_HEADER)
        except (zlib.error, zipfile.BadZipFile, EOFError):
            raise
        except Exception as error:  # numpy has many for what is no header
            self.refuse(name, f"is no array ({first_line(error)})")
        if dtype.hasobject:
            self.refuse(name, "holds Python objects, not numbers")
        if dtype.itemsize == 0 or min(shape, default=0) < 0:
            self.refuse(name, f"is {dtype} {shape}; expected sizes N > 0")
        inflated = info.file_size / max(info.compress_size, 1)
        return Header(tuple(shape), dtype, bool(fortran), stream.tell(), inflated)

    def held(self, name: str, header: Header) -> int:
        """Bytes of values that the archive can hold for an array, whatever its header claims."""
        info = self.file.getinfo(self._members[name])
        return min(info.file_size - header.start, MOST_INFLATED * self.path.stat().st_size)

    def read(self, name: str, most: int) -> np.ndarray:
        """A whole array. most: bytes of a sensible one."""
        with self.open(name) as (stream, header):
            claim, held = header.nbytes, self.held(name, header)
            if claim > most:
                self.refuse(name, f"claims {claim:,} bytes, at most {most:,} are sensible")
            if claim > held:
                self.refuse(name, f"claims {claim:,} bytes and holds {held:,}; it is cut short")
            data = stream.read(claim)
            if len(data) != claim:
                self.refuse(name, "is cut short")
            stream.read(1)  # at its end the checksum is compared
        order = "F" if header.fortran else "C"
        return np.frombuffer(bytearray(data), header.dtype).reshape(header.shape, order=order)


@contextmanager
def opened(path: str | Path, error: type[Exception]) -> Iterator[Archive]:
    """Raises `error`, of one line that names the file, for whatever a damaged one causes."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise error(f"{path}: is no file")  # a pipe would wait for a writer
    try:
        with zipfile.ZipFile(path) as file:
            yield Archive(path, file, error)
    except error:
        raise
    except MemoryError as problem:
        raise error(f"{path}: there is not enough memory to read it") from problem
    except DAMAGE as problem:
        if _is_plain_array(path):
            advice = "save it with numpy.savez(FILE, x=ARRAY)"
            raise error(f"{path}: one .npy array under the name .npz; {advice}") from problem
        what = "not a readable npz file"
        raise error(f"{path}: {what} ({first_line(problem)})") from problem


def _is_plain_array(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(6) == np.lib.format.MAGIC_PREFIX
    except OSError:
        return False


def first_line(error: BaseException) -> str:
    """First line of an exception's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_images(archive: Archive, name: str) -> Header:
    """The header of uint8 images (N, H, W, 3) in C order, whose values are there."""
    header = archive.header(name)
    shape, dtype = header.shape, header.dtype
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or header.fortran or min(shape) < 1:
        archive.refuse(
            name, f"is {dtype} {shape}; expected uint8 (N, H, W, 3) with N > 0 in C order"
        )
    held = archive.held(name, header)
    if header.nbytes > held:
        whole = held // math.prod(shape[1:])
        archive.refuse(name, f"claims {shape[0]} images: the array ends inside image {whole}")
    return header

"""From the C++ files of cpp/ to a loaded library, which is kept for the next start.

It lies in a folder of the user alone (XDG_CACHE_HOME/tinydm, by default ~/.cache/tinydm) under a
name that stands for the sources, the compiler, its options and the processor, and for its own
content: a file that was damaged, or that somebody else can write, is not loaded but made again.
Where there is no such folder the library is built for this process only.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = Path(__file__).with_name("cpp")
# The slowest first.
SOURCE_NAMES = ("tiles_narrow", "tiles_wide", "products", "float_layer", "codes", "layer")
SOURCES = tuple(FOLDER / f"{name}.cpp" for name in SOURCE_NAMES)
COMPILERS = ("g++", "clang++", "c++")
# Without contraction a multiplication and an addition round twice, as PyTorch's own passes do.
SPEED_FLAGS = ("-O3", "-mprefer-vector-width=512")
EXACTNESS_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LANGUAGE_FLAGS = ("-std=c++17", "-fopenmp", "-fPIC")
# What vectors.h takes the instructions from: by default the processor's own, of which it uses the
# best. Flags of the compiler, and what Linux calls the instructions that these need.
_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512_VNNI = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni")
INSTRUCTIONS: dict[str | None, tuple[tuple[str, ...], tuple[str, ...]]] = {
    None: (("-march=native",), ()),
    "avx2": (tuple(f"-m{name}" for name in _AVX2), _AVX2),
    "avx-vnni": ((*(f"-m{name}" for name in _AVX2), "-mavxvnni"), (*_AVX2, "avx_vnni")),
    "avx512-vnni": (("-march=native",), _AVX512_VNNI),
}
KEPT_LIBRARIES = 16  # libraries of a cache, the newest
LONGEST_SECONDS = 1200  # of one command of the compiler
STALE_SECONDS = 3600  # after that a folder of objects has no writer any more


class CompileError(RuntimeError):
    """The code cannot be compiled here; the message says what is missing, in one line."""


def library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled functions, from the cache or built. instructions: a key of INSTRUCTIONS, by
    default the best that this processor has. Raises CompileError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CompileError(f"no C++ compiler ({', '.join(COMPILERS)})")
    flags, needed = INSTRUCTIONS[instructions]
    model, known = _processor()
    missing = [name for name in needed if name not in known]
    if missing:
        raise CompileError(f"this processor lacks {', '.join(missing)}")
    key = _key(compiler, flags, (model, *sorted(known)))
    cache = private_cache()
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return _loaded(_build(compiler, flags, Path(folder)), compiler)
    if (kept := _kept(cache, key)) is not None:
        return kept
    try:
        with _turn(cache), _workplace(cache) as folder:
            if (kept := _kept(cache, key)) is not None:  # another process has built it meanwhile
                return kept
            made = _build(compiler, flags, folder)
            file = cache / f"{key}-{_digest(made.read_bytes())}.so"
            os.replace(made, file)
    except OSError as error:
        raise CompileError(f"{cache}: {error.strerror or error}") from error
    _clean(cache)
    return _loaded(file, compiler)


def instructions_here() -> list[str]:
    """The keys of INSTRUCTIONS whose instructions this processor has, as far as Linux says so."""
    _, known = _processor()
    return [name for name, (_, needed) in INSTRUCTIONS.items() if name and known.issuperset(needed)]


def private_cache() -> Path | None:
    """The folder of compiled libraries, made if need be: the user's own, writable by nobody else.
    None where there is no such place."""
    if not hasattr(os, "getuid"):
        return None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        if not os.path.isabs(base):  # as XDG wants it
            return None
        folder = Path(base) / "tinydm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = _is_private(folder.lstat(), stat.S_ISDIR) and os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return folder if usable else None


def _kept(cache: Path, key: str) -> ctypes.CDLL | None:
    """The library of this key in the cache, if there is one that can be loaded."""
    for file in sorted(cache.glob(f"{key}-*.so")):
        if _is_whole(file):
            with suppress(OSError):  # what the system's libraries have outgrown is built again
                return ctypes.CDLL(str(file))
    return None


def _is_private(status: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """Whether a file is of a kind (a function of `stat`), ours, and writable by nobody else."""
    shared = stat.S_IWGRP | stat.S_IWOTH
    return kind(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & shared


def _is_whole(file: Path) -> bool:
    """Whether it is ours alone and has the content that its name promises."""
    try:
        if not _is_private(file.lstat(), stat.S_ISREG):
            return False
        return _digest(file.read_bytes()) == file.stem.rpartition("-")[2]
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _key(compiler: str, flags: tuple[str, ...], processor: tuple[str, ...]) -> str:
    """Stands for all that the library depends on. A compiler is known by its file."""
    path = Path(compiler).resolve()
    status = path.stat()
    parts = [str(path), str(status.st_size), str(status.st_mtime_ns), *processor]
    parts += [*flags, *SPEED_FLAGS, *EXACTNESS_FLAGS, *LANGUAGE_FLAGS]
    sources = sorted({*SOURCES, *FOLDER.glob("*.h")})
    parts += [f"{path.name}:{_digest(path.read_bytes())}" for path in sources if path.exists()]
    return _digest("\0".join(parts).encode())


def _processor() -> tuple[str, frozenset[str]]:
    """Name of the processor, and its flags as Linux lists them; none on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor(), frozenset()
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model", "model name", "stepping")
    model = " ".join(first.get(name, "") for name in names)
    return f"{platform.machine()} {model}", frozenset(first.get("flags", "").split())


@contextmanager
def _turn(cache: Path) -> Iterator[None]:
    """One process builds at a time, so that those that start together do not all compile the same.
    Where the file system knows no locks of folders they do."""
    import fcntl  # where there is a private cache there is this

    folder = os.open(cache, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def _workplace(cache: Path) -> Iterator[Path]:
    """A folder beside the libraries, so that what is made there can be renamed."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        yield Path(folder)


def _clean(cache: Path) -> None:
    """Removes all but the newest libraries, and what killed processes left."""
    with suppress(OSError):
        files = sorted(cache.glob("*.so"), key=lambda file: -file.lstat().st_mtime)
        for file in files[KEPT_LIBRARIES:]:
            file.unlink(missing_ok=True)
        for folder in cache.glob("build-*"):
            if time.time() - folder.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _build(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """The library, made in the folder."""
    file = folder / "compiled.so"
    objects = [folder / f"{source.stem}.o" for source in SOURCES]

    def run(*arguments: str | Path) -> None:
        command = [compiler, *LANGUAGE_FLAGS, *map(str, arguments)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{compiler}: no answer in {LONGEST_SECONDS} s") from error
        except OSError as error:
            raise CompileError(f"{compiler}: cannot be run ({error.strerror})") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            line = next((line for line in lines if "error" in line), lines[-1])
            raise CompileError(f"{compiler}: {line[:200]}")

    def translate(source: Path, result: Path) -> None:
        run(*SPEED_FLAGS, *flags, *EXACTNESS_FLAGS, "-c", source, "-o", result)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(translate, SOURCES, objects))
    run("-shared", *objects, "-o", file)
    if not file.exists():
        raise CompileError(f"what {compiler} made cannot be loaded: there is nothing")
    file.chmod(0o700)
    return file


def _loaded(file: Path, compiler: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise CompileError(f"what {compiler} made cannot be loaded: {error}") from error

"""Files that are whole or absent: everything is written under a temporary name, then renamed."""

import errno
import glob
import hashlib
import json
import os
import re
import socket
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import ConfigError

LARGEST_TEXT = 1 << 24  # bytes: a hundred thousand prompts are fewer
BESIDE = ".identity.json.host.1234567.tmp"  # what a folder's name may be longer by
STALE_SECONDS = 3600  # after that a temporary of another machine has no writer any more


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname()) or "host"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


@contextmanager
def atomic(path: str | Path, make_folder: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it to `path` when the block succeeds.

    make_folder: make the folder if it is not there.

    The temporary does not end in the suffix of `path`, so that nobody takes it for an image.
    An OSError without a file name (a full disk) gets that of `path`. Raises ConfigError for the
    name of a pipe or a device, in whose place a file would be put.
    """
    path = Path(path)
    check_output(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: str | Path, name: str = "") -> int:
    """Remove the temporaries that killed processes left in a folder; returns how many.

    name: what the files begin with. Those of a living process of this machine stay, as do those of
    other machines for an hour.
    """
    removed = 0
    for path in Path(folder).glob(f".{glob.escape(name)}*.tmp"):
        *_, host, pid, _ = ["", "", *path.name.rsplit(".", 3)]
        if not pid.isdecimal():
            continue  # not one of ours
        if host == _host():
            stale = not _is_other_process(int(pid))
        else:
            stale = time.time() - path.stat().st_mtime > STALE_SECONDS
        if stale:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_other_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8; bytes of a path that is not UTF-8 are written as escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Adds lines to a log, encoded as by write_text."""
    with open(regular(Path(path)), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON. Raises ValueError for numbers that are not finite."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def digest_of_file(path: str | Path, kind: str = "sha256") -> str:
    """The digest of a file in hexadecimal, read in parts. kind: a name of hashlib."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Output:
    """A file that torch.save writes to, which turns what a write raises into errors of its own."""

    def __init__(self, handle: BinaryIO):
        self.handle = handle
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            return self.handle.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.handle.flush()


def save_tensors(path: str | Path, value: Any) -> None:
    """torch.save of plain containers of tensors and numbers (read back with weights_only=True).

    Needs no memory for a second copy. Raises OSError (a full disk) as the other writers do.
    """
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        output = _Output(handle)
        try:
            torch.save(value, output)
        except RuntimeError as error:
            raise output.error or error from None


def load_tensors(path: str | Path) -> Any:
    """What save_tensors wrote, on the CPU. Raises whatever a damaged file makes it raise."""
    with zipfile.ZipFile(regular(Path(path))) as archive:  # torch does not compare the checksums
        if archive.testzip() is not None:
            raise ValueError("a checksum does not match")
    return torch.load(path, weights_only=True, map_location="cpu")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8. Raises ConfigError for what is none: a pipe would wait for a writer, a
    device would never end."""
    if not str(path):
        raise ConfigError("'' is no name of a file")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"{path}: cannot be read (is no file)")
        if os.path.exists(path) and os.path.getsize(path) > LARGEST_TEXT:
            raise ConfigError(f"{path}: cannot be read (larger than {LARGEST_TEXT >> 20} MiB)")
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ConfigError(f"{path}: cannot be read ({reason})") from error


def regular(path: Path) -> Path:
    """The path itself. Raises OSError for what is there and no file: a pipe would wait for another
    process, a device never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file", str(path))
    return path


def check_output(path: str | Path) -> str:
    """The name of a file that is to be written. Raises ConfigError where none can be."""
    if not Path(path).name:
        raise ConfigError(f"'{path}' is no name of a file")
    if os.path.lexists(path) and (not os.path.isfile(path) or _is_of_the_system(path)):
        raise ConfigError(f"{path}: there is something else than a file; give another name")
    _check_folders(path, Path(path).parents)
    _check_length(path, _temporary(Path(path)))
    return str(path)


def _check_length(path: str | Path, longest: str | Path) -> None:
    """longest: of the names that `path` leads to."""
    try:
        os.lstat(longest)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{path}: {error.strerror}; give another name") from error


def _is_of_the_system(path: str | Path) -> bool:
    """/dev/stdout is a file where the output goes to one; renaming would replace the device."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    return folder == "/dev" or folder.startswith("/proc/")


def check_folder(path: str | Path) -> str:
    """The name of a folder that is to be written to. Raises ConfigError where none can be."""
    if not str(path):
        raise ConfigError("'' is no name of a folder")
    if os.path.realpath(path) == os.path.realpath(os.sep):  # as of "$UNSET/"
        raise ConfigError(f"{path}: is the root of all files; give another name")
    _check_folders(path, (Path(path), *Path(path).parents))
    _check_length(path, f"{path}{BESIDE}")
    return str(path)


def _check_folders(path: str | Path, parts: Iterable[Path]) -> None:
    """The first that is there, from the last one on, is a folder: the others can be made in it."""
    first = next((part for part in parts if os.path.lexists(part)), None)
    if first is not None and not os.path.isdir(first):
        raise ConfigError(f"{path}: {first} is no folder; give another name")


def refuse_overwriting(option: str, path: str | Path, *read: str | Path | None) -> None:
    """Raises ConfigError if a file that is to be written is one of those that are read."""
    for other in (Path(name) for name in read if name is not None):
        if os.path.exists(other) and os.path.realpath(other) == os.path.realpath(path):
            raise ConfigError(f"{option} {path}: would overwrite what is read; choose another name")

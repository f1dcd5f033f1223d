"""What makes a folder of images one run: its identity, its missing files, its reports.

The folder holds images alone, since pytorch-fid counts every image in it. What is told about it
lies beside it under its name: runs/x/images -> runs/x/images.report.json and so on.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..common.errors import RunError
from ..common.files import regular, remove_stale, write_json
from ..common.images import is_picture, is_whole_png
from ..common.schema import printable

WAIT_SECONDS = 600
HOLDER = "process"  # the text of a lock begins with it
# Keys that an identity leaves out at these values: runs of before there was a choice had them.
EARLIER: Mapping[str, Any] = {"precision": "float32", "decode_batch": 1}
NUMBERED = re.compile(r"[0-9]{6}\.png")


def beside(folder: str | Path, suffix: str) -> Path:
    """runs/x/images, "report.json" -> runs/x/images.report.json; of a link, beside its target."""
    folder = Path(folder)
    if folder.is_symlink() or not folder.name:
        folder = Path(os.path.realpath(folder))
    return folder.parent / f"{folder.name}.{suffix}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: the file is there, and locked, while the block runs.

    The lock of a killed process is free again, whatever it left. Raises RunError if another holds
    it. A file system that has no locks lets everyone in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = _lock_file(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = printable(os.pread(file, 200, 0).decode("utf-8", "replace"))
            os.close(file)
            raise RunError(f"{path}: held by {holder or 'a process'}; wait for it") from None
        except OSError:
            break
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            break
        os.close(file)  # the holder before us removed this one just now
    try:
        with suppress(OSError):  # on a full disk nobody reads who holds it
            os.ftruncate(file, 0)
            os.pwrite(file, f"{HOLDER} {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _lock_file(path: Path) -> int:
    """A file descriptor of the lock. Raises RunError where something else has its name: a lock is
    emptied, and removed at the end."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise RunError(f"{path}: is no lock, and has the name of one; rename it") from error
        raise
    status = os.fstat(file)
    ours = stat.S_ISREG(status.st_mode) and status.st_nlink <= 1
    if not ours or os.pread(file, len(HOLDER), 0) not in (b"", HOLDER.encode()):
        os.close(file)
        raise RunError(f"{path}: is no lock, and has the name of one; rename it")
    return file


def digest_of(values: Mapping[str, Any]) -> str:
    """sha256 of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def png_name(index: int) -> str:
    """The file of the image with that number."""
    return f"{index:06d}.png"


def missing_images(folder: Path, count: int) -> list[int]:
    """Indices below `count` without a whole PNG."""
    return [index for index in range(count) if not is_whole_png(folder / png_name(index))]


def pictures_of(folder: Path) -> list[Path]:
    """Every image of a folder by name, whoever made it: a score counts them all."""
    return sorted(path for path in folder.iterdir() if is_picture(path) and not path.is_dir())


def surplus_images(folder: Path, count: int) -> list[str]:
    """Names of the images in the folder that are none of the first `count`."""
    wanted = {png_name(index) for index in range(count)}
    return [path.name for path in pictures_of(folder) if path.name not in wanted]


def claim(
    folder: Path, identity: Mapping[str, Any], overwrite: bool = False, rank: int = 0
) -> None:
    """Make the folder this run's: new, or the same run continued. Other ranks wait for rank 0.

    Raises RunError, which says what differs, for a folder of another run; with `overwrite` its
    images are removed instead, unless there are some that no run makes.
    """
    note = beside(folder, "identity.json")
    if rank != 0:
        _wait_for(note, identity)
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = _read(note)
    same = found is not None and digest_of(found) == digest_of(identity)
    images = pictures_of(folder)
    if images and not same:
        foreign = [path.name for path in images if not NUMBERED.fullmatch(path.name)]
        if foreign:
            raise RunError(f"{folder}: holds other images, such as {foreign[0]}; choose another")
        if not overwrite:
            what = "images of an unknown run" if found is None else _difference(found, identity)
            raise RunError(f"{folder}: holds another run: {what} (--overwrite removes it)")
        note.unlink(missing_ok=True)  # a run killed from here on must not pass for the old one
        for path in images:
            path.unlink()
    remove_stale(folder)
    remove_stale(note.parent, note.name.removesuffix("identity.json"))
    if not same:
        write_json(note, dict(identity))


def _wait_for(note: Path, identity: Mapping[str, Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = _read(note)
        if found is not None and digest_of(found) == digest_of(identity):
            return
        if time.monotonic() > deadline:
            raise RunError(f"{note}: rank 0 has not claimed the folder in {WAIT_SECONDS} s")
        time.sleep(0.2)


def _read(note: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(regular(note).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}  # damaged: no run is the same
    return value if isinstance(value, dict) else {}


def _difference(found: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """The first keys whose values differ: "sampler.steps is 50, asked 100"."""
    there, asked = EARLIER | _flat(found), EARLIER | _flat(identity)
    keys = [k for k in sorted({**there, **asked}) if there.get(k) != asked.get(k)]
    shown = [f"{k} is {_short(there.get(k))}, asked {_short(asked.get(k))}" for k in keys[:3]]
    return "; ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

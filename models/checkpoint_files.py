"""Safe reading of checkpoint files: what is in them, without running anything.

Used by `checkpoint` and `diffusers_folder`. Every way in which a file can be wrong becomes a
CheckpointError of one line.
"""

import errno
import io
import math
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from .pickle_scan import LARGEST_PICKLE, UnsafePickleError, scan_pickles

State = dict[str, torch.Tensor]

# Classes that public checkpoints name but that hold no weights. Nothing else is ever admitted.
HARMLESS_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
)
WEIGHTS = ("ema", "raw")
AGAIN = "download it again"
# How PyTorch, oneDNN, NumPy, safetensors and the loaders of libraries say it.
OUT_OF_MEMORY = re.compile(
    "can.?t allocate|cannot allocate|unable to allocate|std::bad_alloc|out of memory"
    "|could not create a (memory|primitive)|could not execute a primitive"
    "|unable to mmap|failed to map segment|can.?t start new thread"
    "|resource temporarily unavailable"  # of a thread in C++
    "|without exception set|without setting an exception",  # of a C function in Python itself
    re.IGNORECASE,
)
NOT_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)

# First bytes of what people download instead of a checkpoint.
POINTER = b"version https://git-lfs"
FOREIGN = (
    (POINTER, "a Git LFS pointer, not the weights", "run git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and name the checkpoint inside"),
    (b"Rar!", "a RAR archive", "unpack it and name the checkpoint inside"),
    (
        b"GGUF",
        "a GGUF file, whose weights are quantized already",
        "use the full-precision .safetensors or .ckpt of the same model",
    ),
    (b"\x89HDF", "an HDF5 file", "use the PyTorch version of the checkpoint"),
)


class CheckpointError(ValueError):
    """One line: which file, what is wrong with it, what to do."""


class NotACheckpointError(CheckpointError):
    """Damaged, empty or of another kind, a web page for example: not worth keeping."""


class HarmlessClass:
    """Stands in for a class of HARMLESS_CLASSES."""


# ---- errors ----


def printable(text: object, limit: int = 200) -> str:
    """One line of printable characters: names in a hostile file may hold anything."""
    text = str(text).encode(errors="backslashreplace").decode()  # bytes of a path, not UTF-8
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[:limit] + "..."


def failure(
    path: object, what: str, advice: str, kind: type[CheckpointError] = CheckpointError
) -> CheckpointError:
    """The error of a file: what is wrong with it, and what to do."""
    return kind(f"{printable(path, 500)}: {printable(what, 700)}; {advice}")


def listing(names: list[str]) -> str:
    """The first six names, and how many more there are."""
    shown = ", ".join(printable(name, 60) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    if reason := unreadable_now(error, path):
        return failure(path, reason, "the file itself may be whole")
    # torch wraps its reason in advice to load without protection; keep the reason alone
    text = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
    reason = f"{type(error).__name__}: {printable(text) or 'no details'}"
    return failure(path, f"cut short or damaged ({reason})", AGAIN, NotACheckpointError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, the loader of a library or a new thread found no room."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError | OSError | ImportError | SystemError)
    return told and OUT_OF_MEMORY.search(str(error)) is not None


def unreadable_now(error: Exception, path: Path) -> str | None:
    """What kept a file from being read, if that says nothing about it: no memory, no permission.

    Memory for more than the file holds is asked for by a damaged length in it.
    """
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})" if error.errno in NOT_OF_THE_FILE else None
    exhausted = is_out_of_memory(error)
    if exhausted and not isinstance(error, MemoryError):
        asked = re.search(r"allocate (\d+) bytes", str(error))
        size = path.stat().st_size if path.is_file() else math.inf
        exhausted = asked is None or int(asked[1]) <= size
    return "not enough memory to read it" if exhausted else None


def guarded(path: Path, action: Callable[[], Any]) -> Any:
    """Run `action`; whatever exception damaged input makes it raise becomes a CheckpointError."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


# ---- files ----


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; false where nobody may look."""
    try:
        return path.is_dir()
    except OSError:  # no permission to look: opening it will say so
        return False


def size_of(path: Path) -> int:
    """Bytes of a regular file that is not empty."""
    try:
        if not path.exists():
            raise failure(path, "no such file", "check the path or download the checkpoint")
        if not path.is_file():
            raise failure(path, "not a regular file", "name a checkpoint file")
        size = path.stat().st_size
    except OSError as error:
        raise failure(path, f"cannot be read ({error.strerror})", "check the path") from error
    if size == 0:
        raise failure(path, "the file is empty", AGAIN, NotACheckpointError)
    return size


class _Bounded(io.BufferedReader):
    """A file whose reads ask for no more than there is: a damaged length of gigabytes, taken as it
    is, would be allocated before the file turns out to be short."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "rb"))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def open_file(path: Path) -> BinaryIO:
    """The file, open for reading. Raises CheckpointError."""
    try:
        return _Bounded(path)
    except OSError as error:
        raise failure(
            path, f"cannot be read ({error.strerror})", "check its permissions"
        ) from error


def read_file(path: Path) -> object:
    """What a checkpoint file holds, whole: recognised by its first bytes, not by its name."""
    size = size_of(path)
    with open_file(path) as file:
        head = file.read(512)
    if _looks_like_safetensors(head, size):
        return safetensors.torch.load_file(path, device="cpu")
    _refuse_foreign(path, head)
    if head.startswith(b"PK"):
        _check_zip(path, size)
    else:
        _check_stream(path, size)
    return _read_torch(path)


def refuse_foreign(path: Path) -> None:
    """Raises CheckpointError for a file that is known by its first bytes and holds no checkpoint,
    whatever a configuration would say about it."""
    size = size_of(path)
    with open_file(path) as file:
        head = file.read(512)
    if not _looks_like_safetensors(head, size):
        _refuse_foreign(path, head)


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _refuse_foreign(path: Path, head: bytes) -> None:
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "an HTML page, not a checkpoint: the download failed"
        raise failure(path, what, AGAIN, NotACheckpointError)
    for magic, what, advice in FOREIGN:
        if head.startswith(magic):  # only a pointer is worth nothing by itself
            kind = NotACheckpointError if magic == POINTER else CheckpointError
            raise failure(path, what, advice, kind)
    if head[257:262] == b"ustar":
        raise failure(path, "a tar archive", "unpack it and name the checkpoint inside")
    if not head.startswith((b"PK", b"\x80")):
        what = "not a whole file of torch.save or safetensors"
        raise failure(path, what, AGAIN, NotACheckpointError)


def _check_zip(path: Path, size: int) -> None:
    """Refuse archives that hold no tensors, compressed members (torch writes none; a small one may
    unfold to any size) and members whose checksum is wrong: torch itself does not look at it."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [m.filename for m in members]
        if not any(name.endswith("data.pkl") for name in names):
            raise failure(path, "a zip archive, not a checkpoint", f"unpack {listing(names)}")
        if any(name.endswith("constants.pkl") for name in names):
            raise failure(path, "a TorchScript program", "use a file that holds tensors only")
        stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
        if not stored or sum(m.file_size for m in members) > size:
            raise failure(path, "a checkpoint with compressed members", "use the original file")
        # torch can be told to write no checksums; then all of them are zero.
        if any(m.CRC for m in members):
            damaged = archive.testzip()
            if damaged is not None:
                what = f"damaged: the checksum of {damaged} does not match"
                raise failure(path, what, AGAIN, NotACheckpointError)
        else:
            for member in members:
                del member.CRC  # zipfile compares none where there is none
        if len(set(names)) < len(names):
            raise failure(path, "two members have one name", "use another file")
        for member in members:
            if member.filename.endswith("data.pkl"):
                if member.file_size > LARGEST_PICKLE:
                    what = f"{member.filename} is a pickle of {member.file_size:,} bytes"
                    raise failure(path, what, "use a file that holds tensors only")
                _check_pickles(path, archive.read(member), size)


def _check_stream(path: Path, size: int) -> None:
    """The five pickles that torch's first format begins with; the values follow them."""
    with open_file(path) as file:
        _check_pickles(path, file.read(LARGEST_PICKLE), size, count=5)


def _check_pickles(path: Path, content: bytes, size: int, count: int = 1) -> None:
    try:
        scan_pickles(io.BytesIO(content), size, count, HARMLESS_CLASSES)
    except UnsafePickleError as error:
        if "claim" in str(error):
            raise failure(
                path, f"cut short or damaged: {error}", AGAIN, NotACheckpointError
            ) from error
        advice = "use a file that holds tensors only; nothing of this one was run"
        raise failure(path, str(error), advice) from error


def _read_torch(path: Path) -> object:
    stand_ins: list[Callable | tuple[Callable, str]] = [
        (HarmlessClass, name) for name in HARMLESS_CLASSES
    ]
    with open_file(path) as file, torch.serialization.safe_globals(stand_ins), _quiet():
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:
            raise _refusal(path, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns about odd pickles; what matters of it is in the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Why torch did not load a file: it names code, it is a plain pickle, or it is damaged."""
    found = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    if found:
        advice = "use a file that holds tensors only; nothing of this one was run"
        return failure(path, f"the pickle asks for code: {found[1]}", advice)
    if "Unsupported operand 149" in str(error):  # FRAME: protocol 4 and later begin with it
        name = _first_name(path)
        what = f"a plain pickle that asks for {name}" if name else "a pickle of a protocol above 2"
        return failure(path, what, "use a file that torch.save wrote with its defaults")
    return _damaged(path, error)


def _first_name(path: Path) -> str | None:
    """The first class or function that a plain pickle names; it is read, never run."""
    strings: list[str] = []  # module and name are pushed as strings
    try:
        with open_file(path) as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a sound pickle: then it names nothing
        return None
    return None


def tensors_of(content: object, path: Path) -> State:
    """Check that `content` maps names to plain tensors; strip `module.` if all names have it."""
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise failure(path, f"holds a {kind}, not tensors by name", "use a state dict")
    if not content:
        raise failure(path, "holds no tensor", AGAIN)
    for name, value in content.items():
        _check_tensor(name, value, path)
    state = _owned(content, path)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _check_tensor(name: object, value: object, path: Path) -> None:
    """A name with a dense CPU tensor that lies within its storage."""
    if not isinstance(name, str):
        raise failure(path, f"holds the key {printable(name, 60)}, not a name", "use another file")
    name = printable(name, 100)
    if not isinstance(value, torch.Tensor):
        what = f"entry {name} is of type {type(value).__name__}, not a tensor"
        raise failure(path, what, "use a file with a state dict")
    plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or value.is_nested:
        raise failure(path, f"tensor {name} is not a plain dense tensor", "use another file")
    stored = value.untyped_storage().nbytes()
    if value.nbytes > stored:
        what = f"tensor {name} claims {value.nbytes} bytes, {stored} are stored"
        raise failure(path, what, "use another file")


def _owned(content: dict[str, torch.Tensor], path: Path) -> State:
    """Copy what shares memory: views into a flat storage, one tensor under several names."""
    if sum(tensor.nbytes for tensor in content.values()) > 2 * path.stat().st_size:
        raise failure(
            path, "the tensors overlap: together they exceed the file", "use another file"
        )
    state: State = {}
    seen: set[int] = set()
    for name, value in content.items():
        tensor, storage = value.detach(), value.untyped_storage()
        whole = tensor.nbytes == storage.nbytes() and tensor.is_contiguous()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        state[name] = tensor
    return state

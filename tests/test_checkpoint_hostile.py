"""Files that are no checkpoints, damaged, or hostile: refused in one line, and nothing is run."""

import errno
import os
import pickle
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from tests.helpers.checkpoints import (
    assert_equal,
    narrow_model,
    refused,
    small_state,
    write,
)
from tinydm.models import checkpoint
from tinydm.models.checkpoint import load_into, load_state_dict
from tinydm.models.checkpoint_files import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><title>404</title></html>", "HTML"),
        (b"\xef\xbb\xbf\n  <html>" + b"x" * 5000, "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF file, whose weights are quantized already"),
        (bytes(257) + b"ustar" + bytes(600), "tar"),
        (b"\x00" * 4096, "not a whole file"),
        (b"{}", "not a whole file"),
        (b"\x80", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"PK\x03\x04", "damaged"),
        (b"PK\x03\x04" + b"\x55" * 3000, "damaged"),
        ((2**62).to_bytes(8, "little") + b"{" + b"0" * 99, "not a whole file"),
        ((20).to_bytes(8, "little") + b"{" + b" " * 99, "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert word in refused(path)


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "model.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "regular" in refused(tmp_path / "pipe.ckpt")


def test_archives_are_refused(tmp_path: Path) -> None:
    inner = write(tmp_path / "model.ckpt", small_state())
    with zipfile.ZipFile(tmp_path / "lsun.zip", "w") as archive:
        archive.write(inner, "model.ckpt")
    assert "unpack" in refused(tmp_path / "lsun.zip") and "model.ckpt" in refused(
        tmp_path / "lsun.zip"
    )
    bomb = write(tmp_path / "big.ckpt", {"w": torch.zeros(1 << 20)})
    with zipfile.ZipFile(bomb) as archive:
        members = {m: archive.read(m) for m in archive.namelist()}
    for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(bomb, "w", how) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        assert "compressed" in refused(bomb)
    with zipfile.ZipFile(bomb, "a") as archive:  # small members may unfold to anything as well
        archive.writestr("padding", bytes(2**23))
    assert "compressed" in refused(bomb)


SHARED = torch.ones(1000)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (torch.ones(3), "Tensor"),
        (7, "int"),
        ([], "list of 0"),
        ([small_state()], "list of 1"),
        ([small_state(), {}, 0, 1, small_state(), 2], "list of 6"),
        ([small_state(), {}, 0, 1, {}], "no tensor"),
        ([small_state(), {}, 0, 1, {"a.weight": torch.ones(3, 4)}], "a.bias"),
        ([7, {}, 0, 1, small_state()], "int"),
        ({}, "no tensor"),
        ({"state_dict": {}}, "no tensor"),
        ({"state_dict": [1, 2]}, "state_dict is of type list"),
        ({"model": {"deep": [{"er": torch.ones(1)}]}}, "entry model is of type dict"),
        ({"a": torch.ones(1), "b": None}, "entry b"),
        ({3: torch.ones(1)}, "key 3"),
        ({"a": torch.ones(2, 2).to_sparse()}, "not a plain dense"),
        ({"a": torch.ones(2, device="meta")}, "not a plain dense"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "claims"),
        ({str(n): SHARED for n in range(2000)}, "overlap"),
        ({"evil\n\x1b[31mname": 3}, "evil"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_other_contents_are_refused(
    tmp_path: Path, content: object, word: str, legacy: bool
) -> None:
    assert word in refused(write(tmp_path / "model.ckpt", content, legacy))


class Payload:
    """Unpickling this would make a file."""

    def __init__(self, marker: Path):
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4, None])
def test_code_is_named_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int | None
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not open a way around
    marker, path = tmp_path / "ran", tmp_path / "model.ckpt"
    payload = Payload(marker)
    shapes = (payload, {"a": payload}, {"state_dict": {"a": payload}}, [{}, payload, 0, 1, {}])
    for content in shapes:
        if protocol is None:
            write(path, content)
        elif protocol == 2:
            write(path, content, legacy=True)
        else:
            path.write_bytes(pickle.dumps(content, protocol=protocol))
        message = refused(path)
        assert protocol == 0 or f"{os.system.__module__}.system" in message
    assert not marker.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pt", narrow_model())
    assert "models.ddim_unet.DDIMUNet" in refused(path)


def test_programs_and_other_protocols_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(small_state(), path, pickle_protocol=4)
    assert "protocol" in refused(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in refused(path)


@pytest.mark.parametrize(
    ("error", "whole"),
    [
        (MemoryError(), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (
            RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (RuntimeError("can't allocate memory: you tried to allocate 99999999999 bytes."), False),
        (OSError(errno.EINVAL, "Invalid argument"), False),
    ],
    ids=["memory", "permission", "nine bytes", "more than there is", "seek"],
)
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, whole: bool
) -> None:
    """Else its owner would delete it, and hours of download or calibration with it."""
    path = write(tmp_path / "model.ckpt", small_state())

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint.torch, "load", fail)
    line = refused(path)
    assert ("download it again" not in line and "damaged" not in line) == whole, line


@pytest.mark.parametrize("error", [RecursionError, UnicodeDecodeError, KeyError])
def test_every_exception_becomes_ours_but_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    path = write(tmp_path / "model.ckpt", small_state())

    def fail(*_: object, **__: object) -> None:
        raise error("utf-8", b"", 0, 1, "x") if error is UnicodeDecodeError else error()

    monkeypatch.setattr(checkpoint.torch, "load", fail)
    assert error.__name__ in refused(path)
    error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        load_state_dict(path)


# ---- damage ----


def encoded(kind: str) -> bytes:
    """A small checkpoint in one of the three formats."""
    if kind == "safetensors":
        return save(small_state())
    buffer = BytesIO()
    torch.save(small_state(), buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


KINDS = ("zip", "legacy", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_refused(tmp_path: Path, kind: str) -> None:
    whole = encoded(kind)
    path = tmp_path / "model.ckpt"
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(data=st.data())
def test_damaged_bytes_never_escape(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Overwritten, removed or inserted bytes: a CheckpointError or sound tensors.

    The zip format has checksums, so there what loads is what was saved.
    """
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.sampled_from([0, 1, 1, 1, 8]))
        content[start : start + length] = data.draw(st.binary(max_size=8))
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    module = nn.ModuleDict({"a": nn.Linear(4, 3)})
    try:
        loaded = load_state_dict(path)
        assert all(isinstance(t, torch.Tensor) for t in loaded.values())
        load_into(module, loaded, path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    assert all(torch.isfinite(p).all() for p in module.parameters())


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_zip_is_noticed_or_harmless(
    tmp_path: Path, position: float, bit: int
) -> None:
    content = bytearray(encoded("zip"))
    content[int(position * len(content))] ^= 1 << bit
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    try:
        loaded = load_state_dict(path)
    except CheckpointError:
        return
    assert_equal(loaded, small_state())


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(content=st.binary(max_size=300), magic=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes, magic: bytes) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(magic + content)
    refused(path)

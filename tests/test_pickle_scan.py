"""Pickles of a few hundred bytes that would take gigabytes or minutes: refused at once."""

import collections
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import assert_equal, refused, small_state, write
from tinydm.models.checkpoint import load_state_dict
from tinydm.models.pickle_scan import MOST_OPCODES

P = pickle
NAMES = {"bytearray": b"cbuiltins\nbytearray\n", "dict": b"ccollections\nOrderedDict\n"}


def integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return P.LONG1 + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return P.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def nested_tuple(depth: int) -> bytes:
    """A tuple of two tuples of two tuples: 2**depth parts to hash."""
    twice = P.BINPUT + b"\1" + P.BINGET + b"\1" + P.TUPLE2
    return P.EMPTY_TUPLE + twice * depth


def storage(key: bytes, items: int) -> bytes:
    identity = text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + integer(items)
    return P.MARK + identity + P.TUPLE + P.BINPERSID


def zip_of(path: Path, body: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", P.PROTO + b"\2" + body + P.STOP)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


def stream_of(path: Path, body: bytes) -> Path:
    """torch's first format: magic number, protocol, system, content, keys of the storages."""
    system = {"protocol_version": 1001, "little_endian": True}
    heads = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, system)]
    content = P.PROTO + b"\2" + body + P.STOP
    path.write_bytes(b"".join(heads) + content + pickle.dumps([], protocol=2))
    return path


BYTES = NAMES["bytearray"] + integer(3 << 30) + P.TUPLE1 + P.REDUCE
KEY = nested_tuple(40)
HOSTILE = {
    "bytes": (BYTES, "asks for code: builtins.bytearray"),
    "bytes of a tensor with attributes": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n"
        + P.MARK
        + NAMES["bytearray"]
        + b"ctorch\nTensor\n"
        + integer(3 << 30)
        + P.TUPLE1
        + P.EMPTY_DICT
        + P.TUPLE
        + P.REDUCE,
        "makes a tensor with what makes none",
    ),
    "a storage": (b"ctorch\nFloatStorage\n" + integer(1 << 30) + P.TUPLE1 + P.REDUCE, "asks for"),
    "a tensor": (b"ctorch\nTensor\n" + integer(1 << 30) + P.TUPLE1 + P.NEWOBJ, "asks for"),
    "key": (P.EMPTY_DICT + KEY + P.NONE + P.SETITEM, "keys that are neither names nor numbers"),
    "keys": (P.EMPTY_DICT + P.MARK + KEY + P.NONE + P.SETITEMS, "keys that are neither"),
    "key of a pair": (
        NAMES["dict"] + P.EMPTY_LIST + P.EMPTY_LIST + KEY + P.APPEND + P.NONE + P.APPEND
        + P.APPEND + P.TUPLE1 + P.REDUCE,
        "keys that are neither",
    ),
    "key of a state": (
        NAMES["dict"] + P.EMPTY_TUPLE + P.REDUCE + P.EMPTY_LIST + KEY + P.NONE + P.TUPLE2
        + P.APPEND + P.BUILD,
        "keys that are neither",
    ),
    "member of a set": (
        b"cbuiltins\nset\n" + P.EMPTY_LIST + KEY + P.APPEND + P.TUPLE1 + P.REDUCE,
        "keys that are neither",
    ),
    "key of a storage": (storage(KEY, 1), "keys that are neither"),
    "large storage": (storage(text("0"), 1 << 30), "tensors claim 4,294,967,296 bytes"),
    "numbers of one hash": (P.EMPTY_DICT + integer(2**61 - 1) + P.NONE + P.SETITEM, "keys that"),
    "opcodes": (P.EMPTY_LIST + (P.NONE + P.APPEND) * 2_000_000, f"more than {MOST_OPCODES:,} op"),
    "depth": (P.NONE + P.TUPLE1 * 100_000, "nested more than"),
    "copies": (
        P.EMPTY_LIST + P.MARK + P.NONE * 100_000 + P.APPENDS + P.BINPUT + b"\0"
        + (b"cbuiltins\nset\n" + P.BINGET + b"\0" + P.TUPLE1 + P.REDUCE) * 1000,
        "copies more than",
    ),
    "another encoding": (
        b"c_codecs\nencode\n" + text("a" * 100) + text("punycode") + P.TUPLE2 + P.REDUCE,
        "something else than latin1",
    ),
}  # fmt: skip


LARGE = ("copies", "opcodes")  # kinds that take a second to be seen through


@pytest.mark.parametrize("form", [zip_of, stream_of])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in LARGE else []) for k in HOSTILE]
)
def test_hostile_pickles_are_refused_at_once(tmp_path: Path, kind: str, form) -> None:
    body, message = HOSTILE[kind]
    path = form(tmp_path / "model.pt", body)
    began = time.monotonic()
    assert message in refused(path)
    assert time.monotonic() - began < 20  # without the scan: minutes, or gigabytes


@pytest.mark.parametrize("legacy", [False, True])
def test_what_honest_checkpoints_hold_is_read(tmp_path: Path, legacy: bool) -> None:
    """Lightning's and training's surroundings of a state dict."""
    state = collections.OrderedDict(small_state())
    state._metadata = {"": {"version": 1}}
    state["b"] = torch.nn.Parameter(torch.ones(2))
    state["c"] = torch.ones(4, 4)[1:, ::2]
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {
        "state_dict": state,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"milestones": collections.Counter({100: 1})}],
        "hyper_parameters": {"betas": (0.9, 0.999), "sizes": {1, 2}, 3: torch.Size([1])},
        "device": torch.device("cpu"),
        "random": torch.get_rng_state(),
        "callbacks": {"bytes": b"\x00\xff", "complex": 1j},
        "large": 2**70,
        "views": [torch.arange(6).view(2, 3).t(), torch.ones(3, dtype=torch.bfloat16)],
    }
    loaded = load_state_dict(write(tmp_path / "model.ckpt", content, legacy))
    assert_equal(loaded, {name: value.detach() for name, value in state.items()})


def test_many_small_tensors_are_no_hostility(tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}
    assert_equal(load_state_dict(write(tmp_path / "model.pt", state)), state)

"""Hostile checkpoints and quantized files, opened as the command lines open them.

python -m pytest tests/test_fuzz.py --fuzz 2000

Every file either gives one line for the user or loads into a model of finite numbers. No file runs
code, and none makes the process take more memory than its size warrants: the whole is done in a
process whose address space is bounded.
"""

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.rooms import RESULT
from tinydm.quant.runtime.packed_file import digest_of
from tinydm.scripts.experiment import cli
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.config import load_config

ROOM = 1 << 29  # bytes that opening a file of a few kB may add to the address space
HUGE = [2**31, 2**40, 2**62, 2**63 - 1, -1, 0]


class Code:
    """Unpickling it makes a folder named `ran`."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


@pytest.fixture(scope="module")
def originals(room: Path) -> dict[str, bytes]:
    """The same weights in every format, and a quantized file."""
    state = torch.load(room / "tiny.pt", weights_only=True)
    legacy = io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    arguments = ("--config", room / "tiny.yaml", "--set", "quant.method=minmax")
    assert forks.run(calibrate.main, *arguments, "--out", room / "fuzz").code == 0
    return {
        "zip": (room / "tiny.pt").read_bytes(),
        "legacy": legacy.getvalue(),
        "safetensors": save({name: value.contiguous() for name, value in state.items()}),
        "quantized": (room / "fuzz" / RESULT).read_bytes(),
    }


# ---- mutations ----


def bytes_changed(content: bytes, data: st.DataObject) -> bytes:
    """Flipped bits, cut ends, runs that are overwritten, inserted or removed."""
    changed = bytearray(content)
    head = data.draw(st.sampled_from([16, 512, len(content)]))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, max(0, min(head, len(changed)) - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "write", "insert", "remove"]))
        if kind == "flip" and changed:
            changed[where] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[where:]
        elif kind == "write":
            new = data.draw(st.binary(min_size=1, max_size=8))
            changed[where : where + len(new)] = new
        elif kind == "insert":
            changed[where:where] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            del changed[where : where + data.draw(st.integers(1, 200))]
    return bytes(changed)


def header_changed(content: bytes, data: st.DataObject) -> bytes:
    """safetensors: absurd lengths, shapes, types, offsets and metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    kind = data.draw(st.sampled_from(["length", "shape", "dtype", "offsets", "meta", "nested"]))
    if kind == "length":
        return struct.pack("<Q", data.draw(st.sampled_from(HUGE)) % 2**64) + content[8:]
    if kind == "nested":
        text = b'{"a":' * 50_000
        return struct.pack("<Q", len(text)) + text
    names = [name for name in header if name != "__metadata__"]
    entry = header[data.draw(st.sampled_from(names))]
    absurd = data.draw(st.sampled_from(HUGE))
    if kind == "shape":
        entry["shape"] = data.draw(st.sampled_from([[absurd], [absurd, 0], [2] * 300, [1.5], {}]))
    elif kind == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F64", "F16", "I64", "BOOL", "F4", 7]))
    elif kind == "offsets":
        entry["data_offsets"] = data.draw(st.sampled_from([[0, absurd], [absurd, 0], [8, 4], []]))
    else:
        header["__metadata__"] = data.draw(st.sampled_from([{"format": "x"}, {"a": 1}, [], "x"]))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def pickle_changed(content: bytes, data: st.DataObject) -> bytes:
    """Objects that torch.save or pickle write, but that are no weights."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    name = data.draw(st.sampled_from(sorted(state)))
    value = state[name]
    strange = data.draw(
        st.sampled_from(
            [
                Code(),
                {"state_dict": {name: Code()}},
                value.as_strided((2**20, 2**20), (0, 0)),
                torch.empty(2**40, device="meta"),
                value * float("nan"),
                value.double() * 1e300,
                value.to(torch.complex64),
                value.to_sparse(),
                value[None],
                value.bool(),
                torch.nn.Linear(2, 2),
                [1, [2]],
                "x" * 1000,
            ]
        )
    )
    whole = data.draw(st.sampled_from([strange, state | {name: strange}, [strange] * 5]))
    if data.draw(st.booleans()):
        return pickle.dumps(whole, data.draw(st.integers(0, 5)))
    buffer = io.BytesIO()
    torch.save(whole, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
    return buffer.getvalue()


def archive_changed(content: bytes, data: st.DataObject) -> bytes:
    """A zip checkpoint with members that are compressed, cut, doubled, or say another size."""
    kind = data.draw(st.sampled_from(["bomb", "short", "twice", "numbers", "code"]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        members = old.infolist()
        chosen = data.draw(st.sampled_from(members)).filename
        for member in members:
            payload, how = old.read(member), zipfile.ZIP_STORED
            if member.filename == chosen and kind == "bomb":
                payload, how = bytes(1 << 26), zipfile.ZIP_DEFLATED
            elif member.filename == chosen and kind == "short":
                payload = payload[: len(payload) // 2]
            elif member.filename.endswith("data.pkl") and kind == "code":
                payload = pickle.dumps(Code(), 2)
            elif member.filename.endswith("data.pkl") and kind == "numbers":
                payload = larger_numbers(payload, data)
            new.writestr(member.filename, payload, how)
            if member.filename == chosen and kind == "twice":
                new.writestr(f"{member.filename}.x", payload)
    return buffer.getvalue()


def larger_numbers(payload: bytes, data: st.DataObject) -> bytes:
    """A pickle whose small integers (sizes, strides, lengths of storages) become huge ones."""
    places = [i for i, byte in enumerate(payload[:-2]) if byte == ord("K")]  # BININT1
    place = data.draw(st.sampled_from(places))
    number = data.draw(st.sampled_from([2**31 - 1, 2**30, -1, -(2**31)]))
    return payload[:place] + b"J" + struct.pack("<i", number) + payload[place + 2 :]


def values_changed(content: bytes, data: st.DataObject) -> bytes:
    """A quantized file with a fitting checksum: scales, tables and rows that are absurd."""
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    kind = data.draw(st.sampled_from(["scale", "value", "shape", "row", "json", "config"]))
    if kind in ("scale", "value", "shape"):
        scales = [n for n in sorted(tensors) if n.endswith("scale")]
        name = data.draw(st.sampled_from(scales if kind == "scale" else sorted(tensors)))
        x = tensors[name] = tensors[name].clone()
        if kind == "shape":
            shapes = [x[:0], x.flatten()[:-1], x[None], x.flatten().repeat(2)]
            tensors[name] = data.draw(st.sampled_from(shapes)).clone()
        elif x.numel():
            wrong = [-1.0, 0.0, float("nan"), float("inf"), 3e38]
            value = data.draw(st.sampled_from(wrong)) if x.is_floating_point() else 255
            x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
    elif kind == "row":
        table = json.loads(metadata["layers"])
        row = data.draw(st.sampled_from(table))
        absurd = data.draw(st.sampled_from([*HUGE, None, "x", [HUGE[1]], {"a": []}, 1e300]))
        row[data.draw(st.sampled_from(sorted(row)))] = absurd
        metadata["layers"] = json.dumps(table)
    elif kind == "json":
        name = data.draw(st.sampled_from(["layers", "timesteps", "train_timesteps"]))
        absurd = ["[" * 50_000, "1e999", "NaN", "[1e999]", str(10**30), "null", '"x"', "[-5]"]
        metadata[name] = data.draw(st.sampled_from(absurd))
    else:
        metadata["config"] = config_changed(metadata["config"], data)
    metadata["digest"] = digest_of(tensors, metadata)
    return save(tensors, metadata)


def config_changed(text: str, data: st.DataObject) -> str:
    """The configuration within the file: sizes that no machine has, other kinds, another text."""
    tree = yaml.safe_load(text)
    params = tree["model"]["params"]
    name = data.draw(st.sampled_from(sorted(params)))
    params[name] = data.draw(st.sampled_from([*HUGE, [2**40], [1] * 5000, "x", None, 1e300]))
    texts = [yaml.safe_dump(tree), "", "a: [", "!!python/object/apply:os.mkdir [ran]", "x" * 10**5]
    return data.draw(st.sampled_from([texts[0], *texts]))


MUTATIONS: dict[str, list[Callable[[bytes, st.DataObject], bytes]]] = {
    "zip": [bytes_changed, pickle_changed, archive_changed],
    "legacy": [bytes_changed, pickle_changed],
    "safetensors": [bytes_changed, header_changed],
    "quantized": [bytes_changed, header_changed, values_changed, values_changed],
}


# ---- opening ----


def open_checkpoint(path: Path, home: Path) -> torch.nn.Module:
    config = load_config(home / "tiny.yaml", [f"model.checkpoint={json.dumps(str(path))}"])
    return assemble(config).denoiser


def open_quantized(path: Path, home: Path) -> torch.nn.Module:
    """By itself, with the configuration that it holds."""
    args = sample_diffusion.parse_arguments(["--quantized", str(path), "--out", "unused"])
    return assemble(sample_diffusion.read_config(args, None), path).denoiser


def try_to_open(kind: str, path: Path, home: Path) -> str:
    """ "loaded", or "refused" with one line. Anything else fails."""
    try:
        model = (open_quantized if kind == "quantized" else open_checkpoint)(path, home)
    except Exception as error:
        line = cli.explain(error)
        assert line is not None, f"no message for {type(error).__name__}: {error}"
        assert line.isprintable() and 10 < len(line) <= 2003
        for word in ("MemoryError", "out of memory", "allocate"):
            assert word not in line, line
        return "refused"
    for name, value in model.state_dict().items():
        assert not value.is_floating_point() or torch.isfinite(value).all(), name
    return "loaded"


def bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.mark.slow
def test_hostile_files_give_a_line_and_nothing_else(
    room: Path,
    originals: dict[str, bytes],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    files = pytestconfig.getoption("--fuzz")
    outcomes: Counter = Counter()
    path = tmp_path / "file"

    @seed(11)
    @settings(
        max_examples=files,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(sorted(MUTATIONS)))
        mutate = data.draw(st.sampled_from(MUTATIONS[kind]))
        path.write_bytes(mutate(originals[kind], data))
        outcomes[f"{kind} {try_to_open(kind, path, room)}"] += 1

    def fuzz(_: list[str]) -> None:
        os.chdir(tmp_path)
        each()
        print(json.dumps(dict(sorted(outcomes.items()))))

    fork = forks.run(fuzz, before=bound_memory)
    assert fork.code == 0, fork.text()[-5000:]
    assert not (tmp_path / "ran").exists(), "code of a file was run"
    assert {p.name for p in tmp_path.iterdir()} == {"file"}
    found = json.loads(fork.text().splitlines()[-1])
    assert sum(found.values()) >= files
    assert all(any(k.startswith(kind) for k in found) for kind in MUTATIONS)
    print(f"\n{sum(found.values())} files: {found}")


def test_the_originals_load_and_code_would_run(
    room: Path,
    originals: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without this the test above could pass by refusing everything, or by harmless code."""
    for kind, content in originals.items():
        (tmp_path / kind).write_bytes(content)
        assert try_to_open(kind, tmp_path / kind, room) == "loaded"
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Code()))
    assert (tmp_path / "ran").is_dir()
